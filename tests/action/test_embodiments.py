from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from action.embodiments import EMBODIMENTS, Aloha, Droid, Libero
from action.embodiments.aloha import decode_actions, decode_state, encode_actions
from action.embodiments.delta import absolute_actions, delta_actions, delta_mask
from demo.robot import Table
from pi0.cameras import MODEL_CAMERAS
from pi0.images import parse_image
from tests.golden_data import GOLDEN

Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def golden() -> dict[str, NDArray[Any]]:
    with np.load(GOLDEN / "transforms" / "aloha.npz") as file:
        return {key: file[key] for key in file.files}


def floats(*shape: int, bound: float = 10.0) -> st.SearchStrategy[Array]:
    return hnp.arrays(np.float64, shape, elements=st.floats(-bound, bound))


@pytest.mark.parametrize("i", range(4))
class TestAlohaSpaces:
    def test_state(self, golden: dict[str, Any], i: int) -> None:
        np.testing.assert_allclose(decode_state(golden[f"{i}/state"]), golden[f"{i}/decode_state_pi"], rtol=1e-6)

    def test_actions_out(self, golden: dict[str, Any], i: int) -> None:
        padded = np.pad(golden[f"{i}/actions"], ((0, 0), (0, 18)))
        np.testing.assert_allclose(Aloha(adapt_to_pi=True).outputs(padded), golden[f"{i}/encode_actions_pi"], rtol=1e-6)
        np.testing.assert_array_equal(Aloha(adapt_to_pi=False).outputs(padded), golden[f"{i}/encode_actions_raw"])

    def test_actions_in(self, golden: dict[str, Any], i: int) -> None:
        np.testing.assert_allclose(decode_actions(golden[f"{i}/actions"]), golden[f"{i}/encode_actions_inv_pi"], rtol=1e-6)

    def test_raw_space_is_left_alone(self, golden: dict[str, Any], i: int) -> None:
        observation = {"state": golden[f"{i}/state"], "images": {"cam_high": np.zeros((3, 6, 5), np.uint8)}}
        np.testing.assert_array_equal(Aloha(adapt_to_pi=False).inputs(observation).state, golden[f"{i}/decode_state_raw"])


def test_aloha_gripper_check_values() -> None:
    state = np.zeros((5, 14))
    state[:, 6] = [0, 0.25, 0.5, 0.75, 1]
    np.testing.assert_allclose(decode_state(state)[:, 6], [-1.0798655, -0.5130776, -0.1400559, 0.2233276, 0.9456528], atol=1e-7)
    actions = np.zeros((3, 14))
    actions[:, 13] = [0, 0.5, 1]
    np.testing.assert_allclose(encode_actions(actions)[:, 13], [0.5533778, 0.7900866, 1.0267954], atol=1e-7)


def test_aloha_inputs_are_those_of_openpi(golden: dict[str, Any]) -> None:
    observation = {
        "state": golden["0/state"],
        "images": {"cam_high": golden["inputs/cam_high_float_chw"], "cam_right_wrist": golden["inputs/cam_right_wrist_uint8_chw"]},
    }
    inputs = Aloha().inputs(observation)
    np.testing.assert_allclose(inputs.state, golden["inputs_out/state"], rtol=1e-6)
    for camera in MODEL_CAMERAS:
        assert (camera in inputs.images) == golden[f"inputs_out/image_mask/{camera}"]
        image = inputs.images.get(camera, np.zeros((6, 5, 3), np.uint8))
        np.testing.assert_array_equal(image, golden[f"inputs_out/image/{camera}"])


@given(floats(4, 14))
def test_aloha_action_spaces_are_inverse(actions: Array) -> None:
    np.testing.assert_allclose(decode_actions(encode_actions(actions)), actions, atol=1e-9)
    np.testing.assert_allclose(encode_actions(decode_actions(actions)), actions, atol=1e-9)


@given(floats(14), st.floats(0, 1), st.floats(0, 1))
def test_aloha_gripper_angle_grows_with_the_opening(state: Array, low: float, high: float) -> None:
    low, high = sorted((low, high))
    narrow, wide = np.array([state, state])
    narrow[[6, 13]], wide[[6, 13]] = low, high
    assert (decode_state(narrow)[[6, 13]] <= decode_state(wide)[[6, 13]]).all()


def test_aloha_image_layouts() -> None:
    chw = np.random.default_rng(0).integers(0, 256, (3, 20, 30), np.uint8)
    seen = [Aloha().inputs({"state": [0.5] * 14, "images": {"cam_high": image}}).images["base_0_rgb"] for image in (chw, chw.transpose(1, 2, 0))]
    np.testing.assert_array_equal(seen[0], chw.transpose(1, 2, 0))
    np.testing.assert_array_equal(seen[0], seen[1])


def test_aloha_ignores_cam_low() -> None:
    image = np.zeros((3, 8, 8), np.uint8)
    assert set(Aloha().inputs({"state": np.zeros(14), "images": {"cam_high": image, "cam_low": image}}).images) == {"base_0_rgb"}


@pytest.mark.parametrize("gripper", [0.25, np.float32(0.25), np.array(0.25), np.array([0.25]), [0.25]], ids=str)
def test_droid_gripper_forms(gripper: object) -> None:
    observation = Droid().example(np.random.default_rng(0)) | {"observation/gripper_position": gripper}
    state = Droid().inputs(observation).state
    np.testing.assert_array_equal(state, [*observation["observation/joint_position"], 0.25])


