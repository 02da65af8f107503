"""What one client's fault costs the others: p99 of healthy robots beside it, over their p99 without it.

    python -m benchmarks.faults [--quick] [--json FILE]

Combined mode with a planner beside the control loop (``async``); planner and policy sleep, 300 ms and 20 ms for any batch; everything else is real.
Eight healthy robots ask over WebSockets at 10 Hz, by clocks that drift apart, with observations of 45 kB; their latency is the reply less the moment
when the tick was due, and none of their requests may fail. A ninth client, a process of its own, does the harm. Blocks with a fault and blocks
without take turns. A policy that hangs stops its slot, so that is shown on a service of its own: sessions of the other slot, ``/ready``, and the
exit code.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from websockets.frames import Frame, Opcode

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
)
from hosting.clients import Client, ClientError, InferenceError, connect
from hosting.config import PlannerConfig, WatchdogConfig
from hosting.policy import ObservationError
from hosting.protocol import msgpack_numpy

ROBOTS = 8
PERIOD_S = 0.1
PLANNER_S, POLICY_S = 0.3, 0.02
TIMEOUT_S = 1.0
"""``planner.timeout_s``."""
LIMIT = 1.2
SETTLE_S = 0.3
PIXELS = 71
STUCK_S, FATAL_S = 1.0, 3.0

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


# --- the service -----------------------------------------------------------------------------------------------------------------------------


class FaultyPolicy(SleepingPolicy):
    """Does what an observation's ``wrong`` says: ``request`` is found at once, ``bug`` when the model has run, ``hang`` never ends."""

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], *, seeds: Any = None) -> list[dict[str, Any]]:
        wrong = {obs.get("wrong") for obs in observations}
        if "request" in wrong:
            raise ObservationError("state: missing, expected an array of numbers")
        if "hang" in wrong:
            threading.Event().wait()
        replies = super().infer_batch(observations)
        if "bug" in wrong:
            raise ArithmeticError("actions are NaN")
        for reply, obs in zip(replies, observations, strict=True):
            if "padding" in obs:
                reply["padding"] = np.zeros((len(reply["actions"]), obs["padding"] // len(reply["actions"])), np.uint8)
        return replies


class FaultyPlanner(SleepingPlanner):
    """Raises, or hangs until told otherwise."""

    def __init__(self, seconds: float, orders: Connection) -> None:
        super().__init__(seconds)
        self._well = threading.Event()
        self._well.set()
        self._raises = False
        threading.Thread(target=self._obey, args=(orders,), daemon=True).start()

    def _obey(self, orders: Connection) -> None:
        with suppress(EOFError):
            while True:
                order = orders.recv()
                self._raises = order == "raise"
                (self._well.clear if order == "hang" else self._well.set)()
                orders.send(None)

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], **settings: Any) -> list[dict[str, Any]]:
        self._well.wait()
        if self._raises:
            raise ArithmeticError("out of memory")
        return super().infer_batch(observations, **settings)


def serve(pipe: Connection) -> None:
    """The service that has to bear it."""
    planner = PlannerConfig.model_validate({"checkpoint_dir": "none", "refresh": "async", "timeout_s": TIMEOUT_S, "scheduler": {"max_batch": 8}})
    sys.exit(run_service(service_config(planner=planner), lambda: FaultyPolicy(POLICY_S), lambda: FaultyPlanner(PLANNER_S, pipe), pipe))


def serve_watched(pipe: Connection) -> None:
    """The service whose action policy will hang."""
    config = service_config(watchdog=WatchdogConfig(stuck_after_s=STUCK_S, fatal_after_s=FATAL_S))
    sys.exit(run_service(config, lambda: FaultyPolicy(POLICY_S), lambda: SleepingPlanner(POLICY_S), pipe))


