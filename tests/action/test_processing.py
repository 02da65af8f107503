from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from action.configs import CONFIGS, get_config
from action.processing import Processor
from pi0.cameras import MODEL_CAMERAS
from pi0.errors import CheckpointError, ObservationError, PromptTooLongError
from pi0.norm_stats import Stats
from tests.action.policy_cases import POLICY_CASES, golden_call, processor, tokenizer
from tests.golden_data import CHECKPOINTS

IMAGE = np.zeros((3, 8, 8), np.uint8)
NAN_AT_3 = np.array([0.0, 0.0, 0.0, np.nan] + [0.0] * 10)


def aloha(**changes: Any) -> dict[str, Any]:
    return {"state": np.zeros(14), "images": {"cam_high": IMAGE}, "prompt": "fold the towel"} | changes


def droid(**changes: Any) -> dict[str, Any]:
    flat = {"exterior_image_1_left": IMAGE, "wrist_image_left": IMAGE, "joint_position": np.zeros(7), "gripper_position": 0.5}
    return {f"observation/{key}": value for key, value in flat.items()} | {"prompt": "open the drawer"} | _flat(changes)


def libero(**changes: Any) -> dict[str, Any]:
    flat = {"image": IMAGE, "wrist_image": IMAGE, "state": np.zeros(8)}
    return {f"observation/{key}": value for key, value in flat.items()} | {"prompt": "open the drawer"} | _flat(changes)


def _flat(changes: dict[str, Any]) -> dict[str, Any]:
    return {key if key == "prompt" else f"observation/{key}": value for key, value in changes.items()}


def without(observation: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in observation.items() if name != key}


@pytest.mark.parametrize("case", POLICY_CASES)
def test_model_input_is_that_of_openpi(case: str) -> None:
    call = golden_call(case)
    config = get_config(call.meta["config"])
    prepared = processor(config).prepare(call.observation)
    ids, mask = prepared.prompt.padded(config.max_token_len)
    np.testing.assert_array_equal(ids, call.arrays["model_in/tokens"])
    np.testing.assert_array_equal(mask, call.arrays["model_in/token_mask"])
    np.testing.assert_allclose(prepared.model_state, call.arrays["model_in/state"], rtol=1e-6)
    images_compared = 0
    for slot, camera in enumerate(MODEL_CAMERAS):
        assert prepared.image_masks[slot] == call.arrays[f"model_in/image_mask/{camera}"]
        if (recorded := call.arrays.get(f"model_in/image/{camera}")) is not None:
            np.testing.assert_array_equal(prepared.images[slot], recorded)
            images_compared += 1
    assert images_compared >= 1


ALOHA_STATE = "[14] numbers (left arm 6, left gripper, right arm 6, right gripper)"
ALOHA_KNOWN = "cam_high, cam_left_wrist, cam_right_wrist, cam_low"
DROID_KEYS = [
    "observation/exterior_image_1_left", "observation/gripper_position", "observation/joint_position", "observation/wrist_image_left", "prompt",
]  # fmt: skip
LIBERO_STATE = "[8] numbers (end-effector position 3, axis-angle 3, gripper 2)"
NO_PROMPT = "prompt: missing, and there is no default; send the task as text, or set action.default_prompt on the server"
TEXT = "expected text (str, 0-d string array or UTF-8 bytes)"
SIZES = "expected [height, width, 3] or [3, height, width]"


def droid_without(key: str) -> str:
    return ", ".join(name for name in DROID_KEYS if name != key)