@pytest.mark.parametrize("robot", [Droid(), Libero()], ids=lambda robot: robot.name)
def test_two_camera_robots_have_no_right_wrist(robot: Droid | Libero) -> None:
    observation = robot.example(np.random.default_rng(0))
    images = robot.inputs(observation).images
    sent = [observation[spec.path[0]] for spec in robot.image_specs]
    assert list(images) == ["base_0_rgb", "left_wrist_0_rgb"]
    for image, original in zip(images.values(), sent, strict=True):
        np.testing.assert_array_equal(image, original)


ROBOTS = {**EMBODIMENTS, "table": Table()}
"""Ours, and one that comes from outside."""


@pytest.mark.parametrize("robot", ROBOTS.values(), ids=ROBOTS)
class TestEveryEmbodiment:
    def test_example_is_a_good_observation_and_repeatable(self, robot: Any) -> None:
        first, second = (robot.example(np.random.default_rng(7)) for _ in range(2))
        np.testing.assert_equal(first, second)
        inputs = robot.inputs(first)
        assert inputs.state.shape == (robot.state_dim,)
        assert inputs.state.dtype == np.float64
        assert set(inputs.images) <= set(MODEL_CAMERAS)
        assert isinstance(first["prompt"], str)

    def test_example_matches_the_image_specs(self, robot: Any) -> None:
        example = robot.example(np.random.default_rng(0))
        for spec in robot.image_specs:
            image = example
            for key in spec.path:
                image = image[key]
            metadata = spec.as_metadata()
            assert list(image.shape) == metadata["target_shape"]
            assert str(image.dtype) == metadata["dtype"]
            assert parse_image(image, "camera").shape == (224, 224, 3)

    def test_output_width(self, robot: Any) -> None:
        for horizon, width in itertools.product((1, 10, 50), (robot.action_dim, 32)):
            assert robot.outputs(np.zeros((horizon, width))).shape == (horizon, robot.action_dim)

    def test_outputs_leave_the_model_actions_alone(self, robot: Any) -> None:
        actions = np.random.default_rng(0).normal(size=(5, 32))
        before = actions.copy()
        actions.flags.writeable = False
        robot.outputs(actions)
        np.testing.assert_array_equal(actions, before)

    def test_keys_of_others_are_ignored(self, robot: Any) -> None:
        example = robot.example(np.random.default_rng(0))
        extra = example | {"mode": "action_only", "session_id": 3, "observation/exterior_image_2_left": "not an image", b"bytes": None}
        np.testing.assert_array_equal(robot.inputs(extra).state, robot.inputs(example).state)


def test_image_specs_are_those_of_the_wire() -> None:
    paths = {name: [spec.as_metadata()["path"] for spec in robot.image_specs] for name, robot in EMBODIMENTS.items()}
    assert paths == {
        "aloha": [["images", "cam_high"], ["images", "cam_low"], ["images", "cam_left_wrist"], ["images", "cam_right_wrist"]],
        "droid": [["observation/exterior_image_1_left"], ["observation/wrist_image_left"]],
        "libero": [["observation/image"], ["observation/wrist_image"]],
    }
    shapes = {name: {spec.shape for spec in robot.image_specs} for name, robot in EMBODIMENTS.items()}
    assert shapes == {"aloha": {(3, 224, 224)}, "droid": {(224, 224, 3)}, "libero": {(224, 224, 3)}}


class TestDelta:
    def test_mask(self) -> None:
        assert delta_mask(6, -1, 6, -1) == (True,) * 6 + (False,) + (True,) * 6 + (False,)
        assert delta_mask(2, 0, -2) == (True, True, False, False)
        assert delta_mask() == ()

    def test_golden(self, golden: dict[str, Any]) -> None:
        mask, state, actions = golden["delta/mask"], golden["delta/state"], golden["delta/actions"]
        np.testing.assert_allclose(delta_actions(actions, state, mask), golden["delta/delta_actions"], rtol=1e-12)
        np.testing.assert_allclose(absolute_actions(actions, state, mask), golden["delta/absolute_actions"], rtol=1e-12)

    @given(floats(3, 9), floats(8), st.lists(st.booleans(), max_size=8))
    def test_inverse(self, actions: Array, state: Array, mask: list[bool]) -> None:
        np.testing.assert_allclose(delta_actions(absolute_actions(actions, state, mask), state, mask), actions, atol=1e-12)

    @given(floats(3, 9), floats(8), st.lists(st.booleans(), max_size=8))
    def test_only_masked_columns_move(self, actions: Array, state: Array, mask: list[bool]) -> None:
        moved = absolute_actions(actions, state, mask) - actions
        expected = np.zeros(9)
        expected[: len(mask)] = np.where(mask, state[: len(mask)], 0)
        np.testing.assert_allclose(moved, np.tile(expected, (3, 1)), atol=1e-12)

    def test_a_state_per_chunk(self) -> None:
        actions, states = np.zeros((2, 3, 4)), np.array([[1.0, 2.0], [3.0, 4.0]])
        moved = absolute_actions(actions, states, (True, False))
        np.testing.assert_array_equal(moved[:, :, 0], [[1, 1, 1], [3, 3, 3]])
        assert not moved[:, :, 1:].any()
