"""Golden planner cases and model cases, as the tests of this package read them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0.cameras import MODEL_CAMERAS
from tests.golden_data import GOLDEN

CASES: list[dict[str, Any]] = json.loads((GOLDEN / "planner" / "cases.json").read_text())["cases"]
CASE = {case["name"]: case for case in CASES}
ALL_PIECES = np.arange(1024, dtype=np.int32)


def arrays(name: str, folder: str = "planner") -> dict[str, NDArray[Any]]:
    with np.load(GOLDEN / folder / f"{name}.npz") as stored:
        return {key: stored[key] for key in stored.files}


def images(name: str) -> dict[str, NDArray[Any]]:
    """Images of a planner case by client key."""
    return {key.removeprefix("images/"): value for key, value in arrays(name).items() if key.startswith("images/")}


def model_images(case: dict[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Images ``[B, 3, 224, 224, 3]`` in [-1, 1] and masks ``[B, 3]`` of a model case (reference/model.md §5.1)."""
    stacked = np.stack([case[f"image/{camera}"] for camera in MODEL_CAMERAS], axis=1).astype(np.float32)
    return stacked / np.float32(255) * 2 - 1, np.stack([case[f"image_mask/{camera}"] for camera in MODEL_CAMERAS], axis=1)
