"""``tandem bench``: several servers or transports compared in one run, the same observations, turn by turn.

Each client is a process of its own with a connection to every target; the targets take turns of a fraction of a second, so that
whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from hosting.clients.client import Client, ClientOptions
from hosting.clients.examples import Embodiment, example_observation
from hosting.clients.measure import TestError, known_embodiment, reach
from hosting.clients.tls import has_certificate
from pi0.errors import TandemError

TURN_S = 0.5
"""How long a target is asked before the next one is."""

_OBSERVATIONS = 8
"""Different observations that each client sends, over and over."""


@dataclass(frozen=True)
class Load:
    """What the clients do.

    Attributes:
        clients: how many ask at once, each one request at a time.
        seconds: in all, per target.
        mode: request mode; None: the server's default.
        embodiment: of the observations; None: as each target's metadata ask.
    """

    clients: int
    seconds: float
    mode: str | None = None
    embodiment: Embodiment | None = None
    prompt: str = "pick up the red cup"


def bench(targets: Sequence[str], load: Load, options: ClientOptions) -> dict[str, Any]:
    """Ask every target for ``load.seconds``.

    Returns:
        target → ``{"requests", "p50_ms", "p95_ms", "p99_ms", "requests_per_s", "client_cpu_ms"}``; the last one is CPU time of a client per
        request, what the server needs is not visible from here.

    Raises:
        TestError: a target cannot be reached, goes away or refuses the observation; names it.
    """
    if twice := [target for index, target in enumerate(targets) if target in targets[:index]]:
        raise TestError(f"{twice[0]}: is given twice; each target has one row")
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads that are not copied
    workers = []
    try:
        for seed in range(load.clients):
            ours, theirs = context.Pipe()
            process = context.Process(target=_client, args=(theirs, list(targets), load, options, seed), daemon=True)
            process.start()
            theirs.close()
            workers.append((process, ours))
        for _, pipe in workers:
            _answer(pipe)
        return _turns(targets, load, [pipe for _, pipe in workers])
    finally:
        for process, pipe in workers:
            pipe.close()
            process.join(5)
            process.terminate()


def render(results: Mapping[str, Mapping[str, float]], load: Load) -> str:
    """The results for people; the first target is what the others are compared with."""
    width = max(len(target) for target in results)
    many = "1 client" if load.clients == 1 else f"{load.clients} clients"
    lines = [
        f"{many}, {load.seconds:g} s per target, in turns of {TURN_S:g} s",
        f"{'ms':{width}}{'p50':>10}{'p95':>10}{'p99':>10}{'p50 ratio':>11}{'requests/s':>12}{'client CPU':>12}",
    ]
    first = next(iter(results.values()))
    for target, row in results.items():
        times = "".join(f"{row[name]:10.2f}" for name in ("p50_ms", "p95_ms", "p99_ms"))
        lines.append(f"{target:{width}}{times}{row['p50_ms'] / first['p50_ms']:11.2f}{row['requests_per_s']:12.1f}{row['client_cpu_ms']:12.2f}")
    return "\n".join(lines)


def _turns(targets: Sequence[str], load: Load, pipes: Sequence[Connection]) -> dict[str, Any]:
    times: dict[str, list[float]] = {target: [] for target in targets}
    asked_s, cpu_s = dict.fromkeys(targets, 0.0), dict.fromkeys(targets, 0.0)
    turns = max(1, round(load.seconds / TURN_S))
    for _ in range(turns):
        for target in targets:
            started_s = time.perf_counter()
            for pipe in pipes:
                pipe.send((target, load.seconds / turns))
            for pipe in pipes:
                ms, cpu = _answer(pipe)
                times[target] += ms
                cpu_s[target] += cpu
            asked_s[target] += time.perf_counter() - started_s
    return {
        target: {
            "requests": len(ms),
            **{f"p{percent}_ms": float(np.percentile(ms, percent)) for percent in (50, 95, 99)},
            "requests_per_s": len(ms) / asked_s[target],
            "client_cpu_ms": cpu_s[target] / len(ms) * 1e3,
        }
        for target, ms in times.items()
    }


def _answer(pipe: Connection) -> Any:
    try:
        answer = pipe.recv()
    except EOFError:
        raise TestError("a client process ended early; see what it printed") from None
    if isinstance(answer, str):
        raise TestError(answer)
    return answer


def _client(pipe: Connection, targets: list[str], load: Load, options: ClientOptions, seed: int) -> None:
    """One client's process: says that it is connected, then serves turns until the pipe is closed. A text is what went wrong."""
    clients: dict[str, Client] = {}
    try:
        observations: dict[str, list[dict[str, Any]]] = {}
        for target in targets:
            clients[target] = reach(target, **_options_of(target, options))
            observations[target] = _observations(load.embodiment or known_embodiment(clients[target]), load, seed)
            clients[target].infer(observations[target][0])
        pipe.send(None)
        while True:
            target, seconds = pipe.recv()
            pipe.send(_turn(clients[target], observations[target], seconds))
    except TandemError as error:
        with contextlib.suppress(OSError):  # another client has told first
            pipe.send(f"{target}: {error}" if target not in str(error) else str(error))
    except (EOFError, OSError, KeyboardInterrupt):
        pass  # the run is over, for one reason or another
    finally:
        for client in clients.values():
            client.close()


def _options_of(target: str, options: ClientOptions) -> ClientOptions:
    """``options`` for one of several targets: those without a certificate are compared with those that have one."""
    return options if has_certificate(target) else {**options, "pin": None, "cafile": None}


def _observations(embodiment: Embodiment, load: Load, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    mode = {} if load.mode is None else {"mode": load.mode}
    return [{**example_observation(embodiment, rng, prompt=load.prompt), **mode} for _ in range(_OBSERVATIONS)]


def _turn(client: Client, observations: Sequence[dict[str, Any]], seconds: float) -> tuple[list[float], float]:
    """Milliseconds of each call, and the CPU seconds of all."""
    ms: list[float] = []
    cpu_s, end_s = time.process_time(), time.perf_counter() + seconds
    while not ms or time.perf_counter() < end_s:
        started_s = time.perf_counter()
        client.infer(observations[len(ms) % len(observations)])
        ms.append((time.perf_counter() - started_s) * 1e3)
    return ms, time.process_time() - cpu_s
