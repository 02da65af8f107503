from __future__ import annotations

import dataclasses
import logging
import re
import string
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosting.settings_file import SettingsFile
from hosting.templates import (
    HISTORY,
    MAX_TEMPLATE_CHARS,
    LiveSettings,
    PromptSettings,
    StaleSettingsError,
    UnknownRevisionError,
    parse_action_prompt_template,
    parse_generation_prompt_format,
    parse_template,
)
from pi0.errors import ConfigError

TASK = frozenset({"task"})
SUBTASK = frozenset({"subtask"})
values = st.text(max_size=40)
braced = st.text(st.sampled_from("{}!:.[]0 tasksubtask\n"), max_size=40)


def escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is blank; write a text with {task}"),
        (" \n", "is blank; write a text with {task}"),
        ("no placeholder", "has no {task}; put it where that text belongs"),
        ("{{task}}", "has no {task}; put it where that text belongs"),
        ("{task", "has a single '{' at character 1; use {task}, and {{ or }} for a literal brace"),
        ("{task} }", "has a single '}' at character 8; use {task}, and {{ or }} for a literal brace"),
        ("a {} {task}", "has a placeholder without a name, '{}', at character 3; use {task}, and {{ or }} for a literal brace"),
        ("{ } {task}", "has a placeholder without a name, '{ }', at character 1; use {task}, and {{ or }} for a literal brace"),
        ("{0}", "has an unknown placeholder '{0}' at character 1; use {task}, and {{ or }} for a literal brace"),
        ("{ task }", "has an unknown placeholder '{ task }' at character 1; use {task}, and {{ or }} for a literal brace"),
        ("{task!r}", "has an unknown placeholder '{task!r}' at character 1; use {task}, and {{ or }} for a literal brace"),
        ("{task:>9}", "has an unknown placeholder '{task:>9}' at character 1; use {task}, and {{ or }} for a literal brace"),
        ("{task.__class__}", "has an unknown placeholder '{task.__class__}' at character 1; use {task}, and {{ or }} for a literal brace"),
        ("{task[0]}", "has an unknown placeholder '{task[0]}' at character 1; use {task}, and {{ or }} for a literal brace"),
        ("{Task}", "has an unknown placeholder '{Task}' at character 1; use {task}, and {{ or }} for a literal brace"),
        ("{task} {subtask}", "has an unknown placeholder '{subtask}' at character 8; use {task}, and {{ or }} for a literal brace"),
        ("{{{task}", None),
        ("{task}" + "x" * 1994, None),
        ("{task}" + "x" * 1995, "has 2001 characters, at most 2000 are allowed; shorten it"),
        ("{" + "x" * 100 + "}", f"has an unknown placeholder '{{{'x' * 38}…' at character 1; use {{task}}, and {{{{ or }}}} for a literal brace"),
        ("{task}\ud83d", "has half a character (a lone surrogate) at character 7; remove it"),
    ],
)
def test_strict(text: str, problem: str | None) -> None:
    if problem is None:
        assert parse_generation_prompt_format(text).text == text
        return
    with pytest.raises(ConfigError) as error:
        parse_generation_prompt_format(text)
    assert str(error.value) == problem


def test_action_template_needs_the_subtask_only() -> None:
    assert parse_action_prompt_template("{subtask}").render(task="a", subtask="b") == "b"
    assert parse_action_prompt_template("{task}. Subtask: {subtask}").render(task="a", subtask="b") == "a. Subtask: b"
    with pytest.raises(ConfigError, match=r"^has no \{subtask\}; put it where that text belongs$"):
        parse_action_prompt_template("{task}")
    with pytest.raises(ConfigError, match=r"use \{task\} and \{subtask\}, and"):
        parse_action_prompt_template("{subtask} {state}")


def test_both_required_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"^has no \{task\} and \{subtask\}; "):
        parse_template("x", TASK | SUBTASK, frozenset())


@given(st.lists(values, min_size=2, max_size=6), values)
def test_literal_text_survives(literals: list[str], task: str) -> None:
    """Any text can be written in a template by doubling its braces, and comes out as it was; so does any value."""
    text = "{task}".join(escaped(literal) for literal in literals)
    assert parse_template(text, TASK, frozenset()).render(task=task) == task.join(literals)


