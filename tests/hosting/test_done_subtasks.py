"""Which subtasks end a task, however they are written."""

from __future__ import annotations

from typing import Any

import pytest

from hosting.done_subtasks import DoneSubtasks, done_rows
from hosting.policy import ConfigError

DONE = DoneSubtasks(["All done.", "nothing left"])


@pytest.mark.parametrize("text", ["all done", "All done.", " ALL DONE\n", "all done .", "\tNothing left. "])
def test_case_outer_whitespace_and_one_full_stop_do_not_count(text: str) -> None:
    assert DONE.says({"text": text}) and DONE.flag({"text": text}) == {"done": True}


@pytest.mark.parametrize("text", ["", ".", "done", "all  done", "all done..", "all done!", "all done, pick up the cup", None, 3])
def test_anything_else_counts(text: Any) -> None:
    assert not DONE.says({"text": text}) and DONE.flag({"text": text}) == {"done": False}


@pytest.mark.parametrize("subtask", [None, "all done", {}])
def test_what_is_no_subtask_says_nothing(subtask: Any) -> None:
    assert not DONE.says(subtask)


def test_without_texts_nothing_is_flagged() -> None:
    none = DoneSubtasks()
    assert not none and DONE and none.flag({"text": "all done"}) == {} and not none.says({"text": ""})


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["all done", " "], "[1] is blank (' '); write what the planner says when nothing is left to do, or leave it out"),
        (["."], "[0] is blank ('.'); write what the planner says when nothing is left to do, or leave it out"),
        (
            ["All done.", "stop", " all DONE"],
            "'All done.' and ' all DONE' are the same, as case, outer spaces and a final full stop do not count; keep one of them",
        ),
    ],
)
def test_mistakes(texts: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        DoneSubtasks(texts)
    assert str(error.value) == problem


@pytest.mark.parametrize(
    ("reply", "rows"),
    [
        ({}, {}),
        ({"subtask": {"text": "go"}}, {}),
        ({"subtask": {"text": "go", "done": False}}, {}),
        ({"subtask": {"text": "all done", "done": True}}, {0: "all done"}),
        ({"subtask": [{"text": "go", "done": False}, None, {"text": "Stop.", "done": True}]}, {2: "Stop."}),
    ],
)
def test_rows_of_a_reply(reply: dict[str, Any], rows: dict[int, str]) -> None:
    assert done_rows(reply) == rows