BAD: list[tuple[str, object, str]] = [
    ("pi0_aloha", [1, 2], "the observation is a list, expected a map of keys to values"),
    ("pi0_aloha", None, "the observation is a NoneType, expected a map of keys to values"),
    ("pi0_aloha", {"prompt": "x"}, f"state: missing, expected {ALOHA_STATE}; the observation has prompt"),
    ("pi0_aloha", without(aloha(), "state"), f"state: missing, expected {ALOHA_STATE}; the observation has images, prompt"),
    ("pi0_aloha", aloha(state=np.zeros(7)), f"state: got shape [7], expected {ALOHA_STATE}"),
    ("pi0_aloha", aloha(state=np.zeros((1, 14))), f"state: got shape [1, 14], expected {ALOHA_STATE}"),
    ("pi0_aloha", aloha(state=np.zeros(14, bool)), f"state: got dtype bool, expected {ALOHA_STATE}"),
    ("pi0_aloha", aloha(state=np.array(["a"] * 14)), f"state: got dtype <U1, expected {ALOHA_STATE}"),
    ("pi0_aloha", aloha(state="zeros"), f"state: got str, expected {ALOHA_STATE}"),
    ("pi0_aloha", aloha(state=None), f"state: got NoneType, expected {ALOHA_STATE}"),
    ("pi0_aloha", aloha(state=[[1, 2], [3]]), f"state: got a ragged list, expected {ALOHA_STATE}"),
    ("pi0_aloha", aloha(state=NAN_AT_3), "state: the value at index 3 is nan, expected finite numbers"),
    ("pi0_aloha", aloha(state=-np.inf * np.ones(14)), "state: the value at index 0 is -inf, expected finite numbers"),
    ("pi0_aloha", without(aloha(), "images"), "images: missing, expected a map of camera name to image; the observation has prompt, state"),
    ("pi0_aloha", aloha(images=IMAGE), "images: got ndarray, expected a map of camera name to image"),
    ("pi0_aloha", aloha(images={}), "images/cam_high: missing, expected a camera image [3, height, width]; images has no keys"),
    (
        "pi0_aloha",
        aloha(images={"cam_left_wrist": IMAGE}),
        "images/cam_high: missing, expected a camera image [3, height, width]; images has cam_left_wrist",
    ),
    (
        "pi0_aloha",
        aloha(images={"cam_high": IMAGE, "cam_front": IMAGE}),
        f"images/cam_front: not a camera of this robot, expected some of {ALOHA_KNOWN}",
    ),
    (
        "pi0_aloha",
        aloha(images={"cam_high": IMAGE, "two\nlines": IMAGE}),
        f"images/two\\nlines: not a camera of this robot, expected some of {ALOHA_KNOWN}",
    ),
    (
        "pi0_aloha",
        aloha(images={"cam_high": IMAGE, "x" * 500: IMAGE}),
        f"images/{'x' * 60}…: not a camera of this robot, expected some of {ALOHA_KNOWN}",
    ),
    ("pi0_aloha", aloha(images={"cam_high": "jpeg"}), "images/cam_high: expected an image array [height, width, 3], got str"),
    ("pi0_aloha", aloha(images={"cam_high": np.zeros((8, 8), np.uint8)}), f"images/cam_high: image has shape [8, 8], {SIZES}"),
    ("pi0_aloha", aloha(images={"cam_high": np.zeros((4, 8, 8), np.uint8)}), f"images/cam_high: image has shape [4, 8, 8], {SIZES}"),
    (
        "pi0_aloha",
        aloha(images={"cam_high": IMAGE.astype(np.int64)}),
        "images/cam_high: image has dtype int64, expected uint8 (0 to 255) or float (0 to 1)",
    ),
    (
        "pi0_aloha",
        aloha(images={"cam_high": IMAGE, "cam_left_wrist": np.full((3, 8, 8), np.nan, np.float32)}),
        "images/cam_left_wrist: image holds NaN or infinity",
    ),
    (
        "pi0_aloha",
        aloha(images={"cam_high": np.full((3, 8, 8), 255, np.float32)}),
        "images/cam_high: float image with values from 255 to 255, expected [0, 1]; send uint8 or divide by 255",
    ),
    (
        "pi0_aloha",
        aloha(images={"cam_high": np.full((3, 8, 8), -0.5, np.float32)}),
        "images/cam_high: float image with values from -0.5 to -0.5, expected [0, 1]; send uint8 or divide by 255",
    ),
    ("pi0_aloha", without(aloha(), "prompt"), NO_PROMPT),
    ("pi05_droid", without(droid(), "prompt"), NO_PROMPT),
    ("pi05_libero", without(libero(), "prompt"), NO_PROMPT),
    ("pi0_aloha", aloha(prompt=None), f"prompt: got NoneType, {TEXT}"),
    ("pi05_droid", droid(prompt=["open", "it"]), f"prompt: got list, {TEXT}"),
    ("pi05_libero", libero(prompt=3), f"prompt: got int, {TEXT}"),
    ("pi05_libero", libero(prompt=np.array(["a", "b"])), f"prompt: got an array of shape [2] and dtype <U1, {TEXT}"),
    ("pi05_libero", libero(prompt=np.array(3.0)), f"prompt: got an array of shape [] and dtype float64, {TEXT}"),
    ("pi05_droid", droid(prompt=b"caf\xe9"), "prompt: 4 bytes that are not UTF-8 (at byte 3), expected text"),
    *(
        (
            "pi05_droid",
            without(droid(), f"observation/{key}"),
            f"observation/{key}: missing, expected a camera image [height, width, 3]; the observation has {droid_without('observation/' + key)}",
        )
        for key in ("exterior_image_1_left", "wrist_image_left")
    ),
    (
        "pi05_droid",
        without(droid(), "observation/joint_position"),
        "observation/joint_position: missing, expected [7] numbers (joint angles); "
        f"the observation has {droid_without('observation/joint_position')}",
    ),
    (
        "pi05_droid",
        without(droid(), "observation/gripper_position"),
        "observation/gripper_position: missing, expected [1] numbers (0 open … 1 closed); "
        f"the observation has {droid_without('observation/gripper_position')}",
    ),
    ("pi05_droid", droid(joint_position=np.zeros(8)), "observation/joint_position: got shape [8], expected [7] numbers (joint angles)"),
    ("pi05_droid", droid(joint_position=0.5), "observation/joint_position: got shape [], expected [7] numbers (joint angles)"),
    ("pi05_droid", droid(gripper_position=np.zeros(2)), "observation/gripper_position: got shape [2], expected [1] numbers (0 open … 1 closed)"),
    ("pi05_droid", droid(gripper_position=np.nan), "observation/gripper_position: the value at index 0 is nan, expected finite numbers"),
    ("pi05_droid", droid(gripper_position="open"), "observation/gripper_position: got str, expected [1] numbers (0 open … 1 closed)"),
    ("pi05_droid", droid(wrist_image_left=IMAGE[0]), f"observation/wrist_image_left: image has shape [8, 8], {SIZES}"),
    (
        "pi05_droid",
        droid(wrist_image_left=np.zeros((0, 8, 3), np.uint8)),
        "observation/wrist_image_left: image is 0 × 8 pixels, expected 1 to 8192 on each side",
    ),
    (
        "pi05_libero",
        {"observation": {"image": IMAGE, "state": np.zeros(8)}, "prompt": "nested"},
        f"observation/state: missing, expected {LIBERO_STATE}; the observation has observation, prompt",
    ),
    (
        "pi05_libero",
        without(libero(), "observation/state"),
        f"observation/state: missing, expected {LIBERO_STATE}; the observation has observation/image, observation/wrist_image, prompt",
    ),
    ("pi05_libero", libero(state=np.zeros(7)), f"observation/state: got shape [7], expected {LIBERO_STATE}"),
    ("pi05_libero", libero(state=np.zeros(8, complex)), f"observation/state: got dtype complex128, expected {LIBERO_STATE}"),
    ("pi05_libero", libero(image=None), "observation/image: expected an image array [height, width, 3], got NoneType"),
    ("pi05_libero", libero(state=[1e300, *[0] * 7]), "state: the value at index 0 is 4.044e+300 after normalisation, too large for the model"),
]


