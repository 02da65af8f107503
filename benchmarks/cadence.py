"""What a planner costs a robot: latency at 10 Hz without it, with it beside the control loop (``async``), and before every action.

    python -m benchmarks.cadence [--quick] [--json FILE]

Planner and policy sleep, 300 ms and 20 ms, as they would on devices of their own; everything else is real: WebSockets on loopback, servers in
processes of their own, observations of 452 kB, a clock of 10 Hz. A robot asks at each tick; its latency is the reply less the moment when the tick
was due. Where a reply takes longer than a period, the ticks that have passed are missed and it goes on with the newest. The modes take turns, a block
of ticks each. Every block is of a new task, whose first request comes before the clock starts and is told apart: with ``async`` it is the one that
waits for the planner. A second part does the same with 8 robots, whose ticks are spread over the period.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np

from benchmarks.report import Goal, arguments, finish, machine
from benchmarks.stub_service import (
    SleepingPlanner,
    SleepingPolicy,
    Ticks,
    by_the_clock,
    infer,
    observation,
    run_service,
    service_config,
    side_by_side,
    subtask_of,
)
from benchmarks.transports import running
from hosting.clients import Client, connect
from hosting.config import PlannerConfig

PLANNER_S, POLICY_S, PERIOD_S = 0.3, 0.02, 0.1
ACTION_ONLY, ASYNC, EVERY_REQUEST = "action_only", "async", "every_request"
CREW = 8


def serve(refresh: Literal["async", "every_request"], ready: Connection) -> None:
    """Combined mode with that cadence, its interval the default of 1 s."""
    config = service_config(planner=PlannerConfig(checkpoint_dir="none", refresh=refresh))
    run_service(config, lambda: SleepingPolicy(POLICY_S), lambda: SleepingPlanner(PLANNER_S), ready)


@dataclass
class Mode:
    """All blocks of one mode."""

    latencies_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    ages_ms: list[float] = field(default_factory=list)
    missed: int = 0
    stale: int = 0
    waited: int = 0
    refreshes: int = 0
    robot_s: float = 0.0

    def take(self, first_ms: float, ticks: Ticks, task: str, *, plans: bool, seconds: float) -> None:
        """One robot's block."""
        self.first_ms.append(first_ms)
        self.latencies_ms += ticks.latencies_ms
        self.missed += ticks.missed
        self.robot_s += seconds
        if not plans:
            return
        subtasks = [reply["subtask"] for reply in ticks.replies]
        self.stale += sum(_is_stale(reply, task) for reply in ticks.replies)
        self.waited += sum(subtask["waited"] for subtask in subtasks)
        self.ages_ms += [subtask["age_ms"] for subtask in subtasks]
        self.refreshes += subtasks[-1]["revision"] - subtasks[0]["revision"]

    def figures(self) -> dict[str, float]:
        row = {f"p{percent} ms": float(np.percentile(self.latencies_ms, percent)) for percent in (50, 95, 99)}
        row |= {
            "max ms": max(self.latencies_ms),
            "first ms": float(np.median(self.first_ms)),
            "samples": len(self.latencies_ms),
            "missed": self.missed,
        }
        if self.ages_ms:
            row |= {"waited": self.waited, "stale": self.stale, "age p50 ms": float(np.median(self.ages_ms)), "age max ms": max(self.ages_ms)}
            row |= {"plans/s": self.refreshes / self.robot_s}
        return row


def _is_stale(reply: Mapping[str, Any], task: str) -> bool:
    """Whether a reply's subtask, or the prompt that its actions are for, is not of the task that was sent."""
    subtask = reply["subtask"]
    return bool(subtask["text"] != subtask_of(task) or "task" in subtask or "error" in subtask or subtask_of(task) not in reply["asked"]["prompt"])


