"""What serving costs on top of a policy: round trips of a no-op policy, ours beside openpi's server design in one run.

    python -m benchmarks.overhead [--quick] [--json FILE]

The peer is openpi's design (``benchmarks/openpi_design.py``): an asyncio ``websockets`` server that unpacks, calls the policy inline in
its event loop and packs. Both servers run in processes of their own on loopback; the same stock client talks to them in turn. The
observation is three 224² uint8 cameras, a state and a prompt (452 kB); the reply a chunk of 50 × 32 float64. A second part asks how
soon ``/healthz`` answers while an inference of 300 ms runs.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.openpi_design import StockClient, serve_inline
from benchmarks.report import Goal, arguments, finish, machine
from hosting.config import ActionConfig, ActionTransportConfig, ServiceConfig
from hosting.service import Loaders, Service

SLOW_S = 0.3
CHUNK = np.random.default_rng(0).standard_normal((50, 32))


class NoOp:
    """A policy that answers at once, or sleeps when the observation says so."""

    metadata: dict[str, Any] = {}  # noqa: RUF012 - never modified
    default_prompt = None

    def infer(self, obs: Any) -> dict[str, Any]:
        if "sleep_s" in obs:
            time.sleep(obs["sleep_s"])
        return {"actions": CHUNK}


def serve_ours(ready: Connection) -> None:
    """Our service with the no-op policy."""

    async def main() -> None:
        config = ServiceConfig(
            action=ActionConfig(model_config_name="no-op", checkpoint_dir="none"),
            action_transport=ActionTransportConfig(websocket_port=0, quic_port=None, unix_socket_path=None),
        )
        service = Service(config, loaders=Loaders(lambda config: NoOp(), lambda config: NoOp()))
        serving = asyncio.create_task(service.serve())
        await service.ready.wait()
        ready.send(service.addresses["action"])
        await serving

    asyncio.run(main())


def serve_peer(ready: Connection) -> None:
    """openpi's server design with the no-op policy."""
    serve_inline(NoOp(), ready.send)


@contextmanager
def running(target: Any) -> Iterator[str]:
    """``target`` in a process of its own; yields its URL."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join(10)


def observation() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    images = {camera: rng.integers(0, 256, (224, 224, 3), np.uint8) for camera in cameras}
    return {"images": images, "state": rng.random(14), "prompt": "pick up the red cup"}


def round_trips(clients: dict[str, StockClient], rounds: int, calls: int) -> dict[str, list[float]]:
    """Milliseconds per call; the servers take turns, a block of calls each."""
    obs = observation()
    times: dict[str, list[float]] = {name: [] for name in clients}
    for _ in range(rounds):
        for name, client in clients.items():
            for _ in range(5):
                client.infer(obs)
            for _ in range(calls):
                started_s = time.perf_counter()
                client.infer(obs)
                times[name].append((time.perf_counter() - started_s) * 1e3)
    return times


def health_under_load(url: str, probes: int) -> list[float]:
    """Milliseconds until ``/healthz`` answers while inferences of 300 ms follow each other."""
    health = url.replace("ws://", "http://") + "/healthz"
    stop = threading.Event()

    def load() -> None:
        client = StockClient(url)
        while not stop.is_set():
            client.infer({"prompt": "x", "sleep_s": SLOW_S})
        client.close()

    thread = threading.Thread(target=load)
    thread.start()
    times = []
    try:
        for _ in range(probes):
            started_s = time.perf_counter()
            with urllib.request.urlopen(health, timeout=30) as answer:
                answer.read()
            times.append((time.perf_counter() - started_s) * 1e3)
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join()
    return times


def percentile(values: list[float], percent: float) -> float:
    return float(np.percentile(values, percent))


def main() -> None:
    options = arguments(__doc__)
    rounds, calls = (10, 60) if options.quick else (30, 150)
    probes = {"tandem": 150 if options.quick else 500, "openpi design": 15 if options.quick else 40}
    print(machine())
    with running(serve_ours) as ours, running(serve_peer) as peer:
        urls = {"tandem": ours, "openpi design": peer}
        clients = {name: StockClient(url) for name, url in urls.items()}
        times = round_trips(clients, rounds, calls)
        for client in clients.values():
            client.close()
        health = {name: health_under_load(url, probes[name]) for name, url in urls.items()}
    figures: dict[str, Any] = {}
    print(f"\nround trip of a no-op policy, ms ({rounds} × {calls} calls each, interleaved)")
    print(f"  {'':14}{'p50':>9}{'p95':>9}{'p99':>9}")
    for name, ms in times.items():
        row = {f"p{p}": percentile(ms, p) for p in (50, 95, 99)}
        figures[f"round trip ms, {name}"] = row
        print(f"  {name:14}" + "".join(f"{value:9.3f}" for value in row.values()))
    print(f"\n/healthz while inferences of {SLOW_S * 1e3:.0f} ms run, ms")
    for name, ms in health.items():
        row = {f"p{p}": percentile(ms, p) for p in (50, 95, 99)}
        figures[f"healthz ms, {name}"] = row
        print(f"  {name:14}" + "".join(f"{value:9.3f}" for value in row.values()))
    ratio = statistics.median(times["tandem"]) / statistics.median(times["openpi design"])
    health_p99 = percentile(health["tandem"], 99)
    goals = [
        Goal("round trip p50, share of openpi's design", ratio, "<= 0.8", ratio <= 0.8),
        Goal("/healthz p99 under load, ms", health_p99, "<= 20", health_p99 <= 20),
    ]
    finish(goals, figures, options.json)


if __name__ == "__main__":
    main()
