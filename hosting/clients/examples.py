"""Random observations of the three embodiments that openpi's clients ship with (reference/wire.md §3.4), and of the demo's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np

Embodiment = Literal["aloha", "droid", "libero", "table"]
EMBODIMENTS: tuple[Embodiment, ...] = get_args(Embodiment)


def example_observation(embodiment: Embodiment, rng: np.random.Generator, *, prompt: str = "do something") -> dict[str, Any]:
    """A random observation: 224 × 224 uint8 cameras, a state, ``prompt``."""
    return {**_EXAMPLES[embodiment](rng), "prompt": prompt}


def embodiment_of(metadata: Mapping[str, Any]) -> Embodiment | None:
    """The embodiment whose cameras a server's ``image_specs`` ask for; None when it is none of the known ones."""
    paths = {"/".join(map(str, spec["path"])) for spec in metadata.get("image_specs", [])}
    for embodiment, camera in (("aloha", "images/cam_high"), ("droid", "observation/exterior_image_1_left"), ("libero", "observation/image")):
        if camera in paths:
            return embodiment  # type: ignore[return-value]
    # The table's camera has the model's own name, as those of other robots may: it is told by having no other.
    return "table" if paths == {"base_0_rgb"} else None


def _image(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    return rng.integers(0, 256, shape, np.uint8)


def _aloha(rng: np.random.Generator) -> dict[str, Any]:
    cameras = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
    return {"state": np.ones(14), "images": {camera: _image(rng, (3, 224, 224)) for camera in cameras}}


def _droid(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "observation/exterior_image_1_left": _image(rng, (224, 224, 3)),
        "observation/wrist_image_left": _image(rng, (224, 224, 3)),
        "observation/joint_position": rng.random(7),
        "observation/gripper_position": rng.random(1),
    }


def _libero(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "observation/image": _image(rng, (224, 224, 3)),
        "observation/wrist_image": _image(rng, (224, 224, 3)),
        "observation/state": rng.random(8),
    }


def _table(rng: np.random.Generator) -> dict[str, Any]:
    return {"base_0_rgb": _image(rng, (224, 224, 3)), "state": rng.uniform(-1, 1, 3)}


_EXAMPLES: dict[Embodiment, Callable[[np.random.Generator], dict[str, Any]]] = {
    "aloha": _aloha,
    "droid": _droid,
    "libero": _libero,
    "table": _table,
}
