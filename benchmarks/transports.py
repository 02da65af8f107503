"""What each transport costs: round trips of a no-op policy over all of ours, beside openpi's server design, in one run.

    python -m benchmarks.transports [--quick] [--json FILE]

The peer is openpi's design with its stock client (``benchmarks/openpi_design.py``), plain and with TLS. Servers and clients are processes of their
own on loopback, so that no client finds memory or threads that another one has left; the clients take turns, another one first in each round. A turn
begins with calls that do not count, until the kernel has put two processes that work side by side on different cores.
Observations are three square uint8 cameras, a state and a prompt: 452 kB (224²), 600 kB and 45 kB; the reply is a chunk of 50 × 25 float64, 10 kB.
CPU time is that of the whole process, threads and kernel included, per request. Congestion control does not matter here: nothing is lost on loopback.
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
from hosting.certificates import CERTIFICATE_FILE, KEY_FILE, local_certificate
from hosting.clients import connect
from hosting.config import ActionConfig, ActionTransportConfig, ServiceConfig, TLSConfig
from hosting.service import Loaders, Service

CHUNK = np.random.default_rng(0).standard_normal((50, 25))
CAMERA_PIXELS = {"452 kB": 224, "600 kB": 258, "45 kB": 71}
"""Observation → height and width of its cameras."""

PEER, PEER_TLS = "openpi design", "openpi design, TLS"
STOCK, WEBSOCKET, WSS, UNIX, QUIC = "WebSocket, stock client", "WebSocket", "WSS", "Unix socket", "QUIC"
WARM_UP_S = 0.15


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


@dataclass(frozen=True)
class Turn:
    """What a client did: milliseconds of each call, and CPU seconds of its process and the server's over all of them."""

    times_ms: list[float]
    client_cpu_s: float
    server_cpu_s: float


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


def stock_client(url: str, cafile: Path | None) -> Asking:
    """openpi-client's way of talking."""
    return StockClient(url, tls=ssl.create_default_context(cafile=cafile) if cafile else None)


def our_client(url: str, pin: str | None) -> Asking:
    """Ours, with its defaults."""
    return connect(url, pin=pin)


def ask(make: Callable[[], Asking], server_pid: int, pipe: Connection) -> None:
    """A client's process: for each ``(pixels, calls)`` that comes, a :class:`Turn` goes back."""
    client = make()
    pipe.send(None)
    while True:
        pixels, calls = pipe.recv()
        obs = observation(pixels)
        begins_s = time.perf_counter() + WARM_UP_S
        while time.perf_counter() < begins_s:
            assert np.array_equal(client.infer(obs)["actions"], CHUNK)
        times_ms = []
        client_cpu_s, server_cpu_s = time.process_time(), cpu_s(server_pid)
        for _ in range(calls):
            started_s = time.perf_counter()
            client.infer(obs)
            times_ms.append((time.perf_counter() - started_s) * 1e3)
        pipe.send(Turn(times_ms, time.process_time() - client_cpu_s, cpu_s(server_pid) - server_cpu_s))


def observation(pixels: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    images = {camera: rng.integers(0, 256, (pixels, pixels, 3), np.uint8) for camera in cameras}
    return {"images": images, "state": rng.random(14), "prompt": "pick up the red cup"}


def cpu_s(pid: int) -> float:
    """CPU seconds of another process so far, to the nanosecond; ``/proc/PID/stat`` counts in steps of 10 ms (clock_getcpuclockid(3), Linux)."""
    return time.clock_gettime(~pid << 3 | 2)


@contextmanager
def running(target: Callable[[Connection], None]) -> Iterator[tuple[Any, Connection]]:
    """``target`` in a process of its own; yields what it says when it is ready, and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    try:
        yield ours.recv(), ours
    finally:
        process.terminate()
        process.join(10)


@contextmanager
def connected(directory: Path) -> Iterator[dict[str, Connection]]:
    """Name → pipe to that client."""
    pin, cafile = local_certificate(directory).sha256, directory / CERTIFICATE_FILE
    with ExitStack() as stack:

        def server(serve: Callable[[Connection], None]) -> Server:
            announced: Server = stack.enter_context(running(serve))[0]
            return announced

        peer, peer_tls = server(partial(serve_peer, None)), server(partial(serve_peer, directory))
        ours, ours_tls = server(partial(serve_ours, directory, False)), server(partial(serve_ours, directory, True))
        clients: dict[str, tuple[Callable[[], Asking], Server]] = {
            PEER: (partial(stock_client, peer.addresses["action"], None), peer),
            PEER_TLS: (partial(stock_client, peer_tls.addresses["action"], cafile), peer_tls),
            STOCK: (partial(stock_client, ours.addresses["action"], None), ours),
            WEBSOCKET: (partial(our_client, ours.addresses["action"], None), ours),
            WSS: (partial(our_client, ours_tls.addresses["action"], pin), ours_tls),
            UNIX: (partial(our_client, ours.addresses["action unix"], None), ours),
            QUIC: (partial(our_client, ours.addresses["action quic"], pin), ours),
        }
        yield {name: stack.enter_context(running(partial(ask, make, server.pid)))[1] for name, (make, server) in clients.items()}


@dataclass
class Row:
    """All turns of one client."""

    turns: list[Turn] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Milliseconds."""
        times_ms = [ms for turn in self.turns for ms in turn.times_ms]
        return {
            **{f"p{percent}": float(np.percentile(times_ms, percent)) for percent in (50, 95, 99)},
            "client CPU": sum(turn.client_cpu_s for turn in self.turns) / len(times_ms) * 1e3,
            "server CPU": sum(turn.server_cpu_s for turn in self.turns) / len(times_ms) * 1e3,
        }


def take_turns(clients: Mapping[str, Connection], pixels: int, rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Rounds in which each client has one turn; name → its figures."""
    rows = {name: Row() for name in clients}
    names = list(clients)
    for _ in range(rounds):
        for name in names:
            clients[name].send((pixels, calls))
            rows[name].turns.append(clients[name].recv())
        names = [*names[1:], names[0]]
    return {name: row.figures() for name, row in rows.items()}


def goals_of(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Goal]:
    """Ours beside openpi's design, p50."""

    def ratio(size: str, ours: str, peer: str, limit: float) -> Goal:
        value = rows[size][ours]["p50"] / rows[size][peer]["p50"]
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
    rounds, calls = (6, 70) if options.quick else (20, 200)
    print(machine())
    with tempfile.TemporaryDirectory(prefix="tandem-") as directory, connected(Path(directory)) as clients:
        rows = {size: take_turns(clients, pixels, rounds, calls) for size, pixels in CAMERA_PIXELS.items()}
    for size, measured in rows.items():
        print(f"\n{size}, round trip of a no-op policy, ms ({rounds} × {calls} calls each, in turns)")
        print(f"  {'':24}{'p50':>9}{'p95':>9}{'p99':>9}{'ratio':>9}{'client CPU':>12}{'server CPU':>12}")
        for name, figures in measured.items():
            times = "".join(f"{figures[key]:9.3f}" for key in ("p50", "p95", "p99"))
            ratio = figures["p50"] / measured[PEER]["p50"]
            print(f"  {name:24}{times}{ratio:9.2f}{figures['client CPU']:12.3f}{figures['server CPU']:12.3f}")
    finish(goals_of(rows), rows, options.json)


if __name__ == "__main__":
    main()
