"""Combined mode with stub policies: what runs in each mode, what a planner's failure does, and, with a session, when the planner is asked.

What a request may be told under any interleaving is ``test_cadence.py``'s.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from hosting.cadence import Cadence
from hosting.calls import Background, Origin, SlotCall, Steps
from hosting.combined import CombinedPolicy
from hosting.observer import Observer, PlannerWork
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
    SupersededError,
)
from hosting.sessions import Session
from hosting.templates import LiveSettings, PromptSettings

OBS: dict[str, Any] = {"prompt": "tidy", "state": np.zeros(3)}

ALONE: dict[str, Any] = {"revision": 1, "source_index": 0, "waited": True, "template_revision": 1}
"""What every subtask says that was planned without a session."""


def still() -> float:
    """Time that does not pass."""
    return 5.0


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
    reply = CombinedPolicy(planner, action, clock=still).infer(obs, seed=5)
    assert list(reply) == ["actions", "policy_timing", "subtask"]
    assert reply["subtask"] == {"text": "pick up", "ms": 3.0, "age_ms": 0.0, **ALONE}
    ((acted, sampling),), ((planned, settings),) = action.asked, planner.asked
    assert acted == {"prompt": "tidy. Subtask: pick up", "state": OBS["state"]} and sampling == {"seed": 5}
    assert planned == {"prompt": "tidy", "state": OBS["state"]} and settings == {}
    assert obs == {**OBS, "mode": mode}


def test_subtask_only_never_reaches_the_action_policy() -> None:
    action = Action()
    reply = CombinedPolicy(Planner(), action, clock=still).infer({**OBS, "mode": "subtask_only"})
    assert reply == {"subtask": {"text": "pick up", "ms": 3.0, "age_ms": 0.0, **ALONE}}
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
    reply = CombinedPolicy(Planner(""), action, action_prompt_template="{subtask}", clock=still).infer(OBS)
    assert action.prompt == "tidy" and reply["subtask"] == {"text": "", "ms": 3.0, "age_ms": 0.0, **ALONE}


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
    assert set(subtask) == {"text", "ms", "age_ms", "error", *ALONE} and subtask["text"] == "" and subtask["ms"] >= 0
    assert {key: subtask[key] for key in ALONE} == {**ALONE, "revision": 0}
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


def test_a_task_is_not_remembered_whatever_its_length() -> None:
    action, planner, robot = Action(), Planner(), Session("a", 0, 0.0, 0.0)
    combined = CombinedPolicy(planner, action)
    assert combined.infer({**OBS, "prompt": "x" * 16384})
    with pytest.raises(PromptTooLongError, match=r"^prompt: has 16385 characters, expected at most 16384; shorten it$"):
        next(combined.steps({**OBS, "prompt": "x" * 16385}, origin=Origin(robot.plan, "a", 0, 0.0)))
    assert len(planner.asked) == 1 and robot.plan._task is None


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


@pytest.mark.parametrize("answer", [{}, {"subtask": "pick up"}, {"subtask": {"ms": 3.0}}, {"subtask": {"text": None}}])
def test_an_answer_that_is_none_is_a_failure_of_the_planner(answer: Reply) -> None:
    class Malformed(Planner):
        def infer(self, obs: Mapping[str, Any], /, **settings: Any) -> Reply:
            return answer

    action = Action()
    assert "error" in CombinedPolicy(Malformed(), action).infer(OBS)["subtask"] and action.prompt == "tidy"
    with pytest.raises(PlannerError, match=r"^the planner's reply has no subtask\.text, expected a string$"):
        CombinedPolicy(Malformed(), action, on_failure="fail").infer(OBS)


@pytest.mark.parametrize("mode", ["default", "subtask_only"])
def test_a_done_subtask_is_flagged_and_never_reaches_the_action_policy(mode: str) -> None:
    action, seen = Action(), Seen()
    combined = CombinedPolicy(Planner("All done."), action, done_subtasks=["all done"], observer=seen, clock=still)
    assert combined.infer({**OBS, "mode": mode}, seed=1) == {"subtask": {"text": "All done.", "ms": 3.0, "done": True, "age_ms": 0.0, **ALONE}}
    assert action.asked == [] and seen.done == 1


def test_any_other_subtask_is_flagged_as_not_done() -> None:
    action, seen = Action(), Seen()
    combined = CombinedPolicy(Planner(), action, done_subtasks=["all done"], observer=seen)
    assert combined.infer(OBS)["subtask"]["done"] is False and combined.infer({**OBS, "mode": "subtask_only"})["subtask"]["done"] is False
    assert len(action.asked) == 1 and seen.done == 0


def test_without_done_subtasks_all_done_is_a_subtask_like_any_other() -> None:
    action = Action()
    reply = CombinedPolicy(Planner("all done"), action).infer(OBS)
    assert "done" not in reply["subtask"] and "actions" in reply and action.prompt == "tidy. Subtask: all done"


@pytest.mark.parametrize("planner", [Planner(error=ZeroDivisionError()), Planner("")])
def test_no_plan_is_never_done(planner: Planner) -> None:
    action = Action()
    reply = CombinedPolicy(planner, action, done_subtasks=["all done"]).infer(OBS)
    assert reply["subtask"]["done"] is False and "actions" in reply and action.prompt == "tidy"


def test_action_only_asks_no_planner_whether_it_is_done() -> None:
    assert "subtask" not in CombinedPolicy(Planner("all done"), Action(), done_subtasks=["all done"]).infer({**OBS, "mode": "action_only"})


def test_a_wrong_done_subtask_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^\[0\] is blank"):
        CombinedPolicy(Planner(), Action(), done_subtasks=[""])


def test_the_planner_may_take_its_time_only() -> None:
    call = next(CombinedPolicy(Planner(), Action(), timeout_s=2.5).steps(OBS))
    assert isinstance(call, SlotCall) and call.slot == "planner" and call.timeout_s == 2.5


class Seen(Observer):
    """What was reported."""

    def __init__(self) -> None:
        self.refreshes: list[str] = []
        self.used: list[tuple[float, bool]] = []
        self.steps: list[int] = []
        self.done = 0

    def subtask_done(self) -> None:
        self.done += 1

    def refreshed(self, outcome: str) -> None:
        self.refreshes.append(outcome)

    def subtask_used(self, age_s: float, *, waited: bool) -> None:
        self.used.append((age_s, waited))

    def planned(self, work: PlannerWork) -> None:
        self.steps.append(work.decode_steps)


class NumberingPlanner(Planner):
    """Its answers are ``step 1``, ``step 2``, …, each in four decode steps."""

    def infer(self, obs: Mapping[str, Any], /, **settings: Any) -> Reply:
        super().infer(obs, **settings)
        return {"subtask": {"text": f"step {len(self.asked)}", "ms": 3.0, "decode_steps": 4}}


class Robot:
    """One session, a clock, and a driver that keeps refreshes under way until the test ends them."""

    def __init__(self, cadence: Cadence | None = None, *, template: str = "{task}: {subtask}", **settings: Any) -> None:
        self.now_s = 50.0
        self.session = Session("a", 0, self.now_s, self.now_s)
        self.planner, self.action, self.seen = NumberingPlanner(), Action(), Seen()
        self.live = LiveSettings(PromptSettings(action_prompt_template=template))
        self.combined = CombinedPolicy(
            self.planner,
            self.action,
            live=self.live,
            cadence=cadence or Cadence("async"),
            clock=lambda: self.now_s,
            observer=self.seen,
            **settings,
        )
        self.beside: list[Background] = []
        self._orders = itertools.count()

    def ask(self, task: str = "tidy", *, mode: str = "default", replan: bool = False) -> Steps:
        """A request that has arrived."""
        index = self.session.next_index()
        origin = Origin(self.session.plan, "a", next(self._orders), self.now_s, index=index, replan=replan)
        return self.combined.steps({"prompt": task, "mode": mode}, origin=origin)

    def finish(self, steps: Steps, *, planner_error: Exception | None = None) -> dict[str, Any]:
        """Drive it to its end; its ``subtask``."""
        try:
            step = next(steps)
            while True:
                if isinstance(step, Background):
                    self.beside.append(step)
                    step = steps.send({})
                elif planner_error is not None and step.slot == "planner":
                    step = steps.throw(planner_error)
                else:
                    step = steps.send(step.call())
        except StopIteration as stop:
            subtask: dict[str, Any] = stop.value["subtask"]
            return subtask

    def infer(self, task: str = "tidy", *, planner_error: Exception | None = None, **kwargs: Any) -> dict[str, Any]:
        return self.finish(self.ask(task, **kwargs), planner_error=planner_error)

    def end(self, outcome: BaseException | None = None) -> None:
        """The oldest refresh under way is begun and ends."""
        background = self.beside.pop(0)
        background.begun()
        background.done(outcome if outcome is not None else background.call.call())

    @property
    def told(self) -> str:
        """The last prompt of the action policy."""
        prompt: str = self.action.asked[-1][0]["prompt"]
        return prompt


def test_the_first_request_waits_and_the_next_acts_at_once() -> None:
    robot = Robot()
    first = robot.infer()
    robot.now_s += 0.1
    second = robot.infer()
    planned = {"text": "step 1", "ms": 3.0, "decode_steps": 4, "revision": 1, "source_index": 0, "template_revision": 1}
    assert first == {**planned, "age_ms": 0.0, "waited": True}
    assert second == {**planned, "age_ms": pytest.approx(100), "waited": False}
    assert len(robot.planner.asked) == 1 and robot.told == "tidy: step 1" and robot.beside == []
    assert robot.seen.used == [(0.0, True), (pytest.approx(0.1), False)] and robot.seen.steps == [4]


def test_a_refresh_runs_beside_the_request_and_serves_the_next() -> None:
    robot = Robot()
    robot.infer()
    robot.now_s += 1.0
    assert robot.infer()["text"] == "step 1" and len(robot.beside) == 1 and len(robot.planner.asked) == 1
    robot.beside[0].begun()
    robot.now_s += 0.5
    assert robot.infer()["text"] == "step 1" and len(robot.beside) == 1
    robot.end()
    robot.now_s += 0.25
    after = robot.infer()
    assert (after["text"], after["revision"], after["source_index"], after["waited"]) == ("step 2", 2, 1, False)
    assert after["age_ms"] == pytest.approx(750) and robot.seen.refreshes == ["ok"] and robot.seen.steps == [4, 4]


def test_a_refresh_that_waits_gives_way_to_a_newer_one() -> None:
    robot = Robot()
    robot.infer()
    robot.now_s += 1.0
    robot.infer()
    robot.infer()
    old = robot.beside.pop(0)
    old.done(SupersededError("superseded"))
    after = robot.infer()
    assert "error" not in after and len(robot.beside) == 2  # the second one still waits, so the third observation takes its place
    robot.beside.pop(0).done(SupersededError("superseded"))
    robot.end()
    after = robot.infer()
    assert (after["text"], after["source_index"]) == ("step 2", 3) and robot.seen.refreshes == ["superseded", "superseded", "ok"]


def test_replan_waits() -> None:
    robot = Robot()
    robot.infer()
    after = robot.infer(replan=True)
    assert (after["text"], after["waited"], after["source_index"]) == ("step 2", True, 1)
    assert robot.infer()["text"] == "step 2"


def test_a_plan_that_is_too_old_is_waited_for() -> None:
    robot = Robot(Cadence("async", max_age_s=3.0))
    robot.infer()
    robot.now_s += 3.0
    assert not robot.infer()["waited"]
    robot.now_s += 0.1
    assert robot.infer()["waited"]


def test_a_new_task_waits_for_its_subtask() -> None:
    robot = Robot()
    robot.infer()
    after = robot.infer("fold")
    assert (after["text"], after["waited"]) == ("step 2", True) and robot.told == "fold: step 2" and "task" not in after


def test_the_old_task_is_kept_whole_until_the_new_ones_subtask_is_there() -> None:
    robot = Robot(Cadence("async", on_task_change="keep"))
    robot.infer()
    kept = robot.infer("fold")
    assert (kept["text"], kept["task"], kept["waited"]) == ("step 1", "tidy", False) and robot.told == "tidy: step 1"
    robot.end()
    after = robot.infer("fold")
    assert after["text"] == "step 2" and "task" not in after and robot.told == "fold: step 2"


def test_a_robot_that_goes_on_asking_when_all_is_done_resumes_when_the_planner_says_something_else() -> None:
    robot = Robot(done_subtasks=["step 2"])
    assert robot.infer()["done"] is False
    robot.now_s += 1.0
    robot.infer()
    robot.end()  # step 2: done
    acted = len(robot.action.asked)
    first, second = robot.infer(), robot.infer()
    assert (first["text"], first["done"], first["waited"], second["done"]) == ("step 2", True, False, True)
    assert len(robot.action.asked) == acted and robot.beside == [], "the interval is not over"
    robot.now_s += 1.0
    assert robot.infer()["done"] is True and len(robot.beside) == 1
    robot.end()
    after = robot.infer()
    assert (after["text"], after["done"]) == ("step 3", False) and robot.told == "tidy: step 3" and robot.seen.done == 3


def test_a_done_plan_stays_done_while_refreshes_fail() -> None:
    robot = Robot(done_subtasks=["step 1"])
    robot.infer()
    robot.now_s += 1.0
    robot.infer()
    robot.end(ZeroDivisionError())
    after = robot.infer()
    assert after["done"] is True and "error" in after and robot.action.asked == []


def test_a_new_task_is_not_done_because_the_old_one_is() -> None:
    robot = Robot(Cadence("async", on_task_change="keep"), done_subtasks=["step 1"])
    assert robot.infer()["done"] is True
    after = robot.infer("fold")
    assert (after["text"], after["done"], after["waited"]) == ("step 2", False, True) and "task" not in after and robot.told == "fold: step 2"


def test_the_old_task_is_kept_where_it_had_no_subtask_to_add() -> None:
    robot = Robot(Cadence("async", on_task_change="keep"))
    robot.combined.planner.infer = lambda obs, **settings: {"subtask": {"text": "", "ms": 1.0}}  # type: ignore[method-assign]
    robot.infer()
    assert robot.infer("fold")["task"] == "tidy" and robot.told == "tidy"


def test_a_plan_of_an_older_task_is_dropped() -> None:
    robot = Robot()
    robot.infer()
    robot.now_s += 1.0
    robot.infer()
    robot.infer("fold")
    robot.end()
    assert robot.infer("fold")["text"] == "step 2" and robot.seen.refreshes == ["stale"]


def test_a_plan_from_before_a_reset_is_dropped() -> None:
    robot = Robot()
    robot.infer()
    robot.now_s += 1.0
    robot.infer()
    waiting = robot.ask(replan=True)
    call = next(waiting)
    assert isinstance(call, SlotCall)
    robot.session.reset()
    robot.end()
    act = waiting.send(call.call())
    assert isinstance(act, SlotCall)
    with pytest.raises(StopIteration) as stop:
        waiting.send(act.call())
    assert stop.value.value["subtask"]["text"] == "step 3"  # planned from its own observation, so it is this request's, but nobody else's
    after = robot.infer()
    assert (after["waited"], after["text"], after["source_index"], after["revision"]) == (True, "step 4", 0, 3)
    assert robot.seen.refreshes == ["stale"]


def test_a_new_template_is_used_at_once_with_the_plan_in_use() -> None:
    robot = Robot()
    robot.infer()
    robot.live.update(action_prompt_template="now {subtask}")
    after = robot.infer()
    assert (after["template_revision"], after["waited"], after["revision"]) == (2, False, 1) and robot.told == "now step 1"
    assert robot.beside == []


def test_new_generation_settings_are_used_from_their_first_plan_on_with_the_template_of_their_revision() -> None:
    robot = Robot()
    robot.infer()
    robot.live.update(action_prompt_template="now {subtask}", generation_prompt_format="Do {task}")
    before = robot.infer()
    assert (before["template_revision"], before["waited"]) == (1, False) and robot.told == "tidy: step 1"
    robot.end()
    after = robot.infer()
    assert (after["template_revision"], after["text"]) == (2, "step 2") and robot.told == "now step 2"
    assert robot.planner.asked[1][1]["generation_prompt_format"] == "Do {task}"


def test_a_failing_refresh_leaves_the_plan_in_use_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    robot = Robot()
    robot.infer()
    robot.now_s += 1.0
    robot.infer()
    with caplog.at_level(logging.ERROR):
        robot.end(PlannerError("secret"))
    robot.now_s += 0.9
    after = robot.infer()
    assert (after["text"], after["revision"], after["waited"]) == ("step 1", 1, False) and robot.told == "tidy: step 1"
    assert after["error"].split()[2].rstrip(":") in caplog.text and "secret" not in after["error"] and robot.beside == []
    robot.now_s += 0.2
    assert "error" in robot.infer()
    robot.end()
    assert "error" not in robot.infer() and robot.seen.refreshes == ["failed", "ok"]


@pytest.mark.parametrize("error", [OverloadedError("overloaded"), ObservationError("images: none")])
def test_a_refresh_that_was_refused_is_told_and_is_no_reason_not_to_wait(error: Exception) -> None:
    robot = Robot()
    robot.infer()
    robot.now_s += 1.0
    robot.infer()
    robot.end(error)
    assert robot.infer()["error"] == str(error)
    changed = robot.infer("sweep")
    assert changed["waited"] and changed["text"] == "step 2" and "error" not in changed


def test_an_answer_that_is_none_is_a_failed_refresh() -> None:
    robot = Robot()
    robot.infer()
    robot.now_s += 1.0
    robot.infer()
    background = robot.beside.pop()
    background.done({"subtask": {}})
    assert "error" in robot.infer() and robot.seen.refreshes == ["failed"]


def test_a_refresh_that_is_cancelled_is_no_failure() -> None:
    robot = Robot()
    robot.infer()
    robot.now_s += 1.0
    robot.infer()
    robot.end(asyncio.CancelledError())
    assert "error" not in robot.infer() and robot.seen.refreshes == []


def test_a_planner_that_fails_a_waiting_request_keeps_the_plan_before() -> None:
    robot = Robot()
    robot.infer()
    failed = robot.infer(replan=True, planner_error=PlannerError("broken"))
    assert (failed["text"], failed["revision"], failed["source_index"], failed["waited"]) == ("", 1, 1, True) and robot.told == "tidy"
    after = robot.infer()
    assert (after["text"], after["error"]) == ("step 1", failed["error"]) and len(robot.seen.used) == 2


def test_a_planner_that_fails_is_waited_for_once_and_then_asked_beside_the_robot_until_it_answers() -> None:
    robot = Robot()
    first = robot.infer(planner_error=PlannerError("broken"))
    assert (first["text"], first["waited"]) == ("", True)
    second = robot.infer()
    assert (second["text"], second["waited"], second["error"], second["revision"]) == ("", False, first["error"], 0) and robot.told == "tidy"
    assert robot.beside == []
    robot.now_s += 1.0
    assert not robot.infer()["waited"]
    robot.end(PlannerError("still broken"))
    robot.now_s += 1.0
    third = robot.infer()
    assert not third["waited"] and third["error"] != first["error"]
    robot.end()
    served = robot.infer()
    assert served["text"] and not served["waited"] and "error" not in served


def test_a_failure_of_long_ago_is_no_reason_to_do_without() -> None:
    robot = Robot()
    robot.infer(planner_error=PlannerError("broken"))
    robot.now_s += 2.5
    served = robot.infer()
    assert served["text"] and served["waited"]


def test_whoever_asks_for_a_plan_or_wants_failures_waits_for_the_planner_that_fails() -> None:
    robot = Robot()
    robot.infer(planner_error=PlannerError("broken"))
    assert robot.infer(replan=True, planner_error=PlannerError("broken"))["waited"]
    strict = Robot(on_failure="fail")
    for _ in range(2):
        with pytest.raises(PlannerError):
            strict.infer(planner_error=PlannerError("broken"))


def test_a_superseded_request_says_nothing_of_the_planner() -> None:
    robot = Robot()
    robot.infer()
    with pytest.raises(SupersededError):
        robot.infer(replan=True, planner_error=SupersededError("superseded"))
    assert "error" not in robot.infer()


def test_subtask_only_plans_for_itself_and_for_those_that_follow() -> None:
    robot = Robot()
    robot.infer()
    alone = robot.infer(mode="subtask_only")
    assert (alone["text"], alone["waited"], alone["source_index"], alone["revision"]) == ("step 2", True, 1, 2)
    after = robot.infer()
    assert (after["text"], after["waited"]) == ("step 2", False) and len(robot.seen.used) == 2


def test_every_request_counts_its_plans_too() -> None:
    robot = Robot(Cadence())
    assert [(reply["text"], reply["revision"], reply["source_index"], reply["waited"]) for reply in (robot.infer(), robot.infer())] == [
        ("step 1", 1, 0, True),
        ("step 2", 2, 1, True),
    ]
    robot.session.reset()
    after = robot.infer()
    assert (after["revision"], after["source_index"]) == (3, 0)


def test_a_plan_is_a_copy_of_the_planners_answer() -> None:
    """The planner may use its map again, and whoever asked the same got the same one."""
    robot = Robot()
    answer: Reply = {"subtask": {"text": "pick up", "ms": 3.0}}
    robot.combined.planner.infer = lambda obs, **settings: answer  # type: ignore[method-assign]
    robot.infer()
    assert answer == {"subtask": {"text": "pick up", "ms": 3.0}}
    answer["subtask"]["text"] = "another"
    assert robot.infer()["text"] == "pick up"


def test_in_process_nothing_is_remembered() -> None:
    planner = NumberingPlanner()
    combined = CombinedPolicy(planner, Action(), cadence=Cadence("async"))
    assert [combined.infer(OBS)["subtask"]["revision"] for _ in range(2)] == [1, 1] and len(planner.asked) == 2


@pytest.mark.parametrize("outcome", ["answer", "failure"])
def test_a_session_keeps_no_observation(outcome: str) -> None:
    class Image(np.ndarray[Any, Any]):
        """An array that can be referred to weakly."""

    robot = Robot()
    robot.planner.asked = _Counter()
    robot.action.asked = _Counter()
    robot.infer()
    robot.now_s += 1.0
    image = np.zeros(3).view(Image)
    alive = weakref.ref(image)
    origin = Origin(robot.session.plan, "a", 10, robot.now_s, index=1)
    robot.finish(robot.combined.steps({"prompt": "tidy", "image": image}, origin=origin))
    del image
    assert alive() is not None  # the planner still has to see it
    gc.disable()
    try:
        robot.end(PlannerError("broken") if outcome == "failure" else None)
        assert alive() is None
    finally:
        gc.enable()


class _Counter(list[Any]):
    """Has had this many entries, and keeps none."""

    def __init__(self) -> None:
        self._count = 0

    def append(self, entry: Any) -> None:
        self._count += 1

    def __len__(self) -> int:
        return self._count


class SurePlanner(Planner):
    """Says what it is given, as surely as that says; notes what it was told to have said before."""

    def __init__(self, *answers: tuple[str, float]) -> None:
        super().__init__()
        self.answers = list(answers)
        self.before: list[str | None] = []

    def infer(self, obs: Mapping[str, Any], /, *, previous: str | None = None, **settings: Any) -> Reply:
        self.before.append(previous)
        text, confidence = self.answers.pop(0)
        return {"subtask": {"text": text, "ms": 3.0, "confidence": confidence}}


def sure_robot(*answers: tuple[str, float], cadence: Cadence | None = None, **settings: Any) -> Robot:
    robot = Robot()
    robot.planner = SurePlanner(*answers)  # type: ignore[assignment]
    robot.combined = CombinedPolicy(
        robot.planner, robot.action, live=robot.live, cadence=cadence or Cadence(), clock=lambda: robot.now_s, observer=robot.seen, **settings
    )
    return robot


def test_a_planner_that_is_not_sure_enough_does_not_change_its_mind() -> None:
    robot = sure_robot(("a", 0.2), ("b", 0.4), ("b", 0.6), ("b", 0.1), ("c", 0.3), min_confidence=0.5)
    first = robot.infer()
    assert first["text"] == "a" and "kept" not in first, "a task's first subtask is used whatever its confidence"
    second = robot.infer()
    assert (second["text"], second["kept"], robot.told) == ("a", {"text": "b", "confidence": 0.4}, "tidy: a")
    assert (second["revision"], second["source_index"], second["waited"]) == (2, 1, True), "it was planned from this observation"
    third = robot.infer()
    assert third["text"] == "b" and "kept" not in third
    fourth = robot.infer()
    assert fourth["text"] == "b" and "kept" not in fourth, "the same again is no change"
    assert robot.infer("another task")["text"] == "c", "what was said about another task is not kept"


def test_a_refresh_that_is_not_sure_enough_changes_nothing_either() -> None:
    robot = sure_robot(("a", 0.9), ("b", 0.4), cadence=Cadence("async"), min_confidence=0.5)
    robot.infer()
    robot.now_s += 1.0
    robot.infer()
    robot.end()
    after = robot.infer()
    assert (after["text"], after["kept"]["text"], after["revision"]) == ("a", "b", 2) and robot.seen.refreshes == ["ok"]


def test_without_a_least_confidence_and_without_one_told_the_answer_is_the_answer() -> None:
    robot = sure_robot(("a", 0.9), ("b", 0.0))
    assert [robot.infer()["text"] for _ in range(2)] == ["a", "b"]
    robot = Robot(Cadence(), min_confidence=0.9)  # its planner tells no confidence
    assert [robot.infer()["text"] for _ in range(2)] == ["step 1", "step 2"]


def test_the_planner_is_told_what_it_said_last_to_the_robot_about_the_task() -> None:
    robot = sure_robot(("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 1.0))
    for task in ("tidy", "tidy", "fold", "tidy"):
        robot.infer(task)
    assert robot.planner.before == [None, "a", None, None]  # type: ignore[attr-defined]
