"""Wordings and what they mean, goals, and the subtask that is due."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.instructions import (
    DONE,
    FAMILIES,
    PICK,
    PUT,
    SUBTASKS,
    WORDINGS,
    Family,
    Goal,
    Instruction,
    InstructionError,
    goal_table,
    goals_hold,
    next_subtask,
    parse,
    random_instruction,
    say,
    sentence,
)
from demo.world import ABSENT, BINS, COLOURS, HELD, TABLE
from pi0.tokenizer import clean_task

RED, GREEN, BLUE, YELLOW = range(4)
LEFT, MIDDLE, RIGHT = range(3)
RIMS = (BLUE, RED, GREEN)
ALL = (True, True, True, True)

EXAMPLES = {
    "put the red block in the left bin, then the blue block in the right bin": Instruction("seq", (Goal(RED, LEFT), Goal(BLUE, RIGHT))),
    "put every block in the left bin": Instruction("every", bin=LEFT),
    "put all the blocks in the left bin": Instruction("every", bin=LEFT),
    "sort the blocks into the bins of their colour": Instruction("sort"),
    "put every block in the bin of its colour": Instruction("sort"),
    "put the red block in the left bin and the others in the right bin": Instruction("others", (Goal(RED, LEFT),), RIGHT),
}


@st.composite
def instructions(draw: st.DrawFn) -> Instruction:
    family: Family = draw(st.sampled_from(FAMILIES))
    bins = st.integers(0, 2)
    match family:
        case "seq":
            colours = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
            return Instruction("seq", tuple(Goal(colour, draw(bins)) for colour in colours))
        case "every":
            return Instruction("every", bin=draw(bins))
        case "sort":
            return Instruction("sort")
        case "others":
            return Instruction("others", (Goal(draw(st.integers(0, 3)), draw(bins)),), draw(bins))


class TestWords:
    @given(instructions(), st.integers(0, WORDINGS - 1))
    def test_every_wording_means_what_was_meant(self, instruction: Instruction, wording: int) -> None:
        text = sentence(instruction, wording)
        assert parse(text) == instruction
        assert parse(f"  {text.upper()}. ") == instruction
        assert parse(text.replace("color", "colour")) == parse(text.replace("colour", "color")) == instruction

    @pytest.mark.parametrize("family", FAMILIES)
    def test_at_least_five_wordings(self, family: Family) -> None:
        instruction = random_instruction(np.random.default_rng(0), family, RIMS, ALL)
        texts = {sentence(instruction, wording) for wording in range(WORDINGS)}
        assert len(texts) == WORDINGS >= 5
        assert all(text == text.lower() == text.strip() for text in texts)

    def test_the_words_vary(self) -> None:
        said = [
            sentence(random_instruction(np.random.default_rng(seed), family, RIMS, ALL), wording)
            for seed in range(20)
            for family in FAMILIES
            for wording in range(WORDINGS)
        ]
        for words in ("put ", "move ", "place ", "bring ", " into ", "color", "colour", " and then ", ", then "):
            assert any(words in text for text in said), words

    @pytest.mark.parametrize(("text", "meant"), EXAMPLES.items())
    def test_plain_examples(self, text: str, meant: Instruction) -> None:
        assert parse(text) == meant

    @given(instructions(), st.integers(0, 2**32))
    def test_as_a_person_types_it(self, instruction: Instruction, seed: int) -> None:
        text = say(instruction, np.random.default_rng(seed))
        assert parse(text) == instruction
        assert clean_task(text) in {sentence(instruction, wording) for wording in range(WORDINGS)}

    def test_capitals_and_full_stops_come_and_go(self) -> None:
        rng = np.random.default_rng(0)
        texts = [say(Instruction("sort"), rng) for _ in range(200)]
        for share in (np.mean([text[0].isupper() for text in texts]), np.mean([text.endswith(".") for text in texts])):
            assert 0.1 < share < 0.4

    @pytest.mark.parametrize(
        ("text", "meant"),
        [
            ("Red in the left bin, then green to the middle bin!", Instruction("seq", (Goal(RED, LEFT), Goal(GREEN, MIDDLE)))),
            ("take the yellow one to the right bin", Instruction("seq", (Goal(YELLOW, RIGHT),))),
            (
                "put the red block in the left bin, the blue block in the left bin and the green block in the right bin",
                Instruction("seq", (Goal(RED, LEFT), Goal(BLUE, LEFT), Goal(GREEN, RIGHT))),
            ),
            ("Move everything to the\n middle  bin", Instruction("every", bin=MIDDLE)),
            ("sort all blocks into the bins with their own color", Instruction("sort")),
            (
                "put the blue block in the right bin, and the rest of the blocks in the left bin",
                Instruction("others", (Goal(BLUE, RIGHT),), LEFT),
            ),
        ],
    )
    def test_what_people_say_beyond_the_wordings(self, text: str, meant: Instruction) -> None:
        assert parse(text) == meant

    @pytest.mark.parametrize(
        "text",
        ["", "tidy the table", "put the purple block in the left bin", "put the red block in the top bin", "sort the blocks",
         "others in the left bin", "put every block in the left bin and the red block in the right bin", "put the red block", "x" * 5000],
    )  # fmt: skip
    def test_what_is_no_instruction(self, text: str) -> None:
        with pytest.raises(InstructionError) as caught:
            parse(text)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 500
        for example in message.split(": ", 2)[2].split("; "):
            parse(example.strip('"'))
        assert {parse(example.strip('"')).family for example in message.split(": ", 2)[2].split("; ")} == set(FAMILIES)

    def test_a_block_has_one_place(self) -> None:
        with pytest.raises(InstructionError, match="names the red block more than once"):
            parse("put the red block in the left bin, then the red block in the right bin")


class TestGoals:
    @pytest.mark.parametrize(
        ("instruction", "goals"),
        [
            (Instruction("seq", (Goal(BLUE, LEFT), Goal(RED, LEFT))), ((BLUE, LEFT), (RED, LEFT))),
            (Instruction("every", bin=RIGHT), ((RED, RIGHT), (GREEN, RIGHT), (BLUE, RIGHT))),
            (Instruction("sort"), ((RED, MIDDLE), (GREEN, RIGHT), (BLUE, LEFT))),
            (Instruction("others", (Goal(BLUE, LEFT),), RIGHT), ((BLUE, LEFT), (RED, RIGHT), (GREEN, RIGHT))),
        ],
    )
    def test_of_each_family(self, instruction: Instruction, goals: Any) -> None:
        assert instruction.goals(RIMS, (True, True, True, False)) == goals

    def test_a_block_that_is_not_there(self) -> None:
        with pytest.raises(InstructionError) as caught:
            parse("put the yellow block in the left bin").goals(RIMS, (True, False, True, False))
        assert str(caught.value) == "there is no yellow block on this table; it has red and blue"

    def test_a_block_that_cannot_be_sorted(self) -> None:
        with pytest.raises(InstructionError) as caught:
            parse("sort the blocks by colour").goals(RIMS, ALL)
        assert str(caught.value) == "no bin has a yellow rim, so the yellow block cannot be sorted; the rims are blue and red and green"

    def test_names(self) -> None:
        assert Goal(YELLOW, MIDDLE).names == ("yellow", "middle")

    @pytest.mark.parametrize("family", FAMILIES)
    def test_random_ones_can_be_done_and_have_two_to_four_goals(self, family: Family) -> None:
        rng = np.random.default_rng(0)
        counts = set()
        for _ in range(200):
            present = (True, True, bool(rng.integers(2)), family != "sort" and bool(rng.integers(2)))
            instruction = random_instruction(rng, family, (GREEN, RED, BLUE), present)
            goals = instruction.goals((GREEN, RED, BLUE), present)
            assert len({goal.colour for goal in goals}) == len(goals)
            if family == "others":
                assert instruction.named[0].bin != instruction.bin
            counts.add(len(goals))
        assert counts == ({2, 3} if family in ("seq", "sort") else {2, 3, 4})

    def test_training_also_names_a_single_block(self) -> None:
        rng = np.random.default_rng(0)
        counts = {len(random_instruction(rng, "seq", RIMS, ALL, fewest_named=1).named) for _ in range(100)}
        assert counts == {1, 2, 3}


class TestNextSubtask:
    GOALS = goal_table([(Goal(BLUE, LEFT), Goal(RED, RIGHT))])

    @pytest.mark.parametrize(
        ("places", "due", "hold"),
        [
            ({}, PICK + BLUE, 0),
            ({BLUE: HELD}, PUT + LEFT, 0),
            ({BLUE: RIGHT}, PICK + BLUE, 0),
            ({BLUE: LEFT}, PICK + RED, 1),
            ({RED: RIGHT}, PICK + BLUE, 1),
            ({RED: HELD}, PICK + BLUE, 0),
            ({BLUE: LEFT, RED: HELD}, PUT + RIGHT, 1),
            ({BLUE: LEFT, GREEN: HELD}, PICK + RED, 1),
            ({BLUE: LEFT, RED: RIGHT}, DONE, 2),
            ({BLUE: LEFT, RED: RIGHT, GREEN: HELD}, DONE, 2),
            ({BLUE: HELD, RED: RIGHT}, PUT + LEFT, 1),
        ],
    )
    def test_is_about_the_first_goal_that_does_not_hold(self, places: dict[int, int], due: int, hold: int) -> None:
        place = np.full((1, 4), TABLE, np.int8)
        place[0, YELLOW] = ABSENT
        for colour, where in places.items():
            place[0, colour] = where
        assert next_subtask(place, self.GOALS).tolist() == [due]
        assert int(goals_hold(place, self.GOALS)[0, :2].sum()) == hold

    def test_a_batch(self) -> None:
        goals = goal_table([(Goal(RED, LEFT),), (Goal(RED, LEFT), Goal(GREEN, LEFT)), (Goal(YELLOW, MIDDLE),)])
        place = np.array([[LEFT, TABLE, ABSENT, ABSENT], [LEFT, HELD, TABLE, ABSENT], [TABLE, TABLE, TABLE, HELD]], np.int8)
        assert next_subtask(place, goals).tolist() == [DONE, PUT + LEFT, PUT + MIDDLE]

    def test_texts(self) -> None:
        assert SUBTASKS == (
            "pick up the red block", "pick up the green block", "pick up the blue block", "pick up the yellow block",
            "put it in the left bin", "put it in the middle bin", "put it in the right bin", "all done",
        )  # fmt: skip
        assert [SUBTASKS[PICK + COLOURS.index("blue")], SUBTASKS[PUT + BINS.index("middle")], SUBTASKS[DONE]] == [
            "pick up the blue block", "put it in the middle bin", "all done",
        ]  # fmt: skip