@given(st.one_of(braced, st.text()))
def test_never_anything_but_a_one_line_config_error_and_agrees_with_str_format(text: str) -> None:
    problem = ""
    try:
        template = parse_template(text, frozenset(), TASK | SUBTASK)
    except ConfigError as error:
        problem = str(error)
        template = parse_template("{task}", TASK, SUBTASK)
        text = template.text
    assert len(problem.splitlines()) <= 1
    assert template.render(task="{subtask}", subtask="}{") == text.format(task="{subtask}", subtask="}{")
    assert template.placeholders == {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("given_values", [{}, {"task": "a"}, {"task": "a", "subtask": "b", "state": "c"}])
def test_render_wants_exactly_its_values(given_values: dict[str, str]) -> None:
    with pytest.raises(TypeError, match=r"takes \['subtask', 'task'\]"):
        parse_action_prompt_template("{subtask}").render(**given_values)


class TestLiveSettings:
    def test_revision_grows_with_real_changes_only(self) -> None:
        live = LiveSettings(PromptSettings())
        assert live.current.revision == 1
        assert live.update(max_generation_tokens=20) is live.current
        assert live.update() is live.current
        assert live.current.revision == 1
        changed = live.update(max_generation_tokens=7, action_prompt_template="{subtask}")
        assert changed is live.current
        assert changed == PromptSettings(max_generation_tokens=7, action_prompt_template="{subtask}", revision=2)
        assert changed.action_prompt(task="a", subtask="b") == "b"

    def test_a_failing_update_changes_nothing_and_names_every_problem(self) -> None:
        live = LiveSettings(PromptSettings())
        before = live.current
        with pytest.raises(ConfigError) as error:
            live.update(generation_prompt_format="{x}", action_prompt_template="{subtask} {", max_generation_tokens=257)
        assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
            "generation_prompt_format",
            "action_prompt_template",
            "max_generation_tokens",
        ]
        with pytest.raises(ConfigError):
            live.update(generation_prompt_format="Do {task}", max_generation_tokens=0)
        assert live.current is before

    def test_settings_are_always_valid(self) -> None:
        with pytest.raises(ConfigError, match=r"^action_prompt_template: has no \{subtask\}"):
            PromptSettings(action_prompt_template="{task}")
        with pytest.raises(ConfigError, match=rf"^generation_prompt_format: has \d+ characters, at most {MAX_TEMPLATE_CHARS}"):
            PromptSettings(generation_prompt_format="{task}" * 400)

    def test_every_change_is_logged_with_old_and_new(self, caplog: pytest.LogCaptureFixture) -> None:
        live = LiveSettings(PromptSettings())
        with caplog.at_level(logging.INFO, "hosting.templates"):
            live.update(generation_prompt_format="Do {task}\nnow", max_generation_tokens=20)
        assert caplog.messages == ["prompt settings revision 2: generation_prompt_format changed from 'Task: {task}. Subtask: ' to 'Do {task}\\nnow'"]

    def test_concurrent_updates_lose_nothing(self) -> None:
        live = LiveSettings(PromptSettings())
        start = threading.Barrier(8)

        def edit(worker: int) -> None:
            start.wait()
            for step in range(50):
                live.update(generation_prompt_format=f"{worker}.{step} {{task}}")

        workers = [threading.Thread(target=edit, args=(worker,)) for worker in range(8)]
        for thread in workers:
            thread.start()
        for thread in workers:
            thread.join()
        assert live.current.revision == 1 + 8 * 50


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """``work`` with each number, all at once."""
    start = threading.Barrier(count)

    def begin(number: int) -> None:
        start.wait()
        work(number)

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class TestETag:
    def test_it_names_revision_and_values(self) -> None:
        settings = PromptSettings()
        assert re.fullmatch('"1-[0-9a-f]{8}"', settings.etag)
        assert settings.etag == PromptSettings().etag
        others = [
            PromptSettings(revision=2),
            PromptSettings(max_generation_tokens=21),
            PromptSettings(action_prompt_template="{subtask}"),
            PromptSettings(generation_prompt_format="{task}"),
        ]
        assert len({settings.etag, *(other.etag for other in others)}) == 5

    def test_one_of_the_expected_must_be_in_force(self) -> None:
        live = LiveSettings(PromptSettings())
        first = live.current
        second = live.update(max_generation_tokens=5, expected={"other", first.etag})
        for change in (
            lambda: live.update(max_generation_tokens=6, expected={first.etag}),
            lambda: live.update(expected=frozenset()),
            lambda: live.rollback(1, expected={first.etag}),
        ):
            with pytest.raises(StaleSettingsError, match=r"^revision 2 with the ETag .* is in force") as error:
                change()
            assert error.value.current is second
            assert second.etag in str(error.value)
        assert live.current is second

    def test_from_before_a_restart_it_matches_only_the_same_values(self) -> None:
        before = LiveSettings(PromptSettings())
        seen = before.update(max_generation_tokens=5)
        after = LiveSettings(PromptSettings())
        after.update(max_generation_tokens=6)
        with pytest.raises(StaleSettingsError):
            after.update(max_generation_tokens=7, expected={seen.etag})

    @pytest.mark.parametrize("_", range(20))
    def test_of_two_editors_who_read_the_same_one_wins(self, _: int) -> None:
        live = LiveSettings(PromptSettings())
        read = live.current
        outcomes: dict[int, PromptSettings | StaleSettingsError] = {}

        def edit(editor: int) -> None:
            try:
                outcomes[editor] = live.update(max_generation_tokens=100 + editor, expected={read.etag})
            except StaleSettingsError as error:
                outcomes[editor] = error

        in_threads(2, edit)
        (winner,) = [outcome for outcome in outcomes.values() if isinstance(outcome, PromptSettings)]
        (loser,) = [outcome for outcome in outcomes.values() if isinstance(outcome, StaleSettingsError)]
        assert live.current is winner is loser.current
        assert winner.revision == 2

    def test_increments_with_retries_lose_nothing(self) -> None:
        """The read-modify-write that an ETag is for."""
        live = LiveSettings(PromptSettings(max_generation_tokens=1))

        def increment(_: int) -> None:
            for _ in range(20):
                while True:
                    read = live.current
                    try:
                        live.update(max_generation_tokens=read.max_generation_tokens + 1, expected={read.etag})
                        break
                    except StaleSettingsError:
                        continue

        in_threads(8, increment)
        assert (live.current.max_generation_tokens, live.current.revision) == (161, 161)


