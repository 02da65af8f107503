"""The example observations are those of openpi's clients and of the demo, and the embodiments take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from action.embodiments import Aloha, Droid, Libero
from demo.robot import Table
from hosting.clients.examples import EMBODIMENTS, Embodiment, embodiment_of, example_observation
from hosting.protocol import msgpack_numpy
from pi0.cameras import camera_images, map_cameras

ROBOTS = {"aloha": Aloha(), "droid": Droid(), "libero": Libero(), "table": Table()}

TWO_CAMERAS = {"image_specs": [{"path": ["base_0_rgb"]}, {"path": ["left_wrist_0_rgb"]}]}
"""Not the table's, although its own is among them."""


@pytest.mark.parametrize("embodiment", EMBODIMENTS)
def test_the_embodiment_takes_its_example_off_the_wire(embodiment: Embodiment) -> None:
    obs = msgpack_numpy.unpack(msgpack_numpy.pack(example_observation(embodiment, np.random.default_rng(0), prompt="tidy")))
    assert obs["prompt"] == "tidy"
    inputs = ROBOTS[embodiment].inputs(obs)
    assert inputs.state.shape == (ROBOTS[embodiment].state_dim,)
    assert set(map_cameras(camera_images(obs))) == set(inputs.images)


@pytest.mark.parametrize("embodiment", EMBODIMENTS)
def test_it_is_told_from_the_servers_metadata(embodiment: Embodiment) -> None:
    metadata = {"image_specs": [spec.as_metadata() for spec in ROBOTS[embodiment].image_specs]}
    assert embodiment_of(msgpack_numpy.unpack(msgpack_numpy.pack(metadata))) == embodiment


@pytest.mark.parametrize("metadata", [{}, {"image_specs": []}, {"image_specs": [{"path": ["images", "head_camera"]}]}, TWO_CAMERAS])
def test_an_unknown_one_is_not_guessed(metadata: dict[str, Any]) -> None:
    assert embodiment_of(metadata) is None


def test_the_same_generator_gives_the_same_observation() -> None:
    first, second, other = (example_observation("droid", np.random.default_rng(seed)) for seed in (1, 1, 2))
    image = "observation/wrist_image_left"
    np.testing.assert_array_equal(first[image], second[image])
    assert (first[image] != other[image]).any()
