"""The simulated table: what lies where, and what one step of the gripper does to it. A batch of tables at a time, NumPy only.

The table is the unit square seen from the top, x to the right and y down. Blocks, at most one of each colour, lie on it, in one of three
rimmed bins along its far edge, or in the gripper. The gripper moves straight to where it is told, at most ``MAX_STEP`` per step, and
picks or drops a block when it is told to close or to open. Nothing here knows of instructions, models or pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Codes = NDArray[np.int8]
Bools = NDArray[np.bool_]

COLOURS: Final = ("red", "green", "blue", "yellow")
BINS: Final = ("left", "middle", "right")

TABLE: Final = 3
"""Where a block is: 0, 1 or 2, its bin, or one of the three below."""
HELD: Final = 4
ABSENT: Final = 5

BLOCK_HALF: Final = 0.048
BIN_HALF: Final = np.array([0.14, 0.13])
BIN_CENTRES: Final = np.array([[0.18, 0.16], [0.50, 0.16], [0.82, 0.16]])
SLOTS: Final = np.array([[-0.057, -0.053], [0.057, -0.053], [-0.057, 0.053], [0.057, 0.053]])
"""Where a released block of each colour snaps to, from the centre of its bin, so that blocks in one bin never hide each other."""

MAX_STEP: Final = 0.07
GRASP_RADIUS: Final = 0.07
SPACING: Final = 0.15
"""Distance that the centres of blocks have from each other when they are laid out."""
SPAWN: Final = np.array([[0.07, 0.40], [0.93, 0.93]])
"""The corners of where blocks are laid out."""
GRIPPER_START: Final = np.array([[0.20, 0.32], [0.80, 0.60]])
IN_BIN_AT_START: Final = 0.12

_FEWEST, _MOST = 2, 4


@dataclass
class Scenes:
    """``B`` tables.

    Attributes:
        position: ``[B, 4, 2]``, the centre of each colour's block; means nothing where the block is absent.
        place: ``[B, 4]``, where each colour's block is: 0, 1, 2 (a bin), ``TABLE``, ``HELD`` or ``ABSENT``.
        rims: ``[B, 3]``, the colour of each bin's rim.
        gripper: ``[B, 2]``.
        closed: ``[B]``.
    """

    position: Floats
    place: Codes
    rims: Codes
    gripper: Floats
    closed: Bools

    def __len__(self) -> int:
        return len(self.place)

    @property
    def present(self) -> Bools:
        """``[B, 4]``: which blocks there are."""
        there: Bools = self.place != ABSENT
        return there

    @property
    def holding(self) -> Bools:
        """``[B]``: whether the gripper holds a block."""
        holds: Bools = (self.place == HELD).any(axis=1)
        return holds

    @property
    def state(self) -> Floats:
        """``[B, 3]``, what the robot knows of itself: 2x − 1, 2y − 1, and 1 closed or −1 open."""
        return np.concatenate([2 * self.gripper - 1, np.where(self.closed, 1.0, -1.0)[:, None]], axis=1)

    def take(self, rows: Bools | NDArray[np.intp]) -> Scenes:
        """A copy of some of the tables."""
        return Scenes(self.position[rows], self.place[rows], self.rims[rows], self.gripper[rows], self.closed[rows])

    def advance(self, commands: Floats) -> None:
        """One step of every table, in place.

        Args:
            commands: ``[B, 3]``, in the units of :attr:`state`: where to go, and closed (above 0) or open. Values beyond [−1, 1] are cut.
        """
        way = (np.clip(commands[:, :2], -1.0, 1.0) + 1) / 2 - self.gripper
        distance = np.hypot(way[:, 0], way[:, 1])
        self.gripper = self.gripper + way * (MAX_STEP / np.maximum(distance, MAX_STEP))[:, None]
        close = commands[:, 2] > 0
        self._drop(np.flatnonzero(self.closed & ~close))
        self._pick(np.flatnonzero(close & ~self.closed))
        self.closed = close
        table, colour = np.nonzero(self.place == HELD)
        self.position[table, colour] = self.gripper[table]

    def _pick(self, tables: NDArray[np.intp]) -> None:
        away = np.linalg.norm(self.position[tables] - self.gripper[tables, None], axis=-1)
        away[~self.present[tables]] = np.inf
        nearest = away.argmin(axis=1)
        near = away[np.arange(len(tables)), nearest] < GRASP_RADIUS
        self.place[tables[near], nearest[near]] = HELD

    def _drop(self, tables: NDArray[np.intp]) -> None:
        row, colour = np.nonzero(self.place[tables] == HELD)
        table = tables[row]
        inside = (np.abs(self.gripper[table, None] - BIN_CENTRES) <= BIN_HALF).all(axis=-1)
        binned = inside.any(axis=1)
        self.place[table, colour] = np.where(binned, inside.argmax(axis=1), TABLE)
        self.position[table, colour] = self.gripper[table]
        self.settle(table[binned], colour[binned])

    def settle(self, table: NDArray[np.intp], colour: NDArray[np.intp]) -> None:
        """Snap these blocks to their slots in the bins that they are in."""
        self.position[table, colour] = BIN_CENTRES[self.place[table, colour]] + SLOTS[colour]


def lay_out(rng: np.random.Generator, count: int, *, sortable: Bools | None = None, needed: Bools | None = None) -> tuple[Codes, Bools]:
    """Which rims and blocks ``count`` tables have: three rims of different colours, two to four blocks.

    Args:
        sortable: ``[count]``; there, every block has a rim of its colour.
        needed: ``[count, 4]``, blocks that are there in any case.

    Returns:
        ``rims`` ``[count, 3]`` and ``present`` ``[count, 4]``.
    """
    sortable = np.zeros(count, np.bool_) if sortable is None else sortable
    needed = np.zeros((count, len(COLOURS)), np.bool_) if needed is None else needed
    order = rng.random((count, len(COLOURS))).argsort(axis=1)
    rims, rimless = order[:, : len(BINS)].astype(np.int8), order[:, -1]
    blocks = rng.integers(np.maximum(needed.sum(axis=1), _FEWEST), np.where(sortable, len(BINS), _MOST) + 1)
    # The blocks that are there are those of least rank.
    rank = rng.random((count, len(COLOURS)))
    rank[needed] -= 1
    rank[sortable, rimless[sortable]] += 1
    return rims, rank.argsort(axis=1).argsort(axis=1) < blocks[:, None]


def scatter(rng: np.random.Generator, loose: Bools, low: Floats, high: Floats) -> Floats:
    """Positions ``[B, 4, 2]`` between the corners ``low`` and ``high`` (each broadcastable to that), the ``loose`` ones ``SPACING`` apart."""
    low, high = (np.broadcast_to(corner, (*loose.shape, 2)) for corner in (low, high))
    both = np.tril(loose[:, :, None] & loose[:, None], -1)
    position = rng.uniform(low, high)
    while True:
        apart = np.linalg.norm(position[:, :, None] - position[:, None], axis=-1)
        clashing = (both & (apart <= SPACING)).any(axis=2)  # of two that are too close, the later colour moves
        if not clashing.any():
            return position
        position[clashing] = rng.uniform(low[clashing], high[clashing])


def start(rng: np.random.Generator, rims: Codes, present: Bools) -> Scenes:
    """How episodes begin: blocks spread over the near part of the table, a few in a bin already, the gripper open and empty."""
    place = np.where(rng.random(present.shape) < IN_BIN_AT_START, rng.integers(len(BINS), size=present.shape), TABLE).astype(np.int8)
    place[~present] = ABSENT
    position = scatter(rng, place == TABLE, SPAWN[0], SPAWN[1])
    gripper = rng.uniform(GRIPPER_START[0], GRIPPER_START[1], (len(place), 2))
    scenes = Scenes(position, place, rims, gripper, closed=np.zeros(len(place), np.bool_))
    scenes.settle(*np.nonzero(place < TABLE))
    return scenes