def block(crew: Sequence[Client], observations: Sequence[dict[str, Any]], own: Mapping[str, Any], seconds: float) -> list[tuple[float, Ticks]]:
    """Each robot's first request, in ms, and then all of them at their ticks for so long; ``own`` are the keys of this mode."""
    asks = [partial(infer, client, {**obs, **own}) for client, obs in zip(crew, observations, strict=True)]

    def first(ask: Callable[[], Any]) -> float:
        started_s = time.perf_counter()
        ask()
        return (time.perf_counter() - started_s) * 1e3

    firsts = side_by_side([partial(first, ask) for ask in asks])
    start_s = time.perf_counter() + 0.05

    def robot(index: int) -> Ticks:
        first_s = start_s + index * PERIOD_S / len(crew)
        return by_the_clock(asks[index], period_s=PERIOD_S, start_s=first_s, end_s=first_s + seconds)

    return list(zip(firsts, side_by_side([partial(robot, index) for index in range(len(crew))]), strict=True))


def measure(addresses: Mapping[str, str], robots: int, rounds: int, seconds: Mapping[str, float]) -> dict[str, Mode]:
    """Rounds in which every mode has one block."""
    modes = {mode: Mode() for mode in seconds}
    observations = [observation(robot, "") for robot in range(robots)]
    with ExitStack() as stack:
        crews = {
            name: [stack.enter_context(connect(addresses[name], session_id=f"{robots} robots, {robot}")) for robot in range(robots)]
            for name in addresses
        }
        names = list(modes)
        for round_ in range(rounds):
            for name in names:
                task = f"clear table {round_}"
                own = {"prompt": task, **({"mode": "action_only"} if name == ACTION_ONLY else {})}
                # Without its planner, a robot is served by the very process that serves it with one.
                crew = crews[ASYNC if name == ACTION_ONLY else name]
                for first_ms, ticks in block(crew, observations, own, seconds[name]):
                    modes[name].take(first_ms, ticks, task, plans=name != ACTION_ONLY, seconds=seconds[name])
            names = [*names[1:], names[0]]
    return modes


def show(title: str, modes: Mapping[str, Mode]) -> dict[str, dict[str, float]]:
    rows = {name: mode.figures() for name, mode in modes.items()}
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    print(f"\n{title}")
    print(f"  {'':14}" + "".join(f"{column:>11}" for column in columns))
    for name, row in rows.items():
        print(f"  {name:14}" + "".join(f"{row[column]:11.2f}" if column in row else f"{'':11}" for column in columns))
    return rows


def goals_of(rows: Mapping[str, Mapping[str, float]], who: str) -> list[Goal]:
    alone, beside = rows[ACTION_ONLY], rows[ASYNC]
    added_ms, ratio = beside["p50 ms"] - alone["p50 ms"], beside["p99 ms"] / alone["p99 ms"]
    return [
        Goal(f"{who}: async p50 less action_only p50, ms", added_ms, "<= 2", added_ms <= 2),
        Goal(f"{who}: async p99 / action_only p99", ratio, "<= 1.10", ratio <= 1.10),
        Goal(f"{who}: replies with a stale subtask", beside["stale"], "0", beside["stale"] == 0),
        Goal(f"{who}: ticks missed, async", beside["missed"], "0", beside["missed"] == 0),
    ]


def main() -> None:
    options = arguments(__doc__)
    rounds, block_s, crew_rounds, crew_block_s = (3, 3.2, 2, 2.0) if options.quick else (12, 10.0, 6, 10.0)
    print(machine())
    with running(partial(serve, "async")) as (beside, _), running(partial(serve, "every_request")) as (before, _):
        addresses = {ASYNC: beside["action"], EVERY_REQUEST: before["action"]}
        one = measure(addresses, 1, rounds, {ACTION_ONLY: block_s, ASYNC: block_s, EVERY_REQUEST: block_s / 4})
        crew = measure(addresses, CREW, crew_rounds, {ACTION_ONLY: crew_block_s, ASYNC: crew_block_s, EVERY_REQUEST: crew_block_s / 4})
    figures = {
        "one robot": show(f"one robot at 10 Hz ({rounds} rounds, in turns)", one),
        f"{CREW} robots": show(f"{CREW} robots at 10 Hz each ({crew_rounds} rounds, in turns)", crew),
    }
    finish([*goals_of(figures["one robot"], "one robot"), *goals_of(figures[f"{CREW} robots"], f"{CREW} robots")], figures, options.json)


if __name__ == "__main__":
    main()
