"""The demo's robot: a gripper over a table, seen by one camera from above. It comes to the server as any robot from outside would:
``"model_config_name": "demo.robot:PI05_TABLE"`` (docs/your-own-robot.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from action import PolicyConfig
from action.embodiments.base import Array, ImageSpec, Observation, PolicyInputs, flat_images, random_image, require, vector

STATE = "gripper x and y from -1 to 1, then -1 open or 1 closed"
# Observation key → the model's camera. The robot uses the model's own name, so the planner knows the camera too.
CAMERAS = {"base_0_rgb": "base_0_rgb"}


@dataclass(frozen=True)
class Table:
    """Where the gripper is and whether it is closed, in; where it is to be, out."""

    name: ClassVar[str] = "table"
    state_dim: ClassVar[int] = 3
    action_dim: ClassVar[int] = 3
    image_specs: ClassVar[tuple[ImageSpec, ...]] = tuple(ImageSpec((key,), (224, 224, 3)) for key in CAMERAS)

    def inputs(self, observation: Observation) -> PolicyInputs:
        """Takes the camera and the gripper's state."""
        state = vector(require(observation, "state", f"[3] numbers ({STATE})"), "state", 3, STATE)
        return PolicyInputs(flat_images(observation, CAMERAS), state)

    def outputs(self, actions: Array) -> Array:
        """The commands as they are: absolute, in the units of the state."""
        return actions[..., :3]

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        """A noise image, the gripper anywhere."""
        images = {spec.path[-1]: random_image(rng, spec) for spec in self.image_specs}
        return {**images, "state": rng.uniform(-1, 1, 3), "prompt": "warmup"}


PI05_TABLE = PolicyConfig(
    name="pi05_table",
    kind="pi05",
    embodiment=Table(),
    asset_id="table",  # <checkpoint>/assets/table/norm_stats.json
    action_horizon=12,
    max_token_len=200,
    discrete_state_input=True,
)
