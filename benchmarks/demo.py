"""The demo's pair through the sockets: a planner call, an action call, and both; beside the same models called in process.

    python -m benchmarks.demo [--quick] [--json FILE]

One robot, one request at a time, the pictures of an episode. The server is a process of its own (`python main.py demo` and `serve` are the same
service). The peer is the same pair in this process without a server, called in turns with it, with torch on half of the cores as the service
sets it beside a planner. The demo's command is timed to its robot's first answer, five times (`--quick`: once), on free ports and with the packages
installed.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from action import ActionPolicy, set_num_threads
from benchmarks.report import Goal, arguments, finish, machine
from demo.episodes import lockstep
from demo.robot import PI05_TABLE
from demo.serving import CHECKPOINTS, demo_config
from hosting.clients import Client, connect
from planner import SubtaskGenerator

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def server() -> Iterator[dict[str, str]]:
    """`main.py serve` on the demo's configuration; its addresses."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.json"
        path.write_text(json.dumps({**demo_config(free_ports=True).model_dump(), "log_requests": False}))
        command = [sys.executable, str(ROOT / "main.py"), "serve", "--config", str(path)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stderr is not None
            try:
                ready = next((line for line in process.stderr if "Service ready" in line), None)
                if ready is None:
                    raise SystemExit("the server did not come up")
                yield dict(re.findall(r"(action|planner|admin) ((?:ws|http)://[^\s,]+)", ready))
            finally:
                process.terminate()


def observations(count: int) -> list[Mapping[str, Any]]:
    """What a robot sends over an episode and the next ones."""

    class Records:
        def __init__(self) -> None:
            self.seen: list[Mapping[str, Any]] = []

        def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
            self.seen.append(obs)
            return {"actions": np.random.default_rng(len(self.seen)).uniform(-1, 1, (12, 3))}

    records = Records()
    for seed in itertools.count():
        lockstep(records, seed)
        if len(records.seen) >= count:
            return records.seen[:count]
    raise AssertionError


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    started_s = time.perf_counter()
    call()
    return (time.perf_counter() - started_s) * 1e3


def to_first_action() -> float:
    """Seconds from the command of `make demo` to the robot's first answer."""
    command = [sys.executable, str(ROOT / "main.py"), "demo", "--headless", "--free-ports", "--episodes", "1"]
    started_s = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("  step "):
                seconds = time.perf_counter() - started_s
                process.terminate()
                return seconds
    raise SystemExit("the demo ended without an action")


def main() -> None:
    options = arguments(__doc__)
    calls = 60 if options.quick else 300
    print(machine())
    first_action = [to_first_action() for _ in range(1 if options.quick else 5)]
    seen = observations(calls)
    set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    policy = ActionPolicy.load(PI05_TABLE, CHECKPOINTS / "action")
    planner = SubtaskGenerator.load(CHECKPOINTS / "planner")
    policy.warmup()
    planner.warmup()
    times: dict[str, list[float]] = {name: [] for name in ("planner", "action", "combined", "planner in process", "action in process")}
    with server() as addresses, Client(addresses["planner"]) as ask_planner, connect(addresses["action"]) as ask_action:
        ways: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "planner": ask_planner.infer,
            "action": lambda obs: ask_action.infer({**obs, "mode": "action_only"}),
            "combined": ask_action.infer,
            "planner in process": planner.infer,
            "action in process": lambda obs: policy.infer(obs, seed=0),
        }
        for obs in seen:
            plain = {key: value for key, value in obs.items() if key != "seed"}
            for name, ask in ways.items():
                times[name].append(timed(lambda ask=ask, plain=plain: ask(plain)))  # type: ignore[misc]
    figures = {name: {f"p{p}": float(np.percentile(ms[3:], p)) for p in (50, 95, 99)} for name, ms in times.items()}
    print(f"\none robot, {calls} requests of each kind in turns, WebSocket on the loopback, ms")
    for name, row in figures.items():
        print(f"  {name:20}" + "".join(f"  {p} {value:6.1f}" for p, value in row.items()))
    print(f"\nmake demo to the first action, s: {', '.join(f'{seconds:.1f}' for seconds in first_action)}")
    slowest = max(first_action)
    goals = [
        Goal("planner call p50, ms", figures["planner"]["p50"], "<= 15", figures["planner"]["p50"] <= 15),
        Goal("action call p50, ms", figures["action"]["p50"], "<= 25", figures["action"]["p50"] <= 25),
        Goal("make demo to the first action, s", slowest, "<= 20", slowest <= 20),
    ]
    finish(goals, {**figures, "first_action_s": first_action}, options.json)


if __name__ == "__main__":
    main()
