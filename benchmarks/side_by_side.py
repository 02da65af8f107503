"""Action calls while the planner works on the same cores, with torch's own number of threads and with ours.

    python -m benchmarks.side_by_side [--quick] [--json FILE]

Combined service on the demo's pair (CPU). One client asks for actions alone (``action_only``), first with the planner idle, then
while another client keeps the planner busy. The peer is torch's default, as many threads as cores, whose threads wait spinning;
the service gives torch half of the cores beside a planner (hosting/service.py). Both run in processes of their own, one after the other.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.report import Goal, arguments, finish, machine
from demo.episodes import new_table
from demo.serving import demo_config
from hosting.clients.client import Client
from hosting.service import Service


def serve(ready: Connection, omp_threads: int | None) -> None:
    """The combined service; ``omp_threads`` as a user would set OMP_NUM_THREADS."""
    os.environ.pop("OMP_NUM_THREADS", None)
    if omp_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(omp_threads)
    config = demo_config(free_ports=True)

    async def main() -> None:
        service = Service(config)
        serving = asyncio.create_task(service.serve())
        await service.ready.wait()
        ready.send(dict(service.addresses))
        await serving

    asyncio.run(main())


def observation() -> dict[str, Any]:
    """The table at the beginning of an episode, and what is asked there."""
    obs, info = new_table().reset(seed=0)
    return {**obs, "prompt": info["instruction"]}


def action_calls(url: str, calls: int) -> list[float]:
    """Milliseconds of each call."""
    times = []
    obs = {**observation(), "mode": "action_only"}
    with Client(url) as client:
        for _ in range(calls + 3):
            started_s = time.perf_counter()
            client.infer(obs)
            times.append((time.perf_counter() - started_s) * 1e3)
    return times[3:]


def measure(omp_threads: int | None, calls: int) -> dict[str, dict[str, float]]:
    """p50 and p99 of action calls, with the planner idle and busy."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, omp_threads), daemon=True)
    process.start()
    try:
        addresses = ours.recv()
        stop = threading.Event()

        def plan() -> None:
            obs = observation()
            with Client(addresses["planner"]) as client:
                while not stop.is_set():
                    client.infer(obs)

        idle = action_calls(addresses["action"], calls)
        busy_planner = threading.Thread(target=plan)
        busy_planner.start()
        try:
            busy = action_calls(addresses["action"], calls)
        finally:
            stop.set()
            busy_planner.join()
    finally:
        process.terminate()
        process.join(10)
    return {name: {f"p{p}": float(np.percentile(ms, p)) for p in (50, 99)} for name, ms in (("planner idle", idle), ("planner busy", busy))}


def main() -> None:
    options = arguments(__doc__)
    calls = 60 if options.quick else 120
    print(machine())
    settings: dict[str, int | None] = {"torch's default": os.cpu_count(), "tandem": None}
    figures: dict[str, Any] = {name: measure(threads, calls) for name, threads in settings.items()}
    print(f"\naction calls, ms ({calls} each)")
    print(f"  {'':18}{'idle p50':>10}{'idle p99':>10}{'busy p50':>10}{'busy p99':>10}")
    for name, rows in figures.items():
        print(f"  {name:18}" + "".join(f"{rows[state][p]:10.1f}" for state in ("planner idle", "planner busy") for p in ("p50", "p99")))
    ratio = figures["tandem"]["planner busy"]["p99"] / figures["torch's default"]["planner busy"]["p99"]
    finish([Goal("busy p99, share of torch's default", ratio, "<= 1", ratio <= 1)], figures, options.json)


if __name__ == "__main__":
    main()
