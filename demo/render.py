"""The table as its camera sees it: a batch of pictures at any size, NumPy only.

Everything is an axis-aligned rectangle, painted over what is below it in proportion to how much of each pixel it covers. So edges are
smooth, an object that moves by a fraction of a pixel changes the picture, and a small picture is the average of a large one (up to pixels
that several edges cross). Each rectangle touches only the window of pixels around it.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from demo.world import BIN_CENTRES, BIN_HALF, BINS, BLOCK_HALF, COLOURS, HELD, TABLE, Floats, Scenes

SIZE: Final = 224

Pictures = NDArray[np.uint8]
Rows = NDArray[np.intp]

_BARE = np.array([237, 230, 214], np.float32)
_INSIDE = np.array([252, 250, 247], np.float32)
_GRIPPER = np.array([51, 51, 61], np.float32)
_PAINT = np.array([[217, 46, 38], [38, 158, 51], [38, 77, 224], [242, 204, 26]], np.float32)
"""By colour: red, green, blue, yellow."""

_RIM = 0.022
_HELD_LARGER = 1.12
"""A held block is nearer to the camera."""
_FINGER_HALF = np.array([0.013, 0.05])
_BRIDGE = -0.062, 0.013
"""Centre above that of the gripper, and half its height."""
_APART_OPEN, _APART_HOLDING, _APART_EMPTY = 0.092, 0.066, 0.022
"""Distance of each finger from the gripper's centre; three distances, because they are how a model sees whether anything is held."""
_REACH = 0.2
"""How far the windows around what is painted may reach over the edge of the table."""

_RIM_ORDERS: Final = tuple(permutations(range(len(COLOURS)), len(BINS)))
_RIM_ORDER_OF = np.zeros((len(COLOURS),) * len(BINS), np.intp)
_RIM_ORDER_OF[tuple(np.array(_RIM_ORDERS).T)] = np.arange(len(_RIM_ORDERS))


def render(scenes: Scenes, size: int = SIZE) -> Pictures:
    """``[B, size, size, 3]`` uint8, RGB."""
    margin = _margin(size)
    canvas = _bare_tables(size)[_RIM_ORDER_OF[tuple(scenes.rims.T)]]
    for colour in range(len(COLOURS)):
        rows = np.flatnonzero(scenes.place[:, colour] <= TABLE)
        _paint(canvas, size, rows, scenes.position[rows, colour], np.full((len(rows), 2), BLOCK_HALF), _PAINT[colour])
    rows, held = np.nonzero(scenes.place == HELD)
    _paint(canvas, size, rows, scenes.position[rows, held], np.full((len(rows), 2), BLOCK_HALF * _HELD_LARGER), _PAINT[held])
    _paint_gripper(canvas, size, scenes)
    return np.ascontiguousarray(canvas[:, margin : margin + size, margin : margin + size])


def _paint_gripper(canvas: Pictures, size: int, scenes: Scenes) -> None:
    rows = np.arange(len(scenes))
    apart = np.where(scenes.closed, np.where(scenes.holding, _APART_HOLDING, _APART_EMPTY), _APART_OPEN)
    above, bridge_half = _BRIDGE
    for side in (-1, 1):
        finger = scenes.gripper + np.stack([side * apart, np.zeros(len(apart))], axis=1)
        _paint(canvas, size, rows, finger, np.broadcast_to(_FINGER_HALF, finger.shape), _GRIPPER)
    half = np.stack([apart + _FINGER_HALF[0], np.full(len(apart), bridge_half)], axis=1)
    _paint(canvas, size, rows, scenes.gripper + np.array([0.0, above]), half, _GRIPPER)


def _paint(canvas: Pictures, size: int, rows: Rows, centre: Floats, half: Floats, colour: NDArray[np.float32]) -> None:
    """One rectangle on each of the pictures ``rows`` (no picture twice).

    Args:
        canvas: ``[N, size + 2 margin, size + 2 margin, 3]``, of which the inner part is the table.
        centre: ``[n, 2]``, x and y, in table units; ``half``, its half width and height, likewise.
        colour: ``[n, 3]`` or ``[3]``.
    """
    if not len(rows):
        return
    (columns, across), (lines, down) = (_coverage(centre[:, axis], half[:, axis], size) for axis in (0, 1))
    window = (rows[:, None, None], lines[:, :, None], columns[:, None, :])
    below = canvas[window]
    covered = (down[:, :, None] * across[:, None, :])[..., None]
    colour = np.broadcast_to(colour, (len(rows), 3))[:, None, None]
    canvas[window] = np.rint(below + covered * (colour - below)).astype(np.uint8)


def _coverage(centre: Floats, half: Floats, size: int) -> tuple[Rows, NDArray[np.float32]]:
    """Along one axis: the pixels of the canvas ``[n, k]`` that an interval may touch, and the share ``[n, k]`` of each that it covers."""
    low, high = (centre - half) * size, (centre + half) * size
    first = np.floor(low).astype(np.intp)
    pixels = first[:, None] + np.arange(int(np.ceil(2 * half.max() * size)) + 1)
    share = np.minimum(pixels + 1, high[:, None]) - np.maximum(pixels, low[:, None])
    return pixels + _margin(size), np.clip(share, 0, 1).astype(np.float32)


def _margin(size: int) -> int:
    return int(np.ceil(_REACH * size)) + 2


@lru_cache(maxsize=4)
def _bare_tables(size: int) -> Any:
    """The table with its bins and nothing else, for each order of the rims: ``[24, size + 2 margin, size + 2 margin, 3]``."""
    side = size + 2 * _margin(size)
    canvas = np.empty((len(_RIM_ORDERS), side, side, 3), np.uint8)
    canvas[:] = _BARE
    rows, rims = np.arange(len(_RIM_ORDERS)), np.array(_RIM_ORDERS)
    for bin_, centre in enumerate(np.tile(BIN_CENTRES[:, None], (1, len(rows), 1))):
        _paint(canvas, size, rows, centre, np.tile(BIN_HALF, (len(rows), 1)), _PAINT[rims[:, bin_]])
        _paint(canvas, size, rows, centre, np.tile(BIN_HALF - _RIM, (len(rows), 1)), _INSIDE)
    canvas.flags.writeable = False
    return canvas
