"""Tables to train on: drawn independently of each other, not along episodes, and labelled by the scripted rules.

That is enough because the task has no memory: what is to be done follows from what can be seen. What the draw must see to is that the
situations of an episode are all there, often enough; most of all those in which part of an instruction is done already.
:func:`demo.expert.plan` gives the actions that go with the subtasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from demo.expert import targets
from demo.instructions import FAMILIES, NO_GOAL, PICK, PUT, Goal, Instruction, goal_table, next_subtask, random_instruction, say
from demo.world import ABSENT, BIN_CENTRES, BINS, HELD, SPAWN, TABLE, Bools, Codes, Floats, Scenes, lay_out, scatter

_SHARES: Final = {"seq": 0.35, "every": 0.16, "sort": 0.24, "others": 0.25}
"""Of the instructions. The more there is to tell apart in a family, the more of it."""
_FEWEST_NAMED: Final = {1: 0.15, 2: 0.35, 3: 0.5}
"""How many blocks a ``seq`` instruction names at least, and how often; with three it has most to tell apart."""
_BINNED: Final = (0.0, 0.35, 0.70, 0.95)
"""Share of a table's blocks that are in a bin; each table has one of these."""
_HOLDING: Final = 0.375
_DROPPED: Final = 0.15
"""Tables whose blocks lie anywhere in front of the bins, as they do where a gripper was told to do something else on its way."""
_ANYWHERE: Final = np.array([[0.03, 0.30], [0.97, 0.97]])
_GRIPPER_NEAR_BLOCK, _GRIPPER_NEAR_BIN, _NEAR = 0.20, 0.25, 0.05
_CLOSED_EMPTY: Final = 0.08
_AT_TARGET, _AT_TARGET_CLOSED, _CLOSE, _CLOSER = 0.4, 0.35, 0.08, 0.03
"""How many grippers of the action policy's tables are where their subtask leads, as they are after a chunk that went a little wrong, how
many of those that are to pick have closed on nothing there, and how far off they are: half of them this much, half of them less."""

_ON_THE_WAY: Final = 0.65
_NEXT_IS_HELD: Final = 0.6
_LATER_STAYS_TRUE: Final = 0.2
_PUT_IF_HOLDING, _PICK_AGAIN, _PUT_IF_EMPTY = 0.85, 0.5, 0.10


@dataclass(frozen=True)
class Samples:
    """``B`` tables with what was asked and what is to be done now.

    Attributes:
        instructions: ``B`` sentences, in all wordings.
        subtasks: ``[B]`` numbers of :data:`demo.instructions.SUBTASKS`.
    """

    scenes: Scenes
    instructions: list[str]
    subtasks: NDArray[np.intp]


def training_rng(seed: int) -> np.random.Generator:
    """The stream of training draws. No seed leads it to what an episode or a held-out draw sees: an episode with seed ``s`` is drawn from
    ``SeedSequence(s)`` (Gymnasium's rule), training from its child 1, held-out draws from its child 2, and such streams are independent."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))


def held_out_rng(seed: int) -> np.random.Generator:
    """The stream of draws that measure what was learnt; see :func:`training_rng`."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,)))


def for_planner(rng: np.random.Generator, count: int) -> Samples:
    """Tables whose subtask is the next one of their instruction, ``all done`` among them.

    Most are on the way: the first goals hold, as many as may be, and the next block is often in the gripper. The rest are as they come,
    where hardly any instruction is done.
    """
    rims, present, instructions, goals = _tasks(rng, count)
    place = _places(rng, present)
    on_the_way = rng.random(count) < _ON_THE_WAY
    _hold_any(rng, place, ~on_the_way)
    _make_progress(rng, place, goals, on_the_way)
    return Samples(_scenes(rng, rims, place), [say(instruction, rng) for instruction in instructions], next_subtask(place, goals))


def for_action(rng: np.random.Generator, count: int) -> Samples:
    """Tables with any subtask but ``all done``, also ones that are finished or make little sense.

    The instruction is one for this table, but the subtask is not of it: a policy that reads both has to follow the subtask.
    """
    rims, present, instructions, _ = _tasks(rng, count)
    place = _places(rng, present)
    _hold_any(rng, place, np.ones(count, np.bool_))
    held = place == HELD
    holding = held.any(axis=1)
    again = holding & (rng.random(count) < _PICK_AGAIN)
    pick = PICK + np.where(again, held.argmax(axis=1), _any_of(rng, present))
    puts = rng.random(count) < np.where(holding, _PUT_IF_HOLDING, _PUT_IF_EMPTY)
    subtasks = np.where(puts, PUT + rng.integers(len(BINS), size=count), pick)
    scenes = _scenes(rng, rims, place)
    _approach(rng, scenes, subtasks)
    return Samples(scenes, [say(instruction, rng) for instruction in instructions], subtasks)