class TestHistory:
    def test_entries(self) -> None:
        seconds = iter([0.0, 1.5, 86_400.0])
        live = LiveSettings(PromptSettings(), clock=lambda: next(seconds))
        live.update(max_generation_tokens=5)
        live.rollback(1)
        assert [(entry.settings.revision, entry.settings.max_generation_tokens, entry.changed_at, entry.source) for entry in live.history] == [
            (1, 20, "1970-01-01T00:00:00.000Z", "start"),
            (2, 5, "1970-01-01T00:00:01.500Z", "update"),
            (3, 20, "1970-01-02T00:00:00.000Z", "rollback to 1"),
        ]
        assert live.history[-1].settings is live.current

    def test_it_is_bounded(self) -> None:
        live = LiveSettings(PromptSettings())
        for tokens in range(1, 151):
            live.update(max_generation_tokens=tokens, generation_prompt_format="{task}")
        assert [entry.settings.revision for entry in live.history] == list(range(52, 152))
        assert len(live.history) == HISTORY
        with pytest.raises(UnknownRevisionError, match=r"^revision: 51 is not in the history, which has the last 100; take one of 52, 53,"):
            live.rollback(51)
        assert live.rollback(52).max_generation_tokens == 51

    def test_rollback_restores_every_value(self) -> None:
        first = PromptSettings(generation_prompt_format="a {task}", action_prompt_template="b {subtask}", max_generation_tokens=3)
        live = LiveSettings(first)
        live.update(generation_prompt_format="{task}", action_prompt_template="{subtask}", max_generation_tokens=4)
        assert live.rollback(1) == dataclasses.replace(first, revision=3)
        assert live.current.action_prompt(task="t", subtask="s") == "b s"

    def test_rollback_to_what_is_in_force_changes_nothing(self) -> None:
        live = LiveSettings(PromptSettings())
        live.update(max_generation_tokens=5)
        live.rollback(1)
        assert live.rollback(1) is live.rollback(3) is live.current
        assert live.current.revision == 3

    def test_rollback_is_logged_with_old_and_new(self, caplog: pytest.LogCaptureFixture) -> None:
        live = LiveSettings(PromptSettings())
        live.update(max_generation_tokens=5)
        with caplog.at_level(logging.INFO, "hosting.templates"):
            live.rollback(1)
        assert caplog.messages == ["prompt settings revision 3, rollback to 1: max_generation_tokens changed from 5 to 20"]

    def test_a_failing_change_is_not_in_it(self) -> None:
        live = LiveSettings(PromptSettings())
        with pytest.raises(ConfigError):
            live.update(max_generation_tokens=0)
        with pytest.raises(UnknownRevisionError):
            live.rollback(2)
        assert len(live.history) == 1


def test_reading_does_not_wait_for_a_change_that_waits_for_the_disk(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class SlowFile(SettingsFile):
        def save(self, *args: object) -> None:
            begun.set()
            assert go_on.wait(60)

    live = LiveSettings(PromptSettings(), file=SlowFile(tmp_path / "settings.json"))
    changing = threading.Thread(target=live.update, kwargs={"max_generation_tokens": 5})
    changing.start()
    assert begun.wait(60)
    assert (live.current.max_generation_tokens, len(live.history)) == (20, 1)
    go_on.set()
    changing.join()
    assert (live.current.max_generation_tokens, len(live.history)) == (5, 2)
