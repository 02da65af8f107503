"""The scripted expert: the chunk of actions that a robot which sees everything would do for a subtask. Vectorised."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from demo.instructions import DONE, PUT
from demo.world import BIN_CENTRES, HELD, Bools, Floats, Scenes

HORIZON: Final = 12
SPEED: Final = 0.06
"""Way per step; a little below what the table allows, so that the gripper is where the expert expects it."""

_OPEN, _CLOSED = -1.0, 1.0


def plan(scenes: Scenes, subtasks: NDArray[np.intp]) -> Floats:
    """The next ``HORIZON`` commands ``[B, 12, 3]`` (2x − 1, 2y − 1, grip) for the ``subtasks`` ``[B]`` (:data:`demo.instructions.SUBTASKS`).

    Straight to the target, one step of waiting there, then the grip switches and all holds still. A gripper that comes to pick with its
    fingers closed, or around another block, opens first. What is finished already (the block is held; nothing is held to be put) is held
    still, and so is "all done". Nothing is remembered between two chunks: a chunk that begins at the target waits one step, then grips.
    """
    is_pick = subtasks < PUT
    target, finished = targets(scenes, subtasks)

    opens_first = (is_pick & ~finished & scenes.closed).astype(np.float64)
    way = target - scenes.gripper
    distance = np.hypot(way[:, 0], way[:, 1])
    step = np.arange(1, HORIZON + 1)
    travelled = np.maximum(step - opens_first[:, None], 0) * SPEED
    share = np.minimum(travelled / np.maximum(distance, 1e-9)[:, None], 1.0)
    position = scenes.gripper[:, None] + share[..., None] * way[:, None]

    arrival = opens_first + np.ceil(distance / SPEED - 1e-9)
    switched = step >= arrival[:, None] + 2
    before = np.where(is_pick, _OPEN, _CLOSED)[:, None]
    grip = np.where(switched, -before, before)
    grip = np.where(finished[:, None], np.where(scenes.closed, _CLOSED, _OPEN)[:, None], grip)
    return np.concatenate([2 * position - 1, grip[..., None]], axis=-1)


def targets(scenes: Scenes, subtasks: NDArray[np.intp]) -> tuple[Floats, Bools]:
    """Where the gripper is to go, ``[B, 2]``, and whether there is nothing left to do, ``[B]``; then that is where it is."""
    rows = np.arange(len(scenes))
    is_pick, is_put = subtasks < PUT, (subtasks >= PUT) & (subtasks < DONE)
    colour = np.where(is_pick, subtasks, 0)
    target = np.where(is_pick[:, None], scenes.position[rows, colour], BIN_CENTRES[np.where(is_put, subtasks - PUT, 0)])
    finished = np.where(is_pick, scenes.place[rows, colour] == HELD, ~(is_put & scenes.holding))
    return np.where(finished[:, None], scenes.gripper, target), finished
