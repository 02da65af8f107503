"""Synthetic camera images: coloured blocks on a table that move from frame to frame, seen by three cameras."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
TASKS = ("tidy the table", "put the red block in the left bin", "stack the blocks")

_SIZE = 224
_TABLE = (205, 190, 170)
_BLOCKS = ((200, 50, 50), (60, 150, 70), (60, 90, 190))


def observation(frame: int) -> dict[str, Any]:
    """What a bimanual ALOHA robot would send at ``frame``: three CHW uint8 cameras, 14 joint positions, a task."""
    phase = frame / 15.0
    return {
        "images": {camera: np.moveaxis(_render(phase + i), -1, 0) for i, camera in enumerate(CAMERAS)},
        "state": 0.5 + 0.4 * np.sin(phase + np.arange(14)),
        "prompt": TASKS[frame // 10 % len(TASKS)],
    }


def _render(phase: float) -> NDArray[np.uint8]:
    image = np.full((_SIZE, _SIZE, 3), _TABLE, np.uint8)
    for i, colour in enumerate(_BLOCKS):
        x = int(90 + 60 * np.sin(phase + 2.1 * i))
        y = int(90 + 60 * np.cos(0.7 * phase + 1.3 * i))
        image[y : y + 28, x : x + 28] = colour
    return image
