"""What serving several robots in one model call gains: closed-loop clients against the real tiny models on this machine's CPU.

    python -m benchmarks.batching [--quick] [--json FILE]

The checkpoints are the golden ones (``tests/golden``): pi0 and pi0.5 with DROID's cameras behind the action slot, and pi0.5 in both slots (combined
mode, ``every_request``). Servers are processes of their own, one per scheduler setting; 1, 2, 4 and 8 clients, threads of this process, ask them in
turns, each its own observation with its own seed, and check every reply against what the policy gives for it alone, in a process without a server.
The gain is the throughput of 8 clients over that of one client that makes the same calls one after the other, on the same server. The same policy
called in a loop without a server, one row and eight, is beside it: what batching gains there is what the model itself can gain.
"""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.report import Goal, arguments, finish, machine
from benchmarks.stub_service import run_service, service_config, side_by_side
from benchmarks.transports import running
from hosting.clients import Client, connect
from hosting.config import ActionConfig, PlannerConfig, SchedulerConfig
from tests.golden_data import CHECKPOINTS, TOKENIZER

CLIENTS = (1, 2, 4, 8)
LIMIT = 2e-4
"""Largest difference between an action that was served in a batch and the same one alone."""

SETTINGS = {"one by one": SchedulerConfig(max_batch=1), "8, 0 ms": SchedulerConfig(max_wait_ms=0.0), "8, 2 ms": SchedulerConfig()}
"""``max_batch`` and ``max_wait_ms``; the last are the defaults."""

DEFAULT = "8, 2 ms"

TOKENS = 8
"""Longest subtask."""


@dataclass(frozen=True)
class Case:
    """What is served."""

    config: str
    checkpoint: str
    planner: bool = False


CASES = {
    "action, pi0": Case("pi0_droid", "pi0_orbax"),
    "action, pi0.5": Case("pi05_droid", "pi05_orbax"),
    "combined, pi0.5": Case("pi05_droid", "pi05_orbax", planner=True),
}


def serve(case: Case, scheduler: SchedulerConfig, ready: Connection) -> None:
    """The checkpoints, as a service loads them."""
    files: dict[str, Any] = {"checkpoint_dir": str(CHECKPOINTS / case.checkpoint), "tokenizer": str(TOKENIZER)}
    batches = {"max_batch": scheduler.max_batch, "max_wait_ms": scheduler.max_wait_ms}
    action = ActionConfig.model_validate({**files, "model_config_name": case.config, "scheduler": batches})
    planner = PlannerConfig.model_validate({**files, "missing_cameras": "grey", "max_generation_tokens": TOKENS, "scheduler": batches})
    run_service(service_config(action=action, planner=planner if case.planner else None), None, None, ready)


def reference(case: Case, pipe: Connection) -> None:
    """The same policies without a server: what each client must get, and how fast they are called in a loop."""
    from action import ActionPolicy
    from hosting.combined import CombinedPolicy

    action = ActionPolicy.load(case.config, CHECKPOINTS / case.checkpoint, tokenizer=TOKENIZER)
    observations = [action.example_observation(np.random.default_rng(index)) for index in range(max(CLIENTS))]
    policy: Any = action
    if case.planner:
        from planner import SubtaskGenerator

        generator = SubtaskGenerator.load(CHECKPOINTS / case.checkpoint, tokenizer=TOKENIZER, missing_cameras="grey", max_generation_tokens=TOKENS)
        policy = CombinedPolicy(generator, action)
    pipe.send([(obs, policy.infer(obs, seed=index)["actions"]) for index, obs in enumerate(observations)])
    while True:
        rows, seconds = pipe.recv()
        calls, started_s = 0, time.perf_counter()
        while time.perf_counter() - started_s < seconds:
            action.infer_batch(observations[:rows], seeds=range(rows))
            calls += 1
        pipe.send((calls * rows, time.perf_counter() - started_s))


@dataclass
class Cell:
    """All turns of so many clients at one server."""

    latencies_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    client_cpu_s: float = 0.0
    batches: dict[str, float] = field(default_factory=dict)

    @property
    def throughput(self) -> float:
        return len(self.latencies_ms) / self.seconds

    def figures(self) -> dict[str, Any]:
        return {
            "requests/s": self.throughput,
            **{f"p{percent} ms": float(np.percentile(self.latencies_ms, percent)) for percent in (50, 99)},
            "client CPU": self.client_cpu_s / self.seconds,
            "batches": self.batches,
        }


def closed_loop(client: Client, obs: Mapping[str, Any], seed: int, expected: np.ndarray, end_s: float) -> list[float]:
    """Ask again as soon as the answer is there; milliseconds of each call."""
    times_ms = []
    while (started_s := time.perf_counter()) < end_s:
        actions = client.infer(obs, seed=seed)["actions"]
        times_ms.append((time.perf_counter() - started_s) * 1e3)
        difference = float(np.abs(actions - expected).max())
        assert difference <= LIMIT, f"client {seed} got actions that are off by {difference}; are they another one's?"
    return times_ms


