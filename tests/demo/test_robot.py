"""The demo's robot as the policy sees it, and its way to the server. What holds for every embodiment is in ``tests/action/test_embodiments.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from action.configs import get_config
from demo.robot import PI05_TABLE, Table
from pi0.cameras import camera_images, map_cameras
from pi0.errors import ObservationError


@pytest.fixture
def observation() -> dict[str, Any]:
    return Table().example(np.random.default_rng(0))


def test_one_camera_and_three_numbers(observation: dict[str, Any]) -> None:
    inputs = Table().inputs(observation)
    assert list(inputs.images) == ["base_0_rgb"]
    np.testing.assert_array_equal(inputs.images["base_0_rgb"], observation["base_0_rgb"])
    np.testing.assert_array_equal(inputs.state, observation["state"])


def test_the_planner_sees_the_same_camera(observation: dict[str, Any]) -> None:
    seen = map_cameras(camera_images(observation))
    assert list(seen) == ["base_0_rgb"] and seen["base_0_rgb"] is observation["base_0_rgb"]


def test_actions_are_absolute_and_as_the_model_gives_them() -> None:
    actions = np.random.default_rng(0).normal(size=(12, 32))
    np.testing.assert_array_equal(Table().outputs(actions), actions[:, :3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": None}, "state: got NoneType, expected [3] numbers (gripper x and y from -1 to 1, then -1 open or 1 closed)"),
        ({"state": [0.0, 1.0]}, "state: got shape [2], expected [3] numbers (gripper x and y from -1 to 1, then -1 open or 1 closed)"),
        ({"state": [0.0, np.nan, 1.0]}, "state: the value at index 1 is nan, expected finite numbers"),
        ({"base_0_rgb": "picture"}, "base_0_rgb: expected an image array [height, width, 3], got str"),
    ],
)
def test_wrong_values_are_named(observation: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ObservationError) as caught:
        Table().inputs(observation | change)
    assert str(caught.value) == message


@pytest.mark.parametrize("key", ["state", "base_0_rgb"])
def test_missing_keys_are_named(observation: dict[str, Any], key: str) -> None:
    del observation[key]
    with pytest.raises(ObservationError, match=f"^{key}: missing, expected "):
        Table().inputs(observation)


def test_config() -> None:
    config = get_config("demo.robot:PI05_TABLE")
    assert config is PI05_TABLE and config.embodiment == Table()
    assert (config.kind, config.asset_id, config.action_horizon, config.discrete_state_input) == ("pi05", "table", 12, True)
    assert config.use_quantiles and config.delta_mask is None and config.default_prompt is None
