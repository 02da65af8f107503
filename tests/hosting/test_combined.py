"""Combined mode with stub policies: what runs in each mode, and what a planner's failure does."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from hosting.combined import CombinedPolicy
from hosting.policy import (
    ConfigError,
    DrainingError,
    ModeError,
    ObservationError,
    OverloadedError,
    PlannerError,
    PlannerPolicy,
    Policy,
    PromptTooLongError,
    Reply,
)
from hosting.templates import LiveSettings, PromptSettings

OBS: dict[str, Any] = {"prompt": "tidy", "state": np.zeros(3)}


class Action:
    """Remembers what it was asked."""

    def __init__(self, default_prompt: str | None = None) -> None:
        self.metadata = {"action_horizon": 2}
        self.default_prompt = default_prompt
        self.asked: list[tuple[Mapping[str, Any], dict[str, Any]]] = []

    def infer(self, obs: Mapping[str, Any], /, **sampling: Any) -> Reply:
        self.asked.append((obs, sampling))
        return {"actions": np.zeros((2, 3)), "policy_timing": {"infer_ms": 1.0}}

    @property
    def prompt(self) -> str:
        """The only prompt it was asked."""
        ((obs, _),) = self.asked
        prompt: str = obs["prompt"]
        return prompt


class Planner:
    """Says ``text``, or raises."""

    def __init__(self, text: str = "pick up", error: Exception | None = None) -> None:
        self.metadata: dict[str, Any] = {}
        self.text, self.error = text, error
        self.asked: list[tuple[Mapping[str, Any], dict[str, Any]]] = []

    def infer(self, obs: Mapping[str, Any], /, **settings: Any) -> Reply:
        self.asked.append((obs, settings))
        if self.error is not None:
            raise self.error
        return {"subtask": {"text": self.text, "ms": 3.0}}


def test_the_stubs_and_the_combination_are_policies() -> None:
    combined = CombinedPolicy(Planner(), Action())
    assert isinstance(Planner(), PlannerPolicy) and isinstance(combined, Policy)
    assert combined.metadata == {"action_horizon": 2}


@pytest.mark.parametrize("mode", [None, "", "default"])
def test_default_rewrites_the_prompt_and_adds_the_subtask(mode: str | None) -> None:
    action, planner = Action(), Planner()
    obs = {**OBS, "mode": mode}
    reply = CombinedPolicy(planner, action).infer(obs, seed=5)
    assert list(reply) == ["actions", "policy_timing", "subtask"] and reply["subtask"] == {"text": "pick up", "ms": 3.0}
    ((acted, sampling),), ((planned, settings),) = action.asked, planner.asked
    assert acted == {"prompt": "tidy. Subtask: pick up", "state": OBS["state"]} and sampling == {"seed": 5}
    assert planned == {"prompt": "tidy", "state": OBS["state"]} and settings == {}
    assert obs == {**OBS, "mode": mode}


def test_subtask_only_never_reaches_the_action_policy() -> None:
    action = Action()
    assert CombinedPolicy(Planner(), action).infer({**OBS, "mode": "subtask_only"}) == {"subtask": {"text": "pick up", "ms": 3.0}}
    assert action.asked == []


def test_action_only_sends_the_observation_as_it_is_and_never_reaches_the_planner() -> None:
    action, planner = Action(), Planner()
    reply = CombinedPolicy(planner, action).infer({"state": 1, "mode": "action_only"}, noise=0)
    assert "subtask" not in reply and planner.asked == []
    assert action.asked == [({"state": 1}, {"noise": 0})]


def test_an_unknown_mode_reaches_nobody() -> None:
    action, planner = Action(), Planner()
    with pytest.raises(ModeError, match=r"^mode: got 'plan', expected one of default, subtask_only, action_only$"):
        CombinedPolicy(planner, action).infer({**OBS, "mode": "plan"})
    assert action.asked == planner.asked == []


def test_an_empty_subtask_leaves_the_prompt_as_it_was() -> None:
    action = Action()
    reply = CombinedPolicy(Planner(""), action, action_prompt_template="{subtask}").infer(OBS)
    assert action.prompt == "tidy" and reply["subtask"] == {"text": "", "ms": 3.0}


def test_braces_in_task_and_subtask_mean_nothing() -> None:
    action = Action()
    CombinedPolicy(Planner("{task}"), action, action_prompt_template="{task}|{subtask}|{{}}").infer({"prompt": "{subtask}"})
    assert action.prompt == "{subtask}|{task}|{}"


@pytest.mark.parametrize("prompt", ["tidy", b"tidy", np.array("tidy"), np.str_("tidy")])
def test_every_spelling_of_the_task(prompt: Any) -> None:
    action, planner = Action(), Planner()
    CombinedPolicy(planner, action).infer({"prompt": prompt})
    assert planner.asked[0][0]["prompt"] == "tidy" and action.prompt == "tidy. Subtask: pick up"


def test_the_planner_gets_the_action_policys_default_prompt() -> None:
    action, planner = Action(default_prompt="fold the towel"), Planner()
    CombinedPolicy(planner, action).infer({"state": 1})
    assert planner.asked[0][0]["prompt"] == "fold the towel" and action.prompt == "fold the towel. Subtask: pick up"


def test_without_a_prompt_nobody_is_asked() -> None:
    action, planner = Action(), Planner()
    with pytest.raises(ObservationError, match=r"^prompt: missing, and there is no default; "):
        CombinedPolicy(planner, action).infer({"state": 1})
    assert action.asked == planner.asked == []


def test_use_task_acts_on_the_task_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    action = Action()
    with caplog.at_level(logging.ERROR):
        reply = CombinedPolicy(Planner(error=PlannerError("secret")), action).infer(OBS)
    assert action.prompt == "tidy" and list(reply) == ["actions", "policy_timing", "subtask"]
    subtask = reply["subtask"]
    assert set(subtask) == {"text", "ms", "error"} and subtask["text"] == "" and subtask["ms"] >= 0
    (record,) = caplog.records
    assert record.exc_info and record.exc_info[0] is PlannerError
    error_id = subtask["error"].split()[2].rstrip(":")
    assert error_id in record.getMessage() and "secret" not in subtask["error"]


@pytest.mark.parametrize(("mode", "on_failure"), [("subtask_only", "use_task"), ("subtask_only", "fail"), ("default", "fail")])
def test_where_a_planner_failure_fails_the_request(mode: str, on_failure: Any) -> None:
    action = Action()
    with pytest.raises(PlannerError):
        CombinedPolicy(Planner(error=PlannerError("broken")), action, on_failure=on_failure).infer({**OBS, "mode": mode})
    assert action.asked == []


@pytest.mark.parametrize(
    "error", [PromptTooLongError("prompt: too long"), ObservationError("images: none"), OverloadedError("busy"), DrainingError("bye")]
)
@pytest.mark.parametrize("on_failure", ["use_task", "fail"])
def test_a_wrong_request_and_a_busy_planner_are_no_planner_failures(error: Exception, on_failure: Any) -> None:
    action = Action()
    with pytest.raises(type(error)):
        CombinedPolicy(Planner(error=error), action, on_failure=on_failure).infer(OBS)
    assert action.asked == []


def test_a_failing_action_policy_fails_the_request() -> None:
    class Broken(Action):
        def infer(self, obs: Mapping[str, Any], /, **sampling: Any) -> Reply:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        CombinedPolicy(Planner(), Broken()).infer(OBS)


def test_live_settings_take_the_place_of_the_template_and_reach_the_planner() -> None:
    action, planner = Action(), Planner()
    live = LiveSettings(PromptSettings(generation_prompt_format="Do {task}", action_prompt_template="Now {subtask}", max_generation_tokens=4))
    CombinedPolicy(planner, action, action_prompt_template="never {subtask}", live=live).infer(OBS)
    assert planner.asked[0][1] == {"generation_prompt_format": "Do {task}", "max_generation_tokens": 4}
    assert action.prompt == "Now pick up"


def test_a_change_between_planner_and_action_is_for_the_next_request() -> None:
    """A reply never mixes two revisions of a template."""
    action, planner = Action(), Planner()
    live = LiveSettings(PromptSettings(action_prompt_template="old {subtask}"))
    combined = CombinedPolicy(planner, action, live=live)
    steps = combined.steps(OBS)
    planned = next(steps).call()
    live.update(action_prompt_template="new {subtask}", generation_prompt_format="new {task}", max_generation_tokens=1)
    steps.send(planned).call()
    assert action.prompt == "old pick up"
    assert planner.asked[0][1] == {"generation_prompt_format": "Task: {task}. Subtask: ", "max_generation_tokens": 20}
    action.asked.clear()
    combined.infer(OBS)
    assert action.prompt == "new pick up"
    assert planner.asked[1][1] == {"generation_prompt_format": "new {task}", "max_generation_tokens": 1}


def test_a_wrong_template_is_refused_when_it_is_set() -> None:
    with pytest.raises(ConfigError, match=r"^has no \{subtask\}; put it where that text belongs$"):
        CombinedPolicy(Planner(), Action(), action_prompt_template="{task}")
