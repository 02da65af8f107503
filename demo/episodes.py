"""A robot at the simulated table, as a client of a policy server: one episode at a time, in one of two loops.

:func:`lockstep`: the table waits while the robot asks. What a model can do, apart from how long it takes.

:func:`real_time`: one action per tick, whatever the server does. While a request is under way the robot goes on with the chunk that it has;
the new one replaces it from the action on that is due by then. What a robot meets.

In both, who speaks of being done is the planner (``planner.done_subtasks``): the robot stops there, and the table, not the models, decides
whether that is a success. Without a planner nobody says so; then an episode ends as soon as the goals hold (``until_goals_hold``).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import gymnasium
import numpy as np

import demo.table  # noqa: F401 - registers the environment
from demo.instructions import InstructionError
from demo.table import ENV_ID, MAX_CALLS, MAX_STEPS, TableEnv

Reply = Mapping[str, Any]

EXECUTED: Final = 12
"""Actions of a chunk that :func:`lockstep` executes: all of them."""
TICKS: Final = 6
"""Ticks after which :func:`real_time` asks anew."""


class Policy(Protocol):
    """What a robot asks: a client of a server, usually."""

    def infer(self, obs: Mapping[str, Any], /) -> Reply: ...


@dataclass
class Call:
    """One request of an episode: what came back, what the scripted rule would have said, and how long it took."""

    expected: str | None
    """None: it was asked under another instruction than it was answered under."""
    reply: Reply
    ms: float

    @property
    def right(self) -> bool | None:
        """Whether the planner said what the rule says; None where there is no subtask, one that was planned from an earlier observation, or no rule
        to go by."""
        subtask = self.reply.get("subtask")
        if self.expected is None or not isinstance(subtask, Mapping) or not subtask.get("waited", True):
            return None
        return bool(subtask["text"].strip() == self.expected)


@dataclass
class Episode:
    """How an episode went."""

    seed: int
    instruction: str
    family: str
    success: bool = False
    done: bool = False
    """whether the planner said so"""
    steps: int = 0
    calls: list[Call] = field(default_factory=list)


Prompt = Callable[[Mapping[str, Any]], str]
"""``info`` of the table → what the robot sends as ``prompt``."""


def instruction(info: Mapping[str, Any]) -> str:
    """The long instruction, as a person gave it."""
    return str(info["instruction"])


def new_table() -> TableEnv:
    """A table that ends no episode by itself."""
    table = gymnasium.make(ENV_ID, disable_env_checker=True).unwrapped
    assert isinstance(table, TableEnv)
    return table


def lockstep(
    policy: Policy,
    seed: int,
    *,
    prompt: Prompt = instruction,
    fields: Mapping[str, Any] | None = None,
    executed: int = EXECUTED,
    until_goals_hold: bool = False,
) -> Episode:
    """One episode in which the table waits for the robot.

    Args:
        prompt: what is asked.
        fields: what every observation has besides, such as ``mode``.
        executed: how many actions of each chunk are carried out.
        until_goals_hold: the episode ends, successfully, as soon as all goals hold, because nobody is there to say so.
    """
    table = new_table()
    obs, info = table.reset(seed=seed)
    episode = Episode(seed, info["instruction"], table.family)
    while len(episode.calls) < MAX_CALLS * EXECUTED // executed:
        started_s = time.perf_counter()
        reply = policy.infer({**obs, **(fields or {}), "prompt": prompt(info), "seed": len(episode.calls)})
        episode.calls.append(Call(info["subtask"], reply, (time.perf_counter() - started_s) * 1e3))
        if says_done(reply):
            episode.done = True
            break
        for action in reply["actions"][:executed]:
            obs, _, _, _, info = table.step(action)
            episode.steps += 1
            if until_goals_hold and info["success"]:
                episode.success = True
                return episode
    episode.success = bool(info["success"])
    return episode


class Robot:
    """The robot of :func:`real_time`: at most one request under way, and the chunk that is being carried out.

    Args:
        policy: is asked on a thread of its own.
        delay_s: added to each request, half of it before and half of it after: a slower network than there is.
    """

    def __init__(self, policy: Policy, *, delay_s: float = 0.0) -> None:
        self._policy = policy
        self._delay_s = delay_s
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="robot")
        self._under_way: Future[tuple[Reply, float]] | None = None
        self._asked_at = 0
        self._actions: np.ndarray[Any, Any] | None = None
        self._begins_at = 0

    @property
    def under_way(self) -> bool:
        """Whether a request is."""
        return self._under_way is not None

    def ask(self, obs: Mapping[str, Any], tick: int) -> None:
        """Send an observation that was made after ``tick`` actions."""
        self._asked_at = tick
        self._under_way = self._asking.submit(self._ask, obs)

    def answer(self) -> tuple[Reply, float] | None:
        """The reply and the time it took in ms, once it is there; its chunk is then the one that is carried out."""
        if self._under_way is None or not self._under_way.done():
            return None
        under_way, self._under_way = self._under_way, None
        reply, ms = under_way.result()
        self._actions, self._begins_at = reply.get("actions"), self._asked_at
        return reply, ms

    def action(self, tick: int) -> np.ndarray[Any, Any] | None:
        """What to do at ``tick``; the last of the chunk where it is over; None before the first chunk, and after an answer without one."""
        if self._actions is None:
            return None
        due: np.ndarray[Any, Any] = self._actions[min(tick - self._begins_at, len(self._actions) - 1)]
        return due

    def close(self) -> None:
        """Let the request under way end."""
        self._asking.shutdown()

    def _ask(self, obs: Mapping[str, Any]) -> tuple[Reply, float]:
        started_s = time.perf_counter()
        time.sleep(self._delay_s / 2)
        reply = self._policy.infer(obs)
        time.sleep(self._delay_s / 2)
        return reply, (time.perf_counter() - started_s) * 1e3


def real_time(
    policy: Policy,
    seed: int,
    *,
    table: TableEnv | None = None,
    rate_hz: float = 10.0,
    delay_s: float = 0.0,
    ticks: int = TICKS,
    max_steps: int = MAX_STEPS,
    linger: int = 0,
    begins: Callable[[str], None] = lambda instruction: None,
    watch: Callable[[Episode, Mapping[str, Any]], None] = lambda episode, info: None,
    stop: Callable[[], bool] = lambda: False,
) -> Episode:
    """One episode in which time goes on.

    Args:
        rate_hz: actions per second.
        delay_s: added to each request.
        ticks: how many actions after an observation the next one is sent, if its answer is there by then.
        max_steps: after so many actions the robot gives up.
        linger: ticks for which a robot that is done goes on asking, in case it is told something else.
        begins: is told what is asked.
        watch: is told of every tick.
        stop: asked at every tick whether to leave.
    """
    table = table or new_table()
    obs, info = table.reset(seed=seed)
    prompt = info["instruction"]
    begins(prompt)
    episode = Episode(seed, prompt, table.family)
    robot = Robot(policy, delay_s=delay_s)
    asked_now, expected, done_now = -ticks, "", 0
    next_s = time.perf_counter()
    try:
        for now in itertools.count():
            if (answered := robot.answer()) is not None:
                reply, ms = answered
                info = _heard(table, reply.get("instruction", prompt), info)
                episode.calls.append(Call(expected if info["instruction"] == episode.instruction else None, reply, ms))
                episode.instruction = info["instruction"]
                if says_done(reply) and not episode.done:
                    done_now = now
                episode.done = says_done(reply)
            if stop() or episode.steps >= max_steps or (episode.done and now - done_now >= linger):
                break
            if not robot.under_way and now - asked_now >= ticks:
                asked_now, expected = now, info["subtask"]
                robot.ask({**obs, "prompt": prompt, "seed": len(episode.calls)}, episode.steps)
            if (action := robot.action(episode.steps)) is not None:
                obs, _, _, _, info = table.step(action)
                info["instruction"] = episode.instruction
                episode.steps += 1
            watch(episode, info)
            # What was late is not made up for: a robot's actions come a tick apart.
            next_s = max(next_s + 1 / rate_hz, time.perf_counter())
            time.sleep(max(0.0, next_s - time.perf_counter()))
    finally:
        robot.close()
    episode.success = bool(info["success"])
    return episode


def says_done(reply: Reply) -> bool:
    """Whether the planner says that nothing is left to do."""
    subtask = reply.get("subtask")
    return isinstance(subtask, Mapping) and bool(subtask.get("done"))


def _heard(table: TableEnv, told: str, info: Mapping[str, Any]) -> dict[str, Any]:
    """Where an operator's instruction took the place of the robot's (``instruction`` in the reply), or its own is back, the table is judged by that.
    One that this table cannot do is not judged: then what was asked before still is."""
    if told == info["instruction"]:
        return dict(info)
    try:
        table.set_instruction(told)
    except InstructionError:
        return {**info, "instruction": told}
    return table.info
