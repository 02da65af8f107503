"""Requests over a slow, long and lossy link: ours on QUIC and WebSocket beside openpi's design, in one run for each link.

    python -m benchmarks.lossy [--quick] [--json FILE]

The link is emulated (``benchmarks/link``): 100 Mbit/s, RTT 20 and 60 ms, 0, 0.5 or 2 % of the packets lost in each direction, independently. Servers
with a no-op policy are on one side, each in a process of its own; the clients take turns on the other. Two patterns:

* back to back: three raw 224² cameras, 452 kB. "QUIC + JPEG" is handed the same observation and sends it as our client does with
  ``encode="jpeg"``.
* the robot's own: the cameras as JPEG of quality 90, 45 kB, and 0.3 s of pause before each request.

The peer is openpi's design (``benchmarks/openpi_design.py``) with its stock client over TCP cubic, what nearly all machines have, on both ends,
whatever this kernel's own default is; our WebSocket chooses BBR for itself. Each turn begins with a request that is not counted.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np

from benchmarks.link.emulator import EmulatedLink, Side, Traffic, emulated_link
from benchmarks.openpi_design import StockClient, serve_inline
from benchmarks.overhead import CHUNK, percentile
from hosting.certificates import local_certificate
from hosting.clients import connect
from hosting.config import ActionConfig, ActionTransportConfig, ServiceConfig
from hosting.protocol import jpeg
from hosting.service import Loaders, Service

RATE_MBIT = 100
QUEUE_PACKETS = 1000
PAUSE_S = 0.3
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
PEER_CONGESTION_CONTROL = "cubic"
NOISE = 8.0
"""Standard deviation of the camera noise; with it a camera is 15 kB as JPEG."""

STOCK, WEBSOCKET, QUIC, QUIC_8, QUIC_JPEG = "stock WebSocket", "our WebSocket", "QUIC", "QUIC × 8", "QUIC + JPEG"
BACK_TO_BACK, ROBOT = "back to back", "robot"


class Asking(Protocol):
    """A client, ours or the peer's."""

    def infer(self, obs: Any, /) -> Any: ...

    def close(self) -> None: ...


class NoOp:
    """A policy that answers at once."""

    metadata: dict[str, Any] = {  # noqa: RUF012 - never modified
        "action_horizon": len(CHUNK),
        "image_specs": [{"path": ["images", camera], "target_shape": [224, 224, 3], "dtype": "uint8"} for camera in CAMERAS],
    }
    default_prompt = None

    def infer(self, obs: Any) -> dict[str, Any]:
        return {"actions": CHUNK}


def serve_ours(ready: Connection) -> None:
    """Our service; says where it listens and which certificate it has."""

    async def main(directory: Path) -> None:
        config = ServiceConfig(
            action=ActionConfig(model_config_name="no-op", checkpoint_dir="none"),
            action_transport=ActionTransportConfig(websocket_port=0, quic_port=0, unix_socket_path=None),
            host="0.0.0.0",
            quic_certificate_dir=str(directory),
        )
        service = Service(config, loaders=Loaders(lambda config: NoOp(), lambda config: NoOp()))
        serving = asyncio.create_task(service.serve())
        await service.ready.wait()
        ready.send({"pin": local_certificate(directory).sha256, **service.addresses})
        await serving

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(Path(directory)))


def serve_peer(ready: Connection) -> None:
    """openpi's server design."""
    with tcp_default(PEER_CONGESTION_CONTROL):
        serve_inline(NoOp(), ready.send, host="0.0.0.0")


@contextmanager
def tcp_default(congestion_control: str) -> Iterator[None]:
    """The sockets that this process makes meanwhile have this congestion control, as if it were the kernel's default.

    The setting for that, ``net.ipv4.tcp_congestion_control``, only takes what the whole machine's ``tcp_allowed_congestion_control`` lists.
    """

    class Socket(socket.socket):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            if self.type == socket.SOCK_STREAM and self.family in (socket.AF_INET, socket.AF_INET6):
                self.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion_control.encode())

    with mock.patch.object(socket, "socket", Socket):
        yield


def _in_namespace(namespace: Path, serve: Callable[[Connection], None], ready: Connection) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    Side("", namespace).enter()
    serve(ready)


@contextmanager
def running(serve: Callable[[Connection], None], side: Side) -> Iterator[Any]:
    """``serve`` in a process of its own on ``side``; yields what it says when it is ready."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_in_namespace, args=(side.namespace, serve, theirs), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join(10)


def observations() -> dict[str, dict[str, Any]]:
    """By pattern: what its clients are handed. Cameras that look like cameras: smooth, with noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:224, 0:224] / 223
    smooth = np.stack([120 + 80 * np.sin(5 * x + 3 * y), 110 + 70 * np.cos(4 * y - 2 * x), 100 + 90 * x * y], -1)
    images = {camera: np.clip(smooth + rng.normal(0, NOISE, smooth.shape), 0, 255).astype(np.uint8) for camera in CAMERAS}
    rest = {"state": rng.random(14), "prompt": "pick up the red cup"}
    encoded = {camera: jpeg.encode(image, quality=90) for camera, image in images.items()}
    return {BACK_TO_BACK: {"images": images, **rest}, ROBOT: {"images": encoded, **rest}}