def _tasks(rng: np.random.Generator, count: int) -> tuple[Codes, Bools, list[Instruction], Codes]:
    """Rims and blocks, with an instruction for each table and its goals."""
    families = rng.choice(len(FAMILIES), size=count, p=[_SHARES[family] for family in FAMILIES])
    fewest = rng.choice(list(_FEWEST_NAMED), size=count, p=list(_FEWEST_NAMED.values()))
    rims, present = lay_out(rng, count, sortable=families == FAMILIES.index("sort"))
    instructions: list[Instruction] = []
    goals: list[tuple[Goal, ...]] = []
    for family, fewest_named, own_rims, own_blocks in zip(families, fewest, rims, present, strict=True):
        instructions.append(random_instruction(rng, FAMILIES[family], own_rims, own_blocks, fewest_named=fewest_named))
        goals.append(instructions[-1].goals(own_rims, own_blocks))
    return rims, present, instructions, goal_table(goals)


def _places(rng: np.random.Generator, present: Bools) -> Codes:
    binned = rng.random(present.shape) < rng.choice(_BINNED, size=(len(present), 1))
    place = np.where(binned, rng.integers(len(BINS), size=present.shape), TABLE).astype(np.int8)
    place[~present] = ABSENT
    return place


def _hold_any(rng: np.random.Generator, place: Codes, where: Bools) -> None:
    rows = np.flatnonzero(where & (rng.random(len(place)) < _HOLDING))
    place[rows, _any_of(rng, place[rows] != ABSENT)] = HELD


def _make_progress(rng: np.random.Generator, place: Codes, goals: Codes, where: Bools) -> None:
    """Where ``where``, the first so many goals hold, the next one's block may be held, and the later ones mostly do not hold."""
    wanted = (goals[..., 0] != NO_GOAL).sum(axis=1)
    hold = rng.integers(wanted + 1)
    undone = rng.random(goals.shape[:2]) >= _LATER_STAYS_TRUE
    next_held = rng.random(len(place)) < _NEXT_IS_HELD
    for turn, (colour, bin_) in enumerate(goals.transpose(1, 2, 0)):
        done, later = where & (turn < hold), where & (turn >= hold) & (turn < wanted)
        place[done, colour[done]] = bin_[done]
        too_early = np.flatnonzero(later & undone[:, turn])
        too_early = too_early[place[too_early, colour[too_early]] == bin_[too_early]]
        place[too_early, colour[too_early]] = TABLE
        held = later & (turn == hold) & next_held
        place[held, colour[held]] = HELD


def _scenes(rng: np.random.Generator, rims: Codes, place: Codes) -> Scenes:
    """The places made a scene: where the loose blocks lie, where the gripper is."""
    count = len(place)
    dropped = (rng.random(count) < _DROPPED)[:, None, None]
    low, high = (np.where(dropped, anywhere, near) for anywhere, near in zip(_ANYWHERE, SPAWN, strict=True))
    scenes = Scenes(scatter(rng, place == TABLE, low, high), place, rims, np.empty((count, 2)), np.empty(count, np.bool_))
    scenes.settle(*np.nonzero(place < TABLE))
    scenes.gripper = _gripper(rng, scenes)
    scenes.closed = scenes.holding | (rng.random(count) < _CLOSED_EMPTY)
    table, colour = np.nonzero(place == HELD)
    scenes.position[table, colour] = scenes.gripper[table]
    return scenes


def _gripper(rng: np.random.Generator, scenes: Scenes) -> Floats:
    """Anywhere, or near a block, or near the middle of a bin: where an episode's gripper is most."""
    count = len(scenes)
    gripper = rng.random((count, 2))
    kind = rng.random(count)
    near_block = kind < _GRIPPER_NEAR_BLOCK
    near_bin = ~near_block & (kind < _GRIPPER_NEAR_BLOCK + _GRIPPER_NEAR_BIN)
    block = scenes.position[np.arange(count), _any_of(rng, scenes.present)]
    spot = np.where(near_block[:, None], block, BIN_CENTRES[rng.integers(len(BINS), size=count)]) + rng.normal(0, _NEAR, (count, 2))
    return np.where((near_block | near_bin)[:, None], np.clip(spot, 0, 1), gripper)


def _approach(rng: np.random.Generator, scenes: Scenes, subtasks: NDArray[np.intp]) -> None:
    """Moves some of the grippers, with what they hold, close to where they are to go; some have closed there and missed."""
    count = len(scenes)
    target, finished = targets(scenes, subtasks)
    there = ~finished & (rng.random(count) < _AT_TARGET)
    off = rng.normal(0, 1, (count, 2)) * rng.choice([_CLOSE, _CLOSER], size=(count, 1))
    scenes.gripper = np.where(there[:, None], np.clip(target + off, 0, 1), scenes.gripper)
    missed = there & ~scenes.holding & (subtasks < PUT)
    scenes.closed = np.where(missed, rng.random(count) < _AT_TARGET_CLOSED, scenes.closed)
    table, colour = np.nonzero(scenes.place == HELD)
    scenes.position[table, colour] = scenes.gripper[table]


def _any_of(rng: np.random.Generator, choices: Bools) -> NDArray[np.intp]:
    """One of the true columns of each row."""
    chosen: NDArray[np.intp] = np.where(choices, rng.random(choices.shape), -1.0).argmax(axis=1)
    return chosen
