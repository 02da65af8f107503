from __future__ import annotations

import logging
import string
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosting.templates import (
    MAX_TEMPLATE_CHARS,
    LiveSettings,
    PromptSettings,
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
