"""The demo's simulated table: a gripper that is told where to be, seen by one camera from the top."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from action.embodiments.base import Array, ImageSpec, Observation, PolicyInputs, flat_images, random_image, require, vector

_DIM = 3
_STATE = "gripper x and y from -1 to 1, then -1 open or 1 closed"
# The model's own name for its first camera, so that the planner knows it too.
_CAMERAS = {"base_0_rgb": "base_0_rgb"}


@dataclass(frozen=True)
class Table:
    """Where the gripper is and whether it is closed, in; where it is to be, out."""

    name: ClassVar[str] = "table"
    state_dim: ClassVar[int] = _DIM
    action_dim: ClassVar[int] = _DIM
    image_specs: ClassVar[tuple[ImageSpec, ...]] = tuple(ImageSpec((key,), (224, 224, 3)) for key in _CAMERAS)

    def inputs(self, observation: Observation) -> PolicyInputs:
        """Takes the camera and the gripper's state."""
        state = vector(require(observation, "state", f"[{_DIM}] numbers ({_STATE})"), "state", _DIM, _STATE)
        return PolicyInputs(flat_images(observation, _CAMERAS), state)

    def outputs(self, actions: Array) -> Array:
        """The commands as they are: absolute, in the units of the state."""
        return actions[..., :_DIM]

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        """A noise image, the gripper anywhere."""
        images = {spec.path[-1]: random_image(rng, spec) for spec in self.image_specs}
        return {**images, "state": rng.uniform(-1, 1, _DIM), "prompt": "warmup"}
