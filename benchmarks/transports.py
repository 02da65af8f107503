"""What each transport costs: round trips of a no-op policy over all of ours, beside openpi's server design, in one run.

    python -m benchmarks.transports [--quick] [--json FILE]

The peer is openpi's design with its stock client (``benchmarks/openpi_design.py``), plain and with TLS. Servers run in processes of their own on
loopback; all clients live in this one and take turns, another one first in each round. Observations are three square uint8 cameras, a state and a
prompt: 452 kB (224²), 600 kB and 45 kB; the reply is a chunk of 50 × 25 float64, 10 kB. CPU time is that of the whole process, threads and kernel
included, per request. Congestion control does not matter here: nothing is lost on loopback.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.openpi_design import StockClient, serve_inline
from benchmarks.report import Goal, arguments, finish, machine
from hosting.certificates import CERTIFICATE_FILE, KEY_FILE, Certificate, local_certificate
from hosting.clients import connect
from hosting.config import ActionConfig, ActionTransportConfig, ServiceConfig, TLSConfig
from hosting.service import Loaders, Service

CHUNK = np.random.default_rng(0).standard_normal((50, 25))
CAMERA_PIXELS = {"452 kB": 224, "600 kB": 258, "45 kB": 71}
"""Observation → height and width of its cameras."""

PEER, PEER_TLS = "openpi design", "openpi design, TLS"
STOCK, WEBSOCKET, WSS, UNIX, QUIC = "WebSocket, stock client", "WebSocket", "WSS", "Unix socket", "QUIC"
WARM_UP_CALLS = 3


class Asking(Protocol):
    """A client, ours or the peer's."""

    def infer(self, obs: Any, /) -> Any: ...

    def close(self) -> None: ...


class NoOp:
    """A policy that answers at once."""

    metadata: dict[str, Any] = {"action_horizon": len(CHUNK)}  # noqa: RUF012 - never modified
    default_prompt = None

    def infer(self, obs: Any) -> dict[str, Any]:
        return {"actions": CHUNK}


@dataclass(frozen=True)
class Server:
    """A server process: its id, and endpoint → URL."""

    pid: int
    addresses: Mapping[str, str]


def serve_peer(tls_directory: Path | None, ready: Connection) -> None:
    """openpi's server design."""
    context = None
    if tls_directory is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls_directory / CERTIFICATE_FILE, tls_directory / KEY_FILE)
    serve_inline(NoOp(), lambda url: ready.send(Server(os.getpid(), {"action": url})), tls=context)


def serve_ours(directory: Path, tls: bool, ready: Connection) -> None:
    """Our service: on every transport, or (``tls``) on WSS alone."""

    async def main() -> None:
        transport = ActionTransportConfig(
            websocket_port=0, quic_port=None if tls else 0, unix_socket_path=None if tls else str(directory / "action.sock")
        )
        config = ServiceConfig(
            action=ActionConfig(model_config_name="no-op", checkpoint_dir="none"),
            action_transport=transport,
            quic_certificate_dir=str(directory),
            tls=TLSConfig(certificate=str(directory / CERTIFICATE_FILE), private_key=str(directory / KEY_FILE)) if tls else None,
        )
        service = Service(config, loaders=Loaders(lambda config: NoOp(), lambda config: NoOp()))
        serving = asyncio.create_task(service.serve())
        await service.ready.wait()
        ready.send(Server(os.getpid(), service.addresses))
        await serving

    asyncio.run(main())


