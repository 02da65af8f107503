"""DROID: a Franka arm with a Robotiq gripper, one exterior and one wrist camera (reference/embodiments.md §4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from action.embodiments.base import Array, ImageSpec, Observation, PolicyInputs, flat_images, random_image, require, vector
from pi0.cameras import DROID_CAMERAS

_DIM = 8
_JOINTS = "observation/joint_position"
_GRIPPER = "observation/gripper_position"


@dataclass(frozen=True)
class Droid:
    """Seven joints and a gripper; whether actions are joint velocities or positions is the checkpoint's affair."""

    name: ClassVar[str] = "droid"
    state_dim: ClassVar[int] = _DIM
    action_dim: ClassVar[int] = _DIM
    image_specs: ClassVar[tuple[ImageSpec, ...]] = tuple(ImageSpec((key,), (224, 224, 3)) for key in DROID_CAMERAS)

    def inputs(self, observation: Observation) -> PolicyInputs:
        """Takes the two cameras, the joints and the gripper (a bare number will do)."""
        joints = vector(require(observation, _JOINTS, "[7] numbers (joint angles)"), _JOINTS, 7, "joint angles")
        gripper = vector(require(observation, _GRIPPER, "[1] numbers (0 open … 1 closed)"), _GRIPPER, 1, "0 open … 1 closed")
        return PolicyInputs(flat_images(observation, DROID_CAMERAS), np.concatenate([joints, gripper]))

    def outputs(self, actions: Array) -> Array:
        """Seven joint columns and the gripper."""
        return actions[..., :_DIM]

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        """Noise images, random joints and gripper."""
        images = {spec.path[-1]: random_image(rng, spec) for spec in self.image_specs}
        return {**images, _JOINTS: rng.random(7), _GRIPPER: rng.random(1), "prompt": "warmup"}