@contextmanager
def running(target: Callable[..., None], *arguments: Any) -> Iterator[tuple[BaseProcess, Connection]]:
    """``target`` in a process of its own, and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()


# --- the client that does harm ---------------------------------------------------------------------------------------------------------------


def small(**own: Any) -> dict[str, Any]:
    return {"state": np.full(14, 99.0), "prompt": "wave", "mode": "action_only", **own}


def frame(obs: Mapping[str, Any]) -> bytes:
    return Frame(Opcode.BINARY, msgpack_numpy.pack(obs)).serialize(mask=True)


def upgraded(url: str, *, receive_bytes: int | None = None) -> socket.socket:
    """A WebSocket client that does nothing by itself."""
    client = socket.socket()
    if receive_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    host, port = url.removeprefix("ws://").split(":")
    client.connect((host, int(port)))
    client.sendall(UPGRADE)
    received = b""
    while b"server_version" not in received:
        received += client.recv(1 << 16)
    return client


def killed(url: str, end_s: float) -> int:
    """Processes that are killed while their request is computed."""
    count = 0
    while time.perf_counter() < end_s:
        reading, writing = os.pipe()
        if not (victim := os.fork()):
            client = upgraded(url)
            client.sendall(frame(small(images=observation(99, "", pixels=PIXELS)["images"])))
            os.write(writing, b"!")
            signal.pause()
        os.read(reading, 1)
        time.sleep(POLICY_S / 2)
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        os.close(reading)
        os.close(writing)
        count += 1
        time.sleep(0.1)
    return count


def half_open(url: str, end_s: float) -> int:
    """Clients that have asked, and then neither read, nor answer, nor end."""
    stopped = []
    for _ in range(20):
        stopped.append(upgraded(url))
        stopped[-1].sendall(frame(small()))
    time.sleep(max(0.0, end_s - time.perf_counter()))
    for client in stopped:
        client.close()
    return len(stopped)


def slow_readers(url: str, end_s: float) -> int:
    """Clients that ask for replies of 4 MB and read them at 400 kB/s."""
    readers = [upgraded(url, receive_bytes=4096) for _ in range(4)]
    for reader in readers:
        for _ in range(3):
            reader.sendall(frame(small(padding=4_000_000)))
    while time.perf_counter() < end_s:
        for reader in readers:
            with suppress(BlockingIOError):
                reader.recv(4096, socket.MSG_DONTWAIT)
        time.sleep(0.01)
    for reader in readers:
        reader.close()
    return len(readers)


def failing(wrong: str, url: str, end_s: float) -> int:
    """A robot at 10 Hz every third of whose requests is wrong."""
    failed = 0
    numbers = itertools.count()

    def ask() -> dict[str, Any]:
        nonlocal failed
        try:
            return client.infer(small(wrong=wrong) if next(numbers) % 3 == 2 else small())
        except InferenceError:
            failed += 1
            return {}

    with connect(url) as client:
        by_the_clock(ask, period_s=PERIOD_S * 0.996, start_s=time.perf_counter(), end_s=end_s)
    return failed


def newcomer(url: str, end_s: float) -> list[float]:
    """A robot at 10 Hz that has no subtask yet; its latencies in ms."""
    with connect(url) as client:
        obs = observation(98, "wave", pixels=PIXELS)
        return by_the_clock(partial(infer, client, obs), period_s=PERIOD_S, start_s=time.perf_counter(), end_s=end_s).latencies_ms


def flood(url: str, end_s: float) -> int:
    """Four connections that send as fast as they are let."""
    request = frame(small())
    clients = [upgraded(url) for _ in range(4)]
    sent = 0
    for client in clients:
        client.setblocking(False)
    rest = dict.fromkeys(clients, b"")
    while time.perf_counter() < end_s:
        readable, writable, _ = select.select(clients, clients, [], 0.01)
        for client in readable:
            with suppress(BlockingIOError):
                client.recv(1 << 16)
        for client in writable:
            data = rest[client] or request * 8
            with suppress(BlockingIOError):
                count = client.send(data)
                sent += count
                rest[client] = data[count:]
    for client in clients:
        client.close()
    return sent // len(request)


OFFENCES: dict[str, Callable[[str, float], Any]] = {
    "clients killed in an inference": killed,
    "half-open clients": half_open,
    "slow readers": slow_readers,
    "requests refused at once": partial(failing, "request"),
    "requests that fail at the end": partial(failing, "bug"),
    "planner raises": newcomer,
    "planner hangs": newcomer,
    "flood": flood,
}

ORDERS = {"planner raises": "raise", "planner hangs": "hang"}


def offend(url: str, pipe: Connection) -> None:
    """For each ``(fault, seconds)`` that comes, what it did goes back."""
    pipe.send(None)
    while True:
        fault, seconds = pipe.recv()
        pipe.send(OFFENCES[fault](url, time.perf_counter() + seconds))


# --- the healthy robots ----------------------------------------------------------------------------------------------------------------------


class Healthy:
    """Robots at 10 Hz whose clocks drift apart."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self._clients = clients
        self._random = np.random.default_rng(0)
        self._observations = [observation(robot, f"clear table {robot}", pixels=PIXELS) for robot in range(len(clients))]
        side_by_side([partial(infer, client, obs) for client, obs in zip(clients, self._observations, strict=True)])  # their first subtasks

    def block(self, seconds: float) -> list[float]:
        """Latencies in ms. A request that fails fails the benchmark."""
        start_s = time.perf_counter() + 0.02

        def robot(index: int, phase: float) -> Ticks:
            period_s = PERIOD_S * (1 + 0.01 * (index - len(self._clients) / 2))
            first_s = start_s + phase * period_s
            return by_the_clock(
                partial(infer, self._clients[index], self._observations[index]), period_s=period_s, start_s=first_s, end_s=start_s + seconds
            )

        phases = self._random.random(len(self._clients))
        ticks = side_by_side([partial(robot, index, phase) for index, phase in enumerate(phases)])
        return [ms for robot_ticks in ticks for ms in robot_ticks.latencies_ms]