@contextmanager
def running(serve: Callable[[Connection], None]) -> Iterator[Server]:
    """``serve`` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join(10)


@dataclass
class Subject:
    """A client and the process that answers it."""

    client: Asking
    server_pid: int


@dataclass
class Row:
    """What one client saw: milliseconds of each call, and CPU seconds of both processes over all of them."""

    times_ms: list[float] = field(default_factory=list)
    client_cpu_s: float = 0.0
    server_cpu_s: float = 0.0

    @property
    def p50(self) -> float:
        return float(np.percentile(self.times_ms, 50))

    def figures(self) -> dict[str, float]:
        """Milliseconds."""
        calls = len(self.times_ms)
        return {
            **{f"p{percent}": float(np.percentile(self.times_ms, percent)) for percent in (50, 95, 99)},
            "client CPU": self.client_cpu_s / calls * 1e3,
            "server CPU": self.server_cpu_s / calls * 1e3,
        }


@contextmanager
def subjects(directory: Path) -> Iterator[dict[str, Subject]]:
    """Every client, connected."""
    certificate: Certificate = local_certificate(directory)
    with ExitStack() as stack:
        peer, peer_tls, ours, ours_tls = (
            stack.enter_context(running(serve))
            for serve in (
                partial(serve_peer, None),
                partial(serve_peer, directory),
                partial(serve_ours, directory, False),
                partial(serve_ours, directory, True),
            )
        )
        trusting = ssl.create_default_context(cafile=directory / CERTIFICATE_FILE)
        made = {
            PEER: Subject(StockClient(peer.addresses["action"]), peer.pid),
            PEER_TLS: Subject(StockClient(peer_tls.addresses["action"], tls=trusting), peer_tls.pid),
            STOCK: Subject(StockClient(ours.addresses["action"]), ours.pid),
            WEBSOCKET: Subject(connect(ours.addresses["action"]), ours.pid),
            WSS: Subject(connect(ours_tls.addresses["action"], pin=certificate.sha256), ours_tls.pid),
            UNIX: Subject(connect(ours.addresses["action unix"]), ours.pid),
            QUIC: Subject(connect(ours.addresses["action quic"], pin=certificate.sha256), ours.pid),
        }
        for subject in made.values():
            stack.callback(subject.client.close)
        yield made


def observation(pixels: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    images = {camera: rng.integers(0, 256, (pixels, pixels, 3), np.uint8) for camera in cameras}
    return {"images": images, "state": rng.random(14), "prompt": "pick up the red cup"}


def take_turns(clients: Mapping[str, Subject], obs: dict[str, Any], rounds: int, calls: int) -> dict[str, Row]:
    """Rounds in which each client has one turn; another one begins each round. The first calls of a turn do not count."""
    rows = {name: Row() for name in clients}
    names = list(clients)
    for _ in range(rounds):
        for name in names:
            row, client, server_pid = rows[name], clients[name].client, clients[name].server_pid
            for _ in range(WARM_UP_CALLS):
                assert np.array_equal(client.infer(obs)["actions"], CHUNK)
            client_cpu_s, server_cpu_s = time.process_time(), cpu_s(server_pid)
            for _ in range(calls):
                started_s = time.perf_counter()
                client.infer(obs)
                row.times_ms.append((time.perf_counter() - started_s) * 1e3)
            row.client_cpu_s += time.process_time() - client_cpu_s
            row.server_cpu_s += cpu_s(server_pid) - server_cpu_s
        names = [*names[1:], names[0]]
    return rows


def cpu_s(pid: int) -> float:
    """CPU seconds of another process so far, to the nanosecond; ``/proc/PID/stat`` counts in steps of 10 ms (clock_getcpuclockid(3), Linux)."""
    return time.clock_gettime(~pid << 3 | 2)


def goals_of(rows: Mapping[str, Mapping[str, Row]]) -> list[Goal]:
    """Ours beside openpi's design, p50."""

    def ratio(size: str, ours: str, peer: str, limit: float) -> Goal:
        value = rows[size][ours].p50 / rows[size][peer].p50
        return Goal(f"{size}, {ours} / {peer}", value, f"<= {limit}", value <= limit)

    return [
        ratio("452 kB", STOCK, PEER, 0.8),
        ratio("452 kB", WEBSOCKET, PEER, 0.8),
        ratio("452 kB", UNIX, PEER, 0.15),
        ratio("600 kB", QUIC, PEER, 1.1),
        ratio("600 kB", QUIC, PEER_TLS, 1.0),
    ]


def main() -> None:
    options = arguments(__doc__)
    rounds, calls = (14, 30) if options.quick else (40, 100)
    print(machine())
    with tempfile.TemporaryDirectory(prefix="tandem-") as directory, subjects(Path(directory)) as clients:
        rows = {size: take_turns(clients, observation(pixels), rounds, calls) for size, pixels in CAMERA_PIXELS.items()}
    figures: dict[str, Any] = {}
    for size, measured in rows.items():
        print(f"\n{size}, round trip of a no-op policy, ms ({rounds} × {calls} calls each, in turns)")
        print(f"  {'':24}{'p50':>9}{'p95':>9}{'p99':>9}{'ratio':>9}{'client CPU':>12}{'server CPU':>12}")
        for name, row in measured.items():
            values = row.figures()
            ratio = row.p50 / measured[PEER].p50
            figures[f"{size}, {name}"] = {**values, "p50 ratio": ratio}
            times = "".join(f"{values[key]:9.3f}" for key in ("p50", "p95", "p99"))
            print(f"  {name:24}{times}{ratio:9.2f}{values['client CPU']:12.3f}{values['server CPU']:12.3f}")
    finish(goals_of(rows), figures, options.json)


if __name__ == "__main__":
    main()