@pytest.mark.parametrize(("config", "observation", "message"), BAD, ids=[message[:60] for _, _, message in BAD])
def test_bad_observation(config: str, observation: object, message: str) -> None:
    with pytest.raises(ObservationError) as caught:
        processor(config).prepare(observation)
    assert str(caught.value) == message
    assert "\n" not in message


def test_a_long_list_of_keys_is_cut() -> None:
    observation = {f"key_{i:03}": 0 for i in range(100)} | {"prompt": "x"}
    with pytest.raises(ObservationError) as caught:
        processor("pi0_aloha").prepare(observation)
    assert str(caught.value).endswith("key_010, key_011 and 89 more")


class TestPrompt:
    @pytest.mark.parametrize("config", ["pi0_aloha", "pi05_droid", "pi05_libero"])
    @pytest.mark.parametrize(
        "prompt", [np.array("fold the towel"), np.str_("fold the towel"), b"fold the towel", np.array(b"fold the towel")], ids=repr
    )
    def test_forms(self, config: str, prompt: object) -> None:
        example = CONFIGS[config].embodiment.example(np.random.default_rng(0))
        expected, got = (processor(config).prepare(example | {"prompt": value}).prompt.ids for value in ("fold the towel", prompt))
        np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize(
        ("config", "server", "expected"),
        [("pi0_aloha_sim", None, "Transfer cube"), ("pi0_aloha_sim", "stack", "stack"), ("pi0_aloha", "stack", "stack"), ("pi0_aloha_sim", "", "")],
    )
    def test_default(self, config: str, server: str | None, expected: str) -> None:
        transforms = processor(config, default_prompt=server)
        assert transforms.default_prompt == expected
        np.testing.assert_array_equal(
            transforms.prepare(without(aloha(), "prompt")).prompt.ids, transforms.prepare(aloha(prompt=expected)).prompt.ids
        )

    def test_the_client_goes_first(self) -> None:
        own = processor("pi0_aloha_sim", default_prompt="stack").prepare(aloha(prompt="unstack")).prompt.ids
        np.testing.assert_array_equal(own, tokenizer().action_prompt("unstack", 48).ids)

    def test_too_long(self) -> None:
        with pytest.raises(PromptTooLongError, match=r"^prompt: has \d+ tokens .* but 48 fit"):
            processor("pi0_aloha").prepare(aloha(prompt="pick up the cup " * 30))
        prompt = processor("pi0_aloha", on_long_prompt="truncate").prepare(aloha(prompt="pick up the cup " * 30)).prompt
        assert (len(prompt.ids), prompt.truncated) == (48, True)
        assert prompt.needed > 48


