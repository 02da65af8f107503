"""Which client key is which camera of the model, for every embodiment (reference/model.md §13.2, embodiments.md §3–6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pi0.errors import ObservationError

MODEL_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""The model's cameras, in the order of its image tokens."""

ALOHA_CAMERAS = {"cam_high": "base_0_rgb", "cam_left_wrist": "left_wrist_0_rgb", "cam_right_wrist": "right_wrist_0_rgb"}
DROID_CAMERAS = {"observation/exterior_image_1_left": "base_0_rgb", "observation/wrist_image_left": "left_wrist_0_rgb"}
LIBERO_CAMERAS = {"observation/image": "base_0_rgb", "observation/wrist_image": "left_wrist_0_rgb"}
GALAXEA_R1_CAMERAS = {"head_camera": "base_0_rgb", "left_wrist_camera": "left_wrist_0_rgb", "right_wrist_camera": "right_wrist_0_rgb"}

CLIENT_CAMERAS: dict[str, str] = {
    **{name: name for name in MODEL_CAMERAS},
    **ALOHA_CAMERAS,
    **DROID_CAMERAS,
    **LIBERO_CAMERAS,
    **GALAXEA_R1_CAMERAS,
}
"""Client key → model camera."""

_SHOWN_KEYS, _SHOWN_CHARS = 8, 60
"""How much of a stranger's map an error message repeats."""


def camera_images(observation: Mapping[str, Any]) -> dict[str, Any]:
    """The images of a raw observation by client key: ``images/…`` entries that are not null, else flat ``observation/…image…`` keys."""
    nested = observation.get("images")
    if nested is not None:
        if not isinstance(nested, Mapping):
            raise ObservationError(f"images: expected a map of camera name to image, got {type(nested).__name__}")
        return {str(key): image for key, image in nested.items() if image is not None}
    return {
        key: image
        for key, image in observation.items()
        if isinstance(key, str) and image is not None and (key in CLIENT_CAMERAS or (key.startswith("observation/") and "image" in key))
    }


def map_cameras(images: Mapping[str, Any]) -> dict[str, Any]:
    """Client key → image becomes model camera → image; keys that are no camera of the model (``cam_low``, a second exterior one) are left out.

    Raises:
        ObservationError: no key is known (names what was found), or two keys are the same model camera.
    """
    mapped: dict[str, Any] = {}
    source: dict[str, str] = {}
    for key, image in images.items():
        camera = CLIENT_CAMERAS.get(key)
        if camera is None:
            continue
        if camera in mapped:
            raise ObservationError(f"{key}: camera {camera} was already given as {source[camera]}; send one of them")
        mapped[camera], source[camera] = image, key
    if not mapped:
        names = sorted(map(str, images))
        found = ", ".join(name[:_SHOWN_CHARS] for name in names[:_SHOWN_KEYS]) or "none"
        found += f" and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
        raise ObservationError(f"no known camera among the images (found: {found}); expected at least one of: {', '.join(CLIENT_CAMERAS)}")
    return mapped