def turn(clients: Sequence[Client], answers: Sequence[tuple[Any, np.ndarray]], seconds: float, admin: str, cell: Cell) -> None:
    """All of ``clients`` for so long."""
    before = batch_sizes(admin)
    started_s, cpu_s = time.perf_counter(), time.process_time()
    robots: list[Callable[[], list[float]]] = [
        partial(closed_loop, client, obs, index, expected, started_s + seconds)
        for index, (client, (obs, expected)) in enumerate(zip(clients, answers, strict=False))
    ]
    for times_ms in side_by_side(robots):
        cell.latencies_ms += times_ms
    cell.seconds += time.perf_counter() - started_s
    cell.client_cpu_s += time.process_time() - cpu_s
    for rows, count in batch_sizes(admin).items():
        cell.batches[rows] = cell.batches.get(rows, 0) + count - before.get(rows, 0)


def batch_sizes(admin: str) -> dict[str, float]:
    """Model calls of the action slot by how many rows they had, as the server's ``/metrics`` has them."""
    with urllib.request.urlopen(f"{admin}/metrics", timeout=30) as answer:
        families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    counts: dict[str, float] = {}
    least, below = 1, 0.0
    for sample in families["tandem_batch_size"].samples:
        if sample.name.endswith("_bucket") and sample.labels["slot"] == "action" and sample.labels["le"] != "+Inf":
            most = int(float(sample.labels["le"]))
            if most <= max(CLIENTS):
                counts[f"{least}" if least == most else f"{least} to {most}"] = sample.value - below
            least, below = most + 1, sample.value
    return counts


def measure(case: Case, rounds: int, seconds: float) -> tuple[dict[tuple[str, int], Cell], dict[int, float]]:
    """(setting, clients) → its cell; rows → rows per second without a server."""
    cells = {(setting, count): Cell() for count in CLIENTS for setting in SETTINGS}
    alone: dict[int, list[tuple[int, float]]] = {1: [], max(CLIENTS): []}
    with ExitStack() as stack:
        addresses = {setting: stack.enter_context(running(partial(serve, case, scheduler)))[0] for setting, scheduler in SETTINGS.items()}
        answers, pipe = stack.enter_context(running(partial(reference, case)))
        clients = {
            setting: [stack.enter_context(connect(urls["action"], resize=None)) for _ in range(max(CLIENTS))] for setting, urls in addresses.items()
        }
        order = list(cells)
        for setting, count in order:  # the first calls of every shape
            turn(clients[setting][:count], answers, 0.1, addresses[setting]["admin"], Cell())
        for _ in range(rounds):
            for setting, count in order:
                turn(clients[setting][:count], answers, seconds, addresses[setting]["admin"], cells[setting, count])
            for rows, taken in alone.items():
                pipe.send((rows, seconds))
                taken.append(pipe.recv())
            order.reverse()
    return cells, {rows: sum(count for count, _ in taken) / sum(s for _, s in taken) for rows, taken in alone.items()}


def show(title: str, cells: Mapping[tuple[str, int], Cell], alone: Mapping[int, float]) -> dict[str, Any]:
    print(f"\n{title}")
    print(f"  {'max_batch, wait':16}{'clients':>8}{'requests/s':>12}{'gain':>7}{'p50 ms':>9}{'p99 ms':>9}{'client CPU':>12}  model calls by rows")
    rows: dict[str, Any] = {}
    for setting in SETTINGS:
        for count in CLIENTS:
            row = cells[setting, count].figures()
            gain = row["requests/s"] / cells[setting, 1].throughput
            batches = ", ".join(f"{size}: {number:.0f}" for size, number in row["batches"].items() if number)
            numbers = f"{row['requests/s']:12.1f}{gain:7.2f}{row['p50 ms']:9.1f}{row['p99 ms']:9.1f}{row['client CPU']:12.2f}"
            print(f"  {setting:16}{count:8}{numbers}  {batches}")
            rows[f"{setting}, {count} clients"] = row
    most = max(CLIENTS)
    print(
        f"  the action policy in a loop, no server: {alone[1]:.1f} rows/s one by one, {alone[most]:.1f} by {most} (gain {alone[most] / alone[1]:.2f})"
    )
    return {**rows, "no server, rows/s": {str(count): value for count, value in alone.items()}}


def main() -> None:
    options = arguments(__doc__)
    rounds, seconds = (1, 0.5) if options.quick else (5, 2.0)
    cases = dict(list(CASES.items())[:1]) if options.quick else CASES
    print(machine(), *(f"{name} {os.environ.get(name, 'not set')}" for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")), sep=", ")
    figures, goals = {}, []
    for name, case in cases.items():
        cells, alone = measure(case, rounds, seconds)
        figures[name] = show(f"{name} ({rounds} rounds of {seconds:g} s each, in turns)", cells, alone)
        gain = cells[DEFAULT, max(CLIENTS)].throughput / cells[DEFAULT, 1].throughput
        goals.append(Goal(f"{name}: throughput of {max(CLIENTS)} clients / one by one", gain, ">= 1.5", gain >= 1.5))
    finish(goals, figures, options.json)


if __name__ == "__main__":
    main()