class TestBuckets:
    @pytest.mark.parametrize(
        ("config", "buckets"),
        [("pi0_aloha", (16, 48)), ("pi0_droid_jointpos_polaris", (16, 48, 100)), ("pi05_libero", (16, 48, 112, 200)), ("pi05_aloha", (48, 112, 200))],
    )
    def test_fit_the_config(self, config: str, buckets: tuple[int, ...]) -> None:
        assert processor(config).buckets == buckets

    @pytest.mark.parametrize("name", CONFIGS)
    def test_every_length_has_the_shortest_that_holds_it(self, name: str) -> None:
        transforms = processor(name)
        for length in range(1, CONFIGS[name].max_token_len + 1):
            bucket = transforms.bucket(length)
            assert bucket >= length
            assert not any(length <= shorter < bucket for shorter in transforms.buckets)


class TestRobotActions:
    def test_absolute_after_unnormalising(self) -> None:
        config = get_config("pi05_droid_jointpos_polaris")
        stats = Stats(*np.array([[0.0] * 8, [1.0] * 8, [-2.0] * 8, [2.0] * 8]))
        transforms = Processor(config, tokenizer(), {"state": stats, "actions": stats}, 32)
        state = np.arange(8.0)
        actions = transforms.robot_actions(np.full((15, 32), 0.5, np.float32), state)
        np.testing.assert_allclose(actions, np.tile([1, 2, 3, 4, 5, 6, 7, 1], (15, 1)), atol=1e-5)
        assert actions.dtype == np.float64
        assert actions.flags.c_contiguous

    @given(st.integers(1, 50), st.sampled_from(sorted(CONFIGS)))
    def test_width(self, horizon: int, name: str) -> None:
        robot = CONFIGS[name].embodiment
        actions = _CACHED[name].robot_actions(np.zeros((horizon, 32), np.float32), np.zeros(robot.state_dim))
        assert actions.shape == (horizon, robot.action_dim)


