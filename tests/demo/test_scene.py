"""The demo's cameras."""

from __future__ import annotations

import numpy as np

from action.embodiments import Aloha
from demo import scene
from pi0.cameras import MODEL_CAMERAS, camera_images, map_cameras


def test_an_observation_is_one_of_an_aloha_robot() -> None:
    obs = scene.observation(0)
    inputs = Aloha().inputs(obs)
    assert set(inputs.images) == set(map_cameras(camera_images(obs))) == set(MODEL_CAMERAS)
    assert all(image.shape == (3, 224, 224) and image.dtype == np.uint8 for image in obs["images"].values())
    assert obs["state"].shape == (14,) and np.abs(obs["state"]).max() <= 1


def test_frames_are_reproducible_and_move() -> None:
    first, again, later = scene.observation(3), scene.observation(3), scene.observation(4)
    for camera in scene.CAMERAS:
        np.testing.assert_array_equal(first["images"][camera], again["images"][camera])
        assert (first["images"][camera] != later["images"][camera]).any()


def test_cameras_see_different_things_and_tasks_take_turns() -> None:
    images = scene.observation(0)["images"]
    assert (images["cam_high"] != images["cam_left_wrist"]).any()
    assert [scene.observation(frame)["prompt"] for frame in (0, 9, 10, 20, 30)] == [scene.TASKS[i] for i in (0, 0, 1, 2, 0)]
