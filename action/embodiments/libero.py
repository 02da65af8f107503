"""LIBERO: the simulated Panda of the LIBERO benchmark, one agent and one wrist camera (reference/embodiments.md §5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from action.embodiments.base import Array, ImageSpec, Observation, PolicyInputs, flat_images, random_image, require, vector
from pi0.cameras import LIBERO_CAMERAS

_STATE = "observation/state"
_STATE_DIM = 8
_STATE_MEANING = "end-effector position 3, axis-angle 3, gripper 2"
_ACTION_DIM = 7


@dataclass(frozen=True)
class Libero:
    """End-effector state in, six pose deltas and a gripper command out."""

    name: ClassVar[str] = "libero"
    state_dim: ClassVar[int] = _STATE_DIM
    action_dim: ClassVar[int] = _ACTION_DIM
    image_specs: ClassVar[tuple[ImageSpec, ...]] = tuple(ImageSpec((key,), (224, 224, 3)) for key in LIBERO_CAMERAS)

    def inputs(self, observation: Observation) -> PolicyInputs:
        """Takes the two cameras and the end-effector state."""
        state = require(observation, _STATE, f"[{_STATE_DIM}] numbers ({_STATE_MEANING})")
        return PolicyInputs(flat_images(observation, LIBERO_CAMERAS), vector(state, _STATE, _STATE_DIM, _STATE_MEANING))

    def outputs(self, actions: Array) -> Array:
        """Six pose columns and the gripper."""
        return actions[..., :_ACTION_DIM]

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        """Noise images, random state."""
        images = {spec.path[-1]: random_image(rng, spec) for spec in self.image_specs}
        return {**images, _STATE: rng.random(_STATE_DIM), "prompt": "warmup"}
