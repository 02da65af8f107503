"""Combined mode under random interleavings of all that can happen to robots' sessions, with every reply checked.

Observations of several sessions over several connections, task changes, resets, planner answers and failures in any order, refreshes that are
begun, superseded or refused, requests that are given up, template edits of both kinds, time. The planner's answer says what it was asked about
which observation; the action policy's says its prompt; so each reply can be held against what must be true of it::

    python -m tests.hosting.cadence_interleavings --steps 100000
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hosting.cadence import Cadence, Plan
from hosting.calls import Background, Origin, SlotCall, Steps
from hosting.combined import CombinedPolicy, OnFailure
from hosting.observer import Observer
from hosting.policy import ObservationError, OverloadedError, PlannerError, Reply, SupersededError
from hosting.sessions import Session, SessionStore
from hosting.templates import LiveSettings, PromptSettings

TASKS = ("tidy", "fold", "sort")
MOST_PENDING = 24
TTL_S = 60.0


class Planner:
    """Says what it was asked about which observation; of some it says nothing, which is an answer, too."""

    metadata: Mapping[str, Any] = {}

    def infer(self, obs: Mapping[str, Any], /, *, generation_prompt_format: str | None = None, max_generation_tokens: int | None = None) -> Reply:
        asked = (obs["prompt"], generation_prompt_format, max_generation_tokens)
        text = "" if obs["mark"] % 11 == 0 else f"{obs['mark']} {asked}"
        return {"subtask": {"text": text, "ms": 1.0, "decode_steps": 3, "mark": obs["mark"], "asked": asked}}


class Action:
    """Says what it was told."""

    metadata: Mapping[str, Any] = {}

    def infer(self, obs: Mapping[str, Any], /) -> Reply:
        return {"prompt": obs["prompt"], "mark": obs["mark"]}


class Counts(Observer):
    """How often each end of a refresh came about."""

    def __init__(self, counter: Counter[str]) -> None:
        self._counter = counter

    def refreshed(self, outcome: str) -> None:
        self._counter[f"refresh {outcome}"] += 1


@dataclass(slots=True, eq=False)
class Request:
    """One observation under way."""

    mark: int
    session: Session
    origin: Origin
    epoch: int
    task: str
    mode: str
    settings: PromptSettings | None = None
    steps: Steps | None = None
    call: SlotCall | None = None
    must_wait: bool = False
    early: bool = False  # a refresh was started before its time; there must be a reason
    decided: int = 0
    decided_s: float = 0.0

    @property
    def life(self) -> tuple[int, int]:
        """The session from one reset to the next."""
        return self.session.key, self.epoch


@dataclass(slots=True, eq=False)
class Beside:
    """A refresh under way."""

    request: Request
    background: Background
    begun: bool = False


@dataclass
class Outcome:
    """What was seen."""

    steps: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        self.steps += other.steps
        self.counts += other.counts
        self.violations += other.violations


class World:
    """Robots, connections, a planner and an administrator, all played by one random generator."""

    def __init__(self, seed: int, cadence: Cadence, on_failure: OnFailure) -> None:
        self.name = f"seed {seed}, {cadence}, {on_failure}"
        self.random = random.Random(seed)
        self.cadence = cadence
        self.outcome = Outcome()
        self.now_s = 1000.0
        self.live = LiveSettings(PromptSettings())
        self.settings = {1: self.live.current}
        self.combined = CombinedPolicy(
            Planner(),
            Action(),
            live=self.live,
            on_failure=on_failure,
            cadence=cadence,
            clock=self.clock,
            observer=Counts(self.outcome.counts),
        )
        self.store = SessionStore(ttl_s=TTL_S, max_sessions=3, clock=self.clock)
        self.clients = [self.store.client() for _ in range(3)]
        self.requests: dict[int, Request] = {}
        self.waiting: list[Request] = []
        self.held: list[Request] = []
        self.beside: list[Beside] = []
        self.tasks: dict[int, str] = {}  # session key → what its robot does
        self.orders = itertools.count()
        self.decisions = itertools.count(1)
        self.asked_s: dict[tuple[int, int], float] = {}  # life → when its planner was last asked
        self.newest: dict[tuple[int, int], tuple[int, str]] = {}  # life → order and task
        self.current: dict[int, Plan | None] = {}  # session key → the plan in use
        self.marks: dict[tuple[int, int], int] = {}  # session key, revision → observation
        self.used: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # life → decision, revision, source_index

    def clock(self) -> float:
        return self.now_s

    def run(self, steps: int) -> Outcome:
        actions = [self.observe, self.answer, self.begin, self.end, self.pass_time, self.change_settings, self.reset, self.release, self.reconnect]
        weights = [320, 380, 70, 100, 60, 15, 5, 40, 2]
        for action in self.random.choices(actions, weights, k=steps):
            action()
            self.outcome.steps += 1
        for used in self.used.values():
            used.sort()
            for (_, revision, index), (decision, next_revision, next_index) in itertools.pairwise(used):
                self.check(next_revision >= revision and next_index >= index, f"decision {decision}: a subtask older than the one before")
        return self.outcome

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.outcome.violations.append(f"{what} ({self.name})")

    # What can happen

    def observe(self) -> None:
        if len(self.waiting) >= MOST_PENDING:
            return
        client = self.random.choice(self.clients)
        session = client.observe(self.random.choices((None, *"abcd"), (30, 30, 30, 30, 1))[0], begins=self.random.random() < 0.003)
        index = session.next_index()
        if session.key not in self.tasks or self.random.random() < 0.05:
            self.tasks[session.key] = self.random.choice(TASKS)
        mark = len(self.requests) + 1
        origin = Origin(session.plan, (session.key,), next(self.orders), self.now_s, index=index, replan=self.random.random() < 0.04)
        mode = self.random.choices(("default", "subtask_only", "action_only"), (92, 4, 4))[0]
        request = Request(mark, session, origin, session.epoch, self.tasks[session.key], mode)
        self.requests[mark] = request
        if self.random.random() < 0.1:
            self.held.append(request)
        else:
            self.start(request)

    def release(self) -> None:
        """An observation whose images took longer to decode than the next one's."""
        if self.held:
            self.start(self.held.pop(self.random.randrange(len(self.held))))

    def answer(self) -> None:
        """A slot answers one of the requests that wait for it, or fails, or its client leaves."""
        if not self.waiting:
            return
        request = self.waiting.pop(self.random.randrange(len(self.waiting)))
        assert request.call is not None and request.steps is not None
        if self.random.random() < 0.02:
            request.steps.close()
            self.outcome.counts["given up"] += 1
        elif request.call.slot == "planner" and self.random.random() < 0.1:
            error = self.random.choice((PlannerError("broken"), SupersededError("superseded: injected"), ObservationError("images: none")))
            self.advance(request, partial(request.steps.throw, error))
        else:
            reply = request.call.call()
            if request.call.slot == "planner" and self.random.random() < 0.01:
                reply = {"nothing": 0}
            self.advance(request, partial(request.steps.send, reply))

    def begin(self) -> None:
        if queued := [beside for beside in self.beside if not beside.begun]:
            self._begin(self.random.choice(queued))

    def end(self) -> None:
        if begun := [beside for beside in self.beside if beside.begun]:
            beside = self.random.choice(begun)
            self.beside.remove(beside)
            error = self.random.choice((PlannerError("broken"), ObservationError("images: none"), asyncio.CancelledError()))
            beside.background.done(error if self.random.random() < 0.25 else beside.background.call.call())
            self.check_current(beside.request)

    def pass_time(self) -> None:
        if self.random.random() < 0.002:
            self.now_s += TTL_S
            self.store.sweep()
        else:
            self.now_s += self.random.choice((0.01, 0.1, 0.1, 0.5, 2.0))

    def change_settings(self) -> None:
        number = self.random.randrange(1000)
        change: dict[str, Any] = self.random.choice(
            (
                {"action_prompt_template": f"{number} {{task}} {{subtask}}"},
                {"generation_prompt_format": f"{number % 3} {{task}}"},  # few, so that one comes back
                {"max_generation_tokens": 10 + number % 2},
                {"action_prompt_template": f"{number} {{subtask}}", "generation_prompt_format": f"{number} {{task}}"},
            )
        )
        settings = self.live.update(**change)
        self.settings[settings.revision] = settings

    def reset(self) -> None:
        client = self.random.choice(self.clients)
        ids = self.random.choice((None, ["a"], ["b", "c"], ["nobody"]))
        self.outcome.counts["sessions reset"] += client.reset(ids)

    def reconnect(self) -> None:
        place = self.random.randrange(len(self.clients))
        self.clients[place].close()
        self.clients[place] = self.store.client()

    # The driver

    def start(self, request: Request) -> None:
        request.settings = self.live.current
        request.must_wait = self.must_wait(request)
        obs = {"prompt": request.task, "mark": request.mark, "mode": request.mode}
        request.steps = self.combined.steps(obs, origin=request.origin)
        if request.mode != "action_only":
            self.newest[request.life] = max(self.newest.get(request.life, (-1, "")), (request.origin.order, request.task))
        self.advance(request, partial(next, request.steps))

    def advance(self, request: Request, go: Callable[[], SlotCall | Background]) -> None:
        assert request.steps is not None
        first, started = request.call is None, False
        try:
            step = go()
            while isinstance(step, Background):
                started = True
                self.start_beside(request, step)
                step = request.steps.send({})
        except StopIteration as stop:
            self.outcome.counts["replies"] += 1
            self.check_reply(request, stop.value)
            return
        except (PlannerError, SupersededError, ObservationError):
            self.outcome.counts["failed"] += 1
            return
        finally:
            self.check_current(request)
        request.call = step
        if step.slot == "planner":
            self.check(request.must_wait, "waited without a reason")
            self.asked_s[request.life] = self.now_s
        else:
            request.decided, request.decided_s = next(self.decisions), self.now_s
            if first and request.mode == "default" and not started:
                self.check_no_refresh_was_due(request)
        self.waiting.append(request)

    def start_beside(self, request: Request, background: Background) -> None:
        under_way = [beside for beside in self.beside if beside.request.life == request.life]
        self.check(not any(beside.begun for beside in under_way), "a second refresh beside one that runs")
        request.early = not under_way and self.now_s - self.asked_s.get(request.life, -math.inf) < self.cadence.interval_s
        self.asked_s[request.life] = self.now_s
        if not under_way and self.random.random() < 0.03:
            background.done(OverloadedError("the planner is full"))
            return
        newer = Beside(request, background)
        for beside in under_way:
            self.beside.remove(beside)
            beside.background.done(SupersededError("superseded: by a newer one"))
        self.beside.append(newer)
        if self.random.random() < 0.2:
            self._begin(newer)

    def _begin(self, beside: Beside) -> None:
        beside.begun = True
        beside.background.begun()

    # What must be true

    def check_current(self, request: Request) -> None:
        plan = request.session.plan.current
        if plan is not None and plan is not self.current.get(request.session.key):
            self.current[request.session.key] = plan
            self.check(request.session.epoch == request.epoch, "a plan from before a reset was taken")
            self.check(plan.basis.task == self.newest[request.life][1], "a plan of an older task was taken")

    def must_wait(self, request: Request) -> bool:
        plan = request.origin.plan.current
        if self.cadence.refresh == "every_request" or request.mode == "subtask_only" or request.origin.replan or plan is None:
            return True
        another = self.cadence.on_task_change == "wait" and plan.basis.task != request.task
        return another or (self.cadence.max_age_s is not None and self.now_s - plan.basis.observed_s > self.cadence.max_age_s)

    def check_no_refresh_was_due(self, request: Request) -> None:
        if self.newest[request.life][0] != request.origin.order:
            return
        under_way = [beside for beside in self.beside if beside.request.life == request.life]
        if under_way:
            self.check(under_way[0].begun, "a refresh that waits was not replaced by a newer one")
        else:
            self.check(self.now_s - self.asked_s.get(request.life, -math.inf) < self.cadence.interval_s, "no refresh although one was due")

    def check_reply(self, request: Request, reply: Reply) -> None:
        settings = request.settings
        assert settings is not None
        if request.mode == "action_only":
            self.check(reply == {"prompt": request.task, "mark": request.mark}, "action_only: not the prompt as sent")
            return
        subtask = reply["subtask"]
        used = self.settings.get(subtask["template_revision"])
        self.check(used is not None, "a template revision that never was")
        if used is None:
            return
        task = subtask.get("task", request.task)
        text = subtask["text"]
        if request.mode == "default":
            prompt = used.action_prompt(task=task, subtask=text) if text else task
            self.check(reply["prompt"] == prompt, "a prompt that is not its template with its task and subtask")
            self.check(reply["mark"] == request.mark, "another request's actions")
        else:
            self.check(subtask["waited"], "subtask_only: not planned from its own observation")
        if "task" in subtask:
            self.check(self.cadence.on_task_change == "keep" and task != request.task, "an old task where none is kept")
        if "mark" not in subtask:
            self.outcome.counts["without a plan"] += 1
            self.check(text == "" and "error" in subtask, "no plan, and no error that says so")
            forgone = self.cadence.refresh == "async" and request.mode == "default" and not request.origin.replan
            self.check(subtask["waited"] or forgone, "neither a plan, nor waited for one")
            self.outcome.counts["did without"] += not subtask["waited"]
            self.check((used, subtask["source_index"]) == (settings, request.origin.index), "a fallback that is not the request's own")
            return
        self.check_plan(request, subtask, used, task)

    def check_plan(self, request: Request, subtask: Mapping[str, Any], used: PromptSettings, task: str) -> None:
        settings = request.settings
        assert settings is not None
        source = self.requests[subtask["mark"]]
        asked = _asked(task, used)
        self.check(subtask["asked"] == asked, "a subtask of another task, or planned with another revision's settings")
        self.check(subtask["asked"] != _asked(task, settings) or used is settings, "a template that is not the one in force, though it could be")
        self.check(used.revision <= settings.revision, "settings newer than the request's start")
        self.check(source.life == request.life, "a subtask of another session, or from before a reset")
        self.check(subtask["source_index"] == source.origin.index, "another observation's number")
        # By the decision, for a subtask is as old as it is when the action policy is asked.
        decided_s = request.decided_s if request.mode == "default" else self.now_s
        self.check(abs(subtask["age_ms"] - (decided_s - source.origin.arrived_s) * 1e3) < 1e-6, "an age that is not its observation's")
        self.check(self.marks.setdefault((request.session.key, subtask["revision"]), source.mark) == source.mark, "one revision, two plans")
        if subtask["waited"]:
            self.outcome.counts["waited"] += 1
            self.check(source is request, "waited, but not for its own plan")
            self.check(request.mode != "default" or "error" not in subtask, "an error though a plan came")
            return
        self.outcome.counts["did not wait"] += 1
        self.outcome.counts["kept the old task"] += "task" in subtask
        self.outcome.counts["kept the old settings"] += used is not settings
        self.outcome.counts["with an error"] += "error" in subtask
        self.check(self.cadence.refresh == "async" and not request.origin.replan, "did not wait, but had to")
        self.check(self.cadence.max_age_s is None or subtask["age_ms"] <= self.cadence.max_age_s * 1e3, "too old")
        self.check(not request.early or subtask["asked"] != _asked(request.task, settings), "a refresh before its time")
        self.used.setdefault(request.life, []).append((request.decided, subtask["revision"], subtask["source_index"]))