def measure(rounds: int, seconds: float, calm_s: float) -> tuple[list[float], dict[str, list[float]], dict[str, list[Any]]]:
    """Latencies without a fault, with each of them, and what the offender says that it did."""
    calm: list[float] = []
    beside: dict[str, list[float]] = {fault: [] for fault in OFFENCES}
    done: dict[str, list[Any]] = {fault: [] for fault in OFFENCES}
    with ExitStack() as stack:
        _, service = stack.enter_context(running(serve))
        url = service.recv()["action"]
        _, offender = stack.enter_context(running(offend, url))
        offender.recv()
        healthy = Healthy([stack.enter_context(connect(url, session_id=f"healthy {robot}")) for robot in range(ROBOTS)])
        for _ in range(rounds):
            for fault in OFFENCES:
                calm += healthy.block(calm_s)
                if fault in ORDERS:
                    service.send(ORDERS[fault])
                    service.recv()
                offender.send((fault, seconds + SETTLE_S))
                time.sleep(SETTLE_S)
                beside[fault] += healthy.block(seconds)
                if fault in ORDERS:
                    service.send("well")
                    service.recv()
                done[fault].append(offender.recv())
                time.sleep(SETTLE_S)
    return calm, beside, done


def hang(seconds: float) -> dict[str, float]:
    """The action policy hangs: how the planner's sessions fare, when ``/ready`` tells, and how the process ends."""
    with ExitStack() as stack:
        process, service = stack.enter_context(running(serve_watched))
        addresses = service.recv()
        clients = [stack.enter_context(connect(addresses["planner"], session_id=f"planner {robot}")) for robot in range(ROBOTS)]
        observations = [observation(robot, f"clear table {robot}", pixels=PIXELS) for robot in range(ROBOTS)]

        def block() -> list[float]:
            start_s = time.perf_counter() + 0.02
            asks = [partial(client.infer, obs) for client, obs in zip(clients, observations, strict=True)]
            robots = [
                partial(by_the_clock, ask, period_s=PERIOD_S * (1 + 0.01 * index), start_s=start_s + 0.013 * index, end_s=start_s + seconds)
                for index, ask in enumerate(asks)
            ]
            return [ms for ticks in side_by_side(robots) for ms in ticks.latencies_ms]

        block()
        before = block()
        hung_s = time.perf_counter()
        victim = stack.enter_context(connect(addresses["action"], retry_lost=False))
        answered: list[str] = []

        def ask() -> None:
            try:
                victim.infer(small(wrong="hang"))
            except ClientError as error:
                answered.append(str(error))

        asking = threading.Thread(target=ask)
        asking.start()
        during, stuck_s = side_by_side([block, partial(until_stuck, addresses["admin"])])
        stuck_s -= hung_s
        process.join(30)
        ended_s = time.perf_counter() - hung_s
        asking.join()
    assert process.exitcode is not None, "the process does not end"
    assert "".join(answered).startswith("internal error"), answered
    p99 = {name: float(np.percentile(ms, 99)) for name, ms in (("before", before), ("during", during))}
    return {
        "p99 before ms": p99["before"],
        "p99 ms": p99["during"],
        "not ready after s": stuck_s,
        "ended after s": ended_s,
        "exit code": process.exitcode,
    }


