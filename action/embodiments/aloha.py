"""ALOHA: two ViperX arms with grippers, up to three cameras (reference/embodiments.md §3).

The models were trained in the "pi" space of joint signs and gripper angles, not in the space that the ALOHA runtime speaks;
the conversions below are the bridge. Columns: left arm 0–5, left gripper 6, right arm 7–12, right gripper 13.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from action.embodiments.base import Array, ImageSpec, Observation, PolicyInputs, listing, random_image, require, shown, vector
from pi0.cameras import ALOHA_CAMERAS
from pi0.errors import ObservationError
from pi0.images import parse_image

_DIM = 14
_GRIPPERS = (6, 13)
_SIGNS = np.array([1, -1, -1, 1, 1, 1, 1] * 2, np.float64)

# Finger positions of the runtime's normalised gripper (0 closed … 1 open), in metres.
_FINGER_CLOSED, _FINGER_OPEN = 0.01844, 0.05800
# The gripper linkage, in metres, and the angles in radians that the models' own normalisation spans.
_ARM_LENGTH, _HORN_RADIUS = 0.036, 0.022
_ANGLE_LOW, _ANGLE_HIGH = 0.5476, 1.6296
# Gripper joint range of the runtime's commands, in radians.
_JOINT_CLOSED, _JOINT_OPEN = -0.6213, 1.4910

_IGNORED_CAMERA = "cam_low"
_STATE = "left arm 6, left gripper, right arm 6, right gripper"


@dataclass(frozen=True)
class Aloha:
    """The 14-wide bimanual robot.

    Attributes:
        adapt_to_pi: convert states and actions between the runtime's space and the one of the released models.
    """

    adapt_to_pi: bool = True
    name: ClassVar[str] = "aloha"
    state_dim: ClassVar[int] = _DIM
    action_dim: ClassVar[int] = _DIM
    image_specs: ClassVar[tuple[ImageSpec, ...]] = tuple(
        ImageSpec(("images", camera), (3, 224, 224)) for camera in ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
    )

    def inputs(self, observation: Observation) -> PolicyInputs:
        """Takes ``state`` and ``images/cam_high``, and the wrist cameras where they are sent."""
        state = vector(require(observation, "state", f"[{_DIM}] numbers ({_STATE})"), "state", _DIM, _STATE)
        images = require(observation, "images", "a map of camera name to image")
        if not isinstance(images, Mapping):
            raise ObservationError(f"images: got {type(images).__name__}, expected a map of camera name to image")
        for name in images:
            if name not in ALOHA_CAMERAS and name != _IGNORED_CAMERA:
                known = ", ".join((*ALOHA_CAMERAS, _IGNORED_CAMERA))
                raise ObservationError(f"images/{shown(name)}: not a camera of this robot, expected some of {known}")
        if "cam_high" not in images:
            raise ObservationError(f"images/cam_high: missing, expected a camera image [3, height, width]; images has {listing(images)}")
        return PolicyInputs(
            images={camera: parse_image(images[key], f"images/{key}") for key, camera in ALOHA_CAMERAS.items() if key in images},
            state=decode_state(state) if self.adapt_to_pi else state,
        )

    def outputs(self, actions: Array) -> Array:
        """The first 14 columns, in the runtime's space."""
        actions = actions[..., :_DIM]
        return encode_actions(actions) if self.adapt_to_pi else actions

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        """All four cameras, arms at one radian, grippers open."""
        return {
            "state": np.ones(_DIM),
            "images": {spec.path[-1]: random_image(rng, spec) for spec in self.image_specs},
            "prompt": "warmup",
        }


def decode_state(state: Array) -> Array:
    """Runtime state ``[..., 14]`` → pi space: joint signs, and the grippers' finger position as a normalised linkage angle."""
    decoded = _SIGNS * state
    grippers = np.asarray(state, np.float64)[..., _GRIPPERS]
    decoded[..., _GRIPPERS] = _normalize(_linkage_angle(_unnormalize(grippers, _FINGER_CLOSED, _FINGER_OPEN)), _ANGLE_LOW, _ANGLE_HIGH)
    return decoded


def encode_actions(actions: Array) -> Array:
    """Model actions ``[..., 14]`` in pi space → runtime commands. Gripper commands are not clipped to 0…1, as upstream."""
    encoded = _SIGNS * actions
    encoded[..., _GRIPPERS] = _normalize(actions[..., _GRIPPERS] + _ANGLE_LOW, _JOINT_CLOSED, _JOINT_OPEN)
    return encoded


def decode_actions(actions: Array) -> Array:
    """The inverse of :func:`encode_actions`: runtime commands as a policy is trained on them."""
    decoded = _SIGNS * actions
    decoded[..., _GRIPPERS] = _unnormalize(actions[..., _GRIPPERS], _JOINT_CLOSED, _JOINT_OPEN) - _ANGLE_LOW
    return decoded


def _linkage_angle(finger: Array) -> Array:
    """Angle, in radians, of the horn that holds the finger at this position, in metres (law of cosines)."""
    sine: Array = (_HORN_RADIUS**2 + finger**2 - _ARM_LENGTH**2) / (2 * _HORN_RADIUS * finger)
    return np.arcsin(np.clip(sine, -1.0, 1.0))


def _normalize(x: Array, low: float, high: float) -> Array:
    return (x - low) / (high - low)


def _unnormalize(x: Array, low: float, high: float) -> Array:
    return x * (high - low) + low
