"""What the table is told and what that means: instructions in many wordings, their goals, and the subtasks that lead there.

An instruction belongs to one of four families::

    seq      put the red block in the left bin, then the blue block in the right bin
    every    put every block in the left bin
    sort     sort the blocks into the bins of their colour
    others   put the red block in the left bin and the others in the right bin

Its goals, each a block and the bin it belongs in, are taken in their order. The subtask of the moment is about the first goal that does
not hold: pick its block up, or, once that is held, put it in its bin; when all hold, the answer is "all done". That label
(:func:`next_subtask`) is what the scripted expert follows, what the planner is trained on and what it is measured against.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from demo.world import BINS, COLOURS, HELD, Bools, Codes

Family = Literal["seq", "every", "sort", "others"]
FAMILIES: Final[tuple[Family, ...]] = get_args(Family)

PICK: Final = 0
"""Subtasks are numbered: ``PICK`` plus a colour, ``PUT`` plus a bin, ``DONE``; :data:`SUBTASKS` has their texts."""
PUT: Final = len(COLOURS)
DONE: Final = PUT + len(BINS)
ALL_DONE: Final = "all done"
SUBTASKS: Final = (*(f"pick up the {colour} block" for colour in COLOURS), *(f"put it in the {bin_} bin" for bin_ in BINS), ALL_DONE)

NO_GOAL: Final = -1
_LONGEST_SHOWN = 60


class InstructionError(ValueError):
    """A sentence is no instruction for this table. The message is one line and says what would be."""


class Goal(NamedTuple):
    """The block of ``colour`` belongs in ``bin``; both are numbers of :data:`demo.world.COLOURS` and :data:`demo.world.BINS`."""

    colour: int
    bin: int

    @property
    def names(self) -> tuple[str, str]:
        """("red", "left")"""
        return COLOURS[self.colour], BINS[self.bin]


@dataclass(frozen=True)
class Instruction:
    """What is asked, whatever the words.

    Attributes:
        family: which kind.
        named: seq: every block and its bin, in order; others: the one that is named; else empty.
        bin: every: where all go; others: where the others go; else None.
    """

    family: Family
    named: tuple[Goal, ...] = ()
    bin: int | None = None

    def goals(self, rims: Sequence[int], present: Sequence[bool]) -> tuple[Goal, ...]:
        """What has to hold on a table with these ``rims`` (``[3]``) and blocks (``[4]``), in order.

        Raises:
            InstructionError: the table lacks a block or a rim that it takes.
        """
        for colour, _ in self.named:
            if not present[colour]:
                there = " and ".join(COLOURS[other] for other in np.flatnonzero(present))
                raise InstructionError(f"there is no {COLOURS[colour]} block on this table; it has {there}")
        rest = [int(colour) for colour in np.flatnonzero(present) if all(colour != goal.colour for goal in self.named)]
        match self.family:
            case "seq":
                return self.named
            case "every" | "others":
                assert self.bin is not None
                return (*self.named, *(Goal(colour, self.bin) for colour in rest))
            case "sort":
                bins = {int(rim): number for number, rim in enumerate(rims)}
                for colour in rest:
                    if colour not in bins:
                        rimmed = " and ".join(COLOURS[rim] for rim in rims)
                        raise InstructionError(
                            f"no bin has a {COLOURS[colour]} rim, so the {COLOURS[colour]} block cannot be sorted; the rims are {rimmed}"
                        )
                return tuple(Goal(colour, bins[colour]) for colour in rest)


_FIRST_THEN: Final = (
    ("put the {} block in the {} bin", ", then the {} block in the {} bin"),
    ("move the {} block into the {} bin", " and then the {} block into the {} bin"),
    ("place the {} block in the {} bin", ", then place the {} block in the {} bin"),
    ("bring the {} block to the {} bin", ", then bring the {} block to the {} bin"),
    ("put the {} block into the {} bin", ", and then put the {} block into the {} bin"),
    ("place the {} block into the {} bin", " and then move the {} block to the {} bin"),
)
_EVERY: Final = (
    "put every block in the {} bin",
    "put all the blocks in the {} bin",
    "move all blocks into the {} bin",
    "place each block in the {} bin",
    "bring every block to the {} bin",
    "move everything into the {} bin",
)
_SORT: Final = (
    "sort the blocks into the bins of their colour",
    "put every block in the bin of its colour",
    "sort the blocks by color",
    "move each block into the bin of its color",
    "place all blocks in the bins of their color",
    "bring every block to the bin of the same colour",
)
_OTHERS: Final = (
    "put the {} block in the {} bin and the others in the {} bin",
    "move the {} block into the {} bin and the other blocks into the {} bin",
    "place the {} block in the {} bin and the rest in the {} bin",
    "bring the {} block to the {} bin and all the others to the {} bin",
    "put the {} block into the {} bin, then the others into the {} bin",
    "move the {} block to the {} bin and then put the rest in the {} bin",
)
WORDINGS: Final = 6
"""Ways to say each instruction, without capitals and full stops."""


def sentence(instruction: Instruction, wording: int = 0) -> str:
    """``instruction`` in words; ``wording`` is below :data:`WORDINGS`, 0 the plainest."""
    bin_ = "" if instruction.bin is None else BINS[instruction.bin]
    match instruction.family:
        case "seq":
            first, then = _FIRST_THEN[wording]
            return "".join((then if i else first).format(*goal.names) for i, goal in enumerate(instruction.named))
        case "every":
            return _EVERY[wording].format(bin_)
        case "sort":
            return _SORT[wording]
        case "others":
            return _OTHERS[wording].format(*instruction.named[0].names, bin_)


def say(instruction: Instruction, rng: np.random.Generator) -> str:
    """``instruction`` as a person might type it: any wording; now and then a capital, a full stop."""
    text = sentence(instruction, int(rng.integers(WORDINGS)))
    capital, stop = rng.random(2)
    return (text.capitalize() if capital < 0.25 else text) + ("." if stop < 0.25 else "")


def random_instruction(
    rng: np.random.Generator, family: Family, rims: Sequence[int], present: Sequence[bool], *, fewest_named: int = 2
) -> Instruction:
    """An instruction of ``family`` for a table with these rims and blocks; a ``seq`` one names ``fewest_named`` to 3 of them, or all there are."""
    match family:
        case "seq":
            blocks = rng.permutation(np.flatnonzero(present))
            most = min(3, len(blocks))
            count = int(rng.integers(min(fewest_named, most), most + 1))
            bins = rng.integers(len(BINS), size=count)
            return Instruction("seq", tuple(Goal(int(colour), int(bin_)) for colour, bin_ in zip(blocks[:count], bins, strict=True)))
        case "every":
            return Instruction("every", bin=int(rng.integers(len(BINS))))
        case "sort":
            return Instruction("sort")
        case "others":
            named, others = rng.permutation(len(BINS))[:2]
            return Instruction("others", (Goal(int(rng.choice(np.flatnonzero(present))), int(named)),), int(others))


_VERB = r"(?:put|move|place|bring|take)"
_INTO = r"(?:in|into|inside|to)"
_BIN = rf"{_INTO} (?:the )?(?P<bin>{'|'.join(BINS)})(?: bin)?"
_ALL = r"(?:(?:every|each)(?: block)?|all(?: of)?(?: the)? blocks|all of them|everything|the blocks)"
_ONE_STEP = re.compile(rf"(?:first )?(?:{_VERB} )?(?:the )?(?P<colour>{'|'.join(COLOURS)})(?: (?:block|one))? {_BIN}")
_OTHERS_STEP = re.compile(rf"(?:{_VERB} )?(?:all )?(?:the )?(?:others?|(?:other|remaining) (?:blocks?|ones?)|rest(?: of the blocks)?) {_BIN}")
_EVERY_STEP = re.compile(rf"{_VERB} {_ALL} {_BIN}")
_SORT_STEP = re.compile(rf"(?:sort|{_VERB}) {_ALL} (?:by colou?r|{_INTO} (?:the )?bins? (?:of|with) (?:its|their|the same) (?:own )?colou?r)")
_BETWEEN_STEPS = re.compile(r"(?:,? and then|,? then|,? and|,) ")


def parse(text: str) -> Instruction:
    """What a typed sentence asks; capitals, spaces and a final full stop do not matter.

    Raises:
        InstructionError: it is none of the four families; the message shows an example of each.
    """
    said = " ".join(text.lower().replace("_", " ").split()).rstrip(" .!")
    if _SORT_STEP.fullmatch(said):
        return Instruction("sort")
    if every := _EVERY_STEP.fullmatch(said):
        return Instruction("every", bin=BINS.index(every["bin"]))
    *steps, last = _BETWEEN_STEPS.split(said)
    named = [_one_step(step, text) for step in steps]
    others = _OTHERS_STEP.fullmatch(last)
    if others and len(named) == 1:
        return Instruction("others", tuple(named), BINS.index(others["bin"]))
    named.append(_one_step(last, text))
    for colour, _ in named:
        if sum(goal.colour == colour for goal in named) > 1:
            raise InstructionError(f"{_shown(text)}: names the {COLOURS[colour]} block more than once, so not all of it can hold; name a block once")
    return Instruction("seq", tuple(named))


def _one_step(step: str, text: str) -> Goal:
    found = _ONE_STEP.fullmatch(step)
    if not found:
        red, blue = Goal(0, 0), Goal(2, 2)
        examples = (
            Instruction("seq", (red, blue)),
            Instruction("every", bin=red.bin),
            Instruction("sort"),
            Instruction("others", (red,), blue.bin),
        )
        listed = "; ".join(f'"{sentence(example)}"' for example in examples)
        raise InstructionError(f"{_shown(text)}: not an instruction that this table knows; say it like one of these: {listed}")
    return Goal(COLOURS.index(found["colour"]), BINS.index(found["bin"]))


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…")


def goal_table(goals: Sequence[Sequence[Goal]]) -> Codes:
    """The goals of ``B`` tables as one array ``[B, 4, 2]`` of colour and bin, in order, filled up with ``NO_GOAL``."""
    table = np.full((len(goals), len(COLOURS), 2), NO_GOAL, np.int8)
    for row, own in enumerate(goals):
        table[row, : len(own)] = own
    return table


def goals_hold(place: Codes, goals: Codes) -> Bools:
    """``[B, 4]``: which of the ``goals`` hold, a place without a goal among them; ``place`` is that of :class:`demo.world.Scenes`.

    A block counts when it lies released in its bin.
    """
    colour, bin_ = goals[..., 0], goals[..., 1]
    hold: Bools = np.take_along_axis(place, np.maximum(colour, 0).astype(np.intp), axis=1) == bin_
    hold |= colour == NO_GOAL
    return hold


def next_subtask(place: Codes, goals: Codes) -> NDArray[np.intp]:
    """``[B]`` numbers of the subtask that is due: about the first of the ``goals`` that does not hold."""
    hold = goals_hold(place, goals)
    colour, bin_ = goals[np.arange(len(goals)), hold.argmin(axis=1)].T.astype(np.intp)
    held = place[np.arange(len(place)), colour] == HELD
    return np.where(hold.all(axis=1), DONE, np.where(held, PUT + bin_, PICK + colour))