@dataclass
class Row:
    """What one client saw in one pattern."""

    times_ms: list[float] = field(default_factory=list)
    calls: int = 0
    packets: int = 0
    missing: int = 0

    def add(self, times_ms: list[float], calls: int, before: tuple[Traffic, Traffic], after: tuple[Traffic, Traffic]) -> None:
        """One turn: the times that count, all calls, and what the link had carried before and after."""
        ways = [new - old for old, new in zip(before, after, strict=True)]
        self.times_ms += times_ms
        self.calls += calls
        self.packets += sum(way.packets for way in ways)
        self.missing += sum(way.lost + way.dropped for way in ways)

    @property
    def p50(self) -> float:
        return percentile(self.times_ms, 50)

    def figures(self) -> dict[str, float]:
        """Milliseconds, and packets in both directions a call."""
        calls = max(1, self.calls)
        return {
            "p50": self.p50,
            "p99": percentile(self.times_ms, 99),
            "n": len(self.times_ms),
            "packets": self.packets / calls,
            "lost": self.missing / calls,
        }


Rows = dict[tuple[str, str], Row]
"""(Pattern, client) → row."""


@dataclass(frozen=True)
class Part:
    """Something to measure on one link.

    Attributes:
        names: the clients that take part.
        calls: counted in each turn.
        seconds: after which no new round of turns begins.
        pause_s: before each request.
    """

    pattern: str
    names: tuple[str, ...]
    calls: int
    seconds: float
    pause_s: float = 0.0


@contextmanager
def clients_on(link: EmulatedLink, names: set[str]) -> Iterator[dict[str, Asking]]:
    """Clients on side ``a``, connected to servers of their kind on side ``b``."""
    for side in (link.a, link.b):
        # Or a connection would begin with what the one before it had found out.
        side.sysctl("net.ipv4.tcp_no_metrics_save", "1")
    with running(serve_ours, link.b) as ours, running(serve_peer, link.b) as peer, link.a.entered(), ExitStack() as stack:
        peer, websocket, quic = (url.replace("0.0.0.0", link.b.address) for url in (peer, ours["action"], ours["action quic"]))
        quic_client = partial(connect, quic, pin=ours["pin"])
        makers: dict[str, Callable[[], Asking]] = {
            STOCK: lambda: StockClient(peer),
            WEBSOCKET: lambda: connect(websocket),
            QUIC: quic_client,
            QUIC_8: partial(quic_client, connections=8),
            QUIC_JPEG: partial(quic_client, encode="jpeg"),
        }
        clients: dict[str, Asking] = {}
        for name in [name for name in makers if name in names]:
            with tcp_default(PEER_CONGESTION_CONTROL) if name == STOCK else ExitStack():
                clients[name] = makers[name]()
            stack.callback(clients[name].close)
        yield clients


def take_turns(clients: dict[str, Asking], part: Part, obs: dict[str, Any], link: EmulatedLink) -> Rows:
    """Rounds in which each client has one turn; another one begins each round."""
    rows = {name: Row() for name in part.names}
    names, started_s = list(part.names), time.monotonic()
    while not rows[names[0]].calls or time.monotonic() - started_s < part.seconds:
        for name in names:
            before, times_ms = link.traffic(), []
            for _ in range(part.calls + 1):
                time.sleep(part.pause_s)
                asked_s = time.perf_counter()
                reply = clients[name].infer(obs)
                times_ms.append((time.perf_counter() - asked_s) * 1e3)
                assert np.array_equal(reply["actions"], CHUNK)
            rows[name].add(times_ms[1:], len(times_ms), before, link.traffic())
        names = [*names[1:], names[0]]
    return {(part.pattern, name): rows[name] for name in part.names}


def measure(rtt_ms: float, loss_percent: float, parts: list[Part], *, seed: int = 1) -> Rows:
    """All ``parts`` on one link."""
    obs = observations()
    with (
        emulated_link(rtt_ms=rtt_ms, loss_percent=loss_percent, rate_mbit=RATE_MBIT, queue_packets=QUEUE_PACKETS, seed=seed) as link,
        clients_on(link, {name for part in parts for name in part.names}) as clients,
    ):
        rows: Rows = {}
        for part in parts:
            rows |= take_turns(clients, part, obs[part.pattern], link)
        return rows