_CACHED = {name: processor(name) for name in CONFIGS}


def stats(width: int | None) -> Stats | None:
    return None if width is None else Stats(*np.ones((4, width)))


class TestCheckpointFit:
    def make(self, state: Stats | None, actions: Stats | None, action_dim: int = 32) -> Processor:
        found = {key: value for key, value in (("state", state), ("actions", actions)) if value is not None}
        return Processor(get_config("pi0_aloha"), tokenizer(), found, action_dim)

    @pytest.mark.parametrize("width", [14, 20, 32])
    def test_exact_and_padded_widths(self, width: int) -> None:
        assert self.make(stats(width), stats(width)).prepare(aloha()).model_state.shape == (32,)

    def test_a_state_wider_than_the_model_where_only_the_prompt_holds_it(self) -> None:
        made = Processor(get_config("pi05_libero"), tokenizer(), {"state": Stats(*np.ones((4, 8))), "actions": Stats(*np.ones((4, 7)))}, 7)
        prepared = made.prepare(libero())
        assert prepared.model_state.shape == (7,)
        assert made.robot_actions(np.zeros((10, 7), np.float32), prepared.state).shape == (10, 7)

    @pytest.mark.parametrize(
        ("state", "actions", "action_dim", "message"),
        [
            (8, 14, 32, "norm stats of asset 'trossen' have 8 columns for 'state', expected 14 (aloha) to 32 (the model)"),
            (14, 7, 32, "norm stats of asset 'trossen' have 7 columns for 'actions', expected 14 (aloha) to 32 (the model)"),
            (14, 32, 16, "norm stats of asset 'trossen' have 32 columns for 'actions', expected 14 (aloha) to 16 (the model)"),
            (14, 14, 8, "config 'pi0_aloha' needs 14 state columns for aloha, but the checkpoint's model has 8"),
            (None, 14, 32, "norm stats of asset 'trossen' have no 'state' (found: actions); state and actions are needed"),
            (14, None, 32, "norm stats of asset 'trossen' have no 'actions' (found: state); state and actions are needed"),
            (None, None, 32, "norm stats of asset 'trossen' have no 'state' (found: nothing); state and actions are needed"),
        ],
    )
    def test_misfit(self, state: int | None, actions: int | None, action_dim: int, message: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            self.make(stats(state), stats(actions), action_dim)
        assert str(caught.value) == message


def test_prepare_does_not_write_into_the_observation() -> None:
    for config in ("pi0_aloha", "pi05_droid", "pi05_libero"):
        observation = CONFIGS[config].embodiment.example(np.random.default_rng(0))
        arrays = [*observation.get("images", {}).values(), *(value for value in observation.values() if isinstance(value, np.ndarray))]
        before = [array.copy() for array in arrays]
        for array in arrays:
            array.flags.writeable = False
        processor(config).prepare(observation)
        np.testing.assert_equal(arrays, before)


def test_configs_can_be_varied() -> None:
    config = dataclasses.replace(get_config("pi0_aloha"), max_token_len=300)
    assert processor(config, CHECKPOINTS / "pi0_orbax").buckets == (16, 48, 112, 200, 300)