def _asked(task: str, settings: PromptSettings) -> tuple[str, str, int]:
    return task, settings.generation_prompt_format, settings.max_generation_tokens


WORLDS: tuple[tuple[Cadence, OnFailure], ...] = (
    (Cadence("async"), "use_task"),
    (Cadence("async", interval_s=0.2, max_age_s=3.0), "fail"),
    (Cadence("async", on_task_change="keep"), "use_task"),
    (Cadence("async", interval_s=0.2, max_age_s=None, on_task_change="keep"), "fail"),
    (Cadence("async", interval_s=5.0, max_age_s=2.0, on_task_change="keep"), "use_task"),
    (Cadence("every_request"), "use_task"),
)


def run(steps: int, *, seed: int = 0) -> Outcome:
    """``steps`` events in all, in one world per cadence."""
    total = Outcome()
    with _quiet():
        for number, (cadence, on_failure) in enumerate(WORLDS):
            share = steps // len(WORLDS) + (number < steps % len(WORLDS))
            total.add(World(seed * len(WORLDS) + number, cadence, on_failure).run(share))
    return total


@contextmanager
def _quiet() -> Iterator[None]:
    """Failures are logged, and there are thousands."""
    loggers = [logging.getLogger(f"hosting.{name}") for name in ("failures", "templates", "sessions")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def main() -> int:
    parser = argparse.ArgumentParser(description="Combined mode under random interleavings, every reply checked.")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started_s = time.perf_counter()
    outcome = run(arguments.steps, seed=arguments.seed)
    seen = ", ".join(f"{count} {what}" for what, count in sorted(outcome.counts.items()))
    sys.stdout.write(f"{outcome.steps} steps in {time.perf_counter() - started_s:.1f} s: {len(outcome.violations)} violations ({seen})\n")
    for what, count in Counter(outcome.violations).most_common(20):
        sys.stdout.write(f"  {count} × {what}\n")
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