def until_stuck(admin: str) -> float:
    """When ``/ready`` first says so."""
    while True:
        try:
            urllib.request.urlopen(f"{admin}/ready", timeout=10).close()
        except urllib.error.HTTPError as error:
            if error.code != 503 or b"stuck" not in error.read():
                raise
            return time.perf_counter()
        time.sleep(0.01)


def main() -> None:
    options = arguments(__doc__)
    rounds, seconds, calm_s = (1, 2.0, 1.0) if options.quick else (5, 5.0, 2.0)
    print(machine())
    calm, beside, done = measure(rounds, seconds, calm_s)
    base = {f"p{percent}": float(np.percentile(calm, percent)) for percent in (50, 99)}
    print(f"\n{ROBOTS} healthy robots at 10 Hz, ms ({rounds} rounds of {seconds:g} s per fault, in turns)")
    print(f"  {'beside':32}{'p50':>9}{'p99':>9}{'p99 ratio':>11}{'samples':>9}")
    print(f"  {'nothing':32}{base['p50']:9.2f}{base['p99']:9.2f}{1:11.2f}{len(calm):9}")
    figures: dict[str, Any] = {"nothing": {**base, "samples": len(calm)}}
    goals = []
    for fault, latencies_ms in beside.items():
        row = {f"p{percent}": float(np.percentile(latencies_ms, percent)) for percent in (50, 99)}
        ratio = row["p99"] / base["p99"]
        figures[fault] = {**row, "p99 ratio": ratio, "samples": len(latencies_ms)}
        said = done[fault]
        if fault in ORDERS:
            newcomers_ms = [ms for latencies in said for ms in latencies]
            figures[fault]["newcomer p50 ms"] = float(np.median(newcomers_ms))
            note = f"  a robot without a subtask: p50 {np.median(newcomers_ms):.0f} ms, max {max(newcomers_ms):.0f}"
        else:
            figures[fault]["times"] = sum(said)
            note = f"  {sum(said)} times"
        print(f"  {fault:32}{row['p50']:9.2f}{row['p99']:9.2f}{ratio:11.2f}{len(latencies_ms):9}{note}")
        goals.append(Goal(f"{fault}: healthy p99 with / without", ratio, f"<= {LIMIT}", ratio <= LIMIT))
    hung = figures["policy hangs"] = hang(min(seconds, FATAL_S - 1))
    print(f"\na policy that hangs (stuck_after_s {STUCK_S:g}, fatal_after_s {FATAL_S:g})")
    for name, value in hung.items():
        print(f"  {name:20}{value:9.2f}")
    ratio = hung["p99 ms"] / hung["p99 before ms"]
    goals.append(Goal("policy hangs: p99 of the other slot's sessions with / without", ratio, f"<= {LIMIT}", ratio <= LIMIT))
    goals.append(Goal("policy hangs: exit code", hung["exit code"], "1", hung["exit code"] == 1))
    finish(goals, figures, options.json)


if __name__ == "__main__":
    main()
