"""Requests over a slow, long and lossy link: ours on QUIC and WebSocket beside openpi's design, in one run for each link.

    python -m benchmarks.lossy [--quick] [--json FILE]

The link is emulated (``benchmarks/link``): 100 Mbit/s, RTT 20 and 60 ms, 0, 0.5 or 2 % of the packets lost in each direction, independently of each
other. Servers with a no-op policy are on one side, each in a process of its own; the clients are on the other. Three patterns:

* back to back: three raw 224² cameras, 452 kB, request after request; the clients take turns. "QUIC + JPEG" is handed the same observation and
  sends it as our client does with ``encode="jpeg"``.
* robot: the cameras as JPEG of quality 90, 45 kB, and 0.3 s between a reply and the next request; all clients side by side, which a link that each of
  them uses for 1 % of the time allows, so that none has longer pauses than its robot would. Both servers decode the images.
* after a break: the same with 5 s instead of 0.3 s.

Each pattern has connections of its own. That matters: a TCP connection that has once sent 452 kB keeps, through pauses of 0.3 s, a window
that takes 45 kB in one round trip; one that has only ever sent 45 kB needs two.

The peer is openpi's design (``benchmarks/openpi_design.py``) with its stock client, over TCP cubic on both ends, which nearly all machines have,
whatever this kernel's own default is; our WebSocket chooses BBR for itself. Requests before a connection has found its speed are not counted.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import simplejpeg

from benchmarks.link.emulator import EmulatedLink, Side, Traffic, emulated_link
from benchmarks.openpi_design import StockClient, serve_inline
from benchmarks.report import Goal, arguments, finish, machine
from hosting.certificates import local_certificate
from hosting.clients import connect
from hosting.config import ActionConfig, ActionTransportConfig, ServiceConfig
from hosting.protocol import jpeg
from hosting.service import Loaders, Service

RATE_MBIT = 100
QUEUE_PACKETS = 1000
PEER_CONGESTION_CONTROL = "cubic"
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
NOISE = 8.0
"""Standard deviation of the camera noise; with it a camera is 15 kB as JPEG."""
CHUNK = np.random.default_rng(0).standard_normal((50, 25))
"""The reply's actions: 10 kB."""

STOCK, WEBSOCKET, QUIC, QUIC_8, QUIC_JPEG = "stock WebSocket", "our WebSocket", "QUIC", "QUIC × 8", "QUIC + JPEG"
BACK_TO_BACK, ROBOT, BREAK = "back to back", "robot", "after a break"
PAUSE_S = {ROBOT: 0.3, BREAK: 5.0}


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


class Decoding(NoOp):
    """What a policy of the peer's has to do itself; our server does it before it asks a policy."""

    def infer(self, obs: Any) -> dict[str, Any]:
        for image in obs["images"].values():
            if isinstance(image, bytes):
                simplejpeg.decode_jpeg(image)
        return super().infer(obs)


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
        serve_inline(Decoding(), ready.send, host="0.0.0.0")


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


def observations() -> tuple[dict[str, Any], dict[str, Any]]:
    """The same observation with raw cameras and with JPEG ones. Smooth and noisy, they are about as large as real ones."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:224, 0:224] / 223
    smooth = np.stack([120 + 80 * np.sin(5 * x + 3 * y), 110 + 70 * np.cos(4 * y - 2 * x), 100 + 90 * x * y], -1)
    images = {camera: np.clip(smooth + rng.normal(0, NOISE, smooth.shape), 0, 255).astype(np.uint8) for camera in CAMERAS}
    rest = {"state": rng.random(14), "prompt": "pick up the red cup"}
    return {"images": images, **rest}, {"images": {camera: jpeg.encode(image, quality=90) for camera, image in images.items()}, **rest}


Times = dict[tuple[str, str], list[float]]
"""(Pattern, client) → milliseconds of each request."""


@dataclass(frozen=True)
class Plan:
    """What is measured on one link.

    Attributes:
        bulk: clients that send back to back.
        bulk_s: after which no new round of turns begins.
        turn: requests of a turn: those that come first and are not counted, and those that are.
        paused: clients that pause between requests.
        paused_s: for how long they do so, by pattern.
    """

    rtt_ms: float
    loss_percent: float
    bulk: tuple[str, ...] = (STOCK, QUIC, QUIC_8, WEBSOCKET, QUIC_JPEG)
    bulk_s: float = 0.0
    turn: tuple[int, int] = (2, 10)
    paused: tuple[str, ...] = (STOCK, QUIC, QUIC_8, WEBSOCKET)
    paused_s: Mapping[str, float] = field(default_factory=dict)


@contextmanager
def servers_on(link: EmulatedLink) -> Iterator[dict[str, Callable[[], Asking]]]:
    """Both servers on side ``b``, and the calling thread on side ``a``; yields how each client is connected to its own."""
    for side in (link.a, link.b):
        # Or a connection would begin with what the one before it had found out.
        side.sysctl("net.ipv4.tcp_no_metrics_save", "1")
    with running(serve_ours, link.b) as ours, running(serve_peer, link.b) as peer, link.a.entered():
        peer, websocket, quic = (url.replace("0.0.0.0", link.b.address) for url in (peer, ours["action"], ours["action quic"]))

        def stock_client() -> Asking:
            with tcp_default(PEER_CONGESTION_CONTROL):
                return StockClient(peer)

        quic_client = partial(connect, quic, pin=ours["pin"])
        yield {
            STOCK: stock_client,
            WEBSOCKET: partial(connect, websocket),
            QUIC: quic_client,
            QUIC_8: partial(quic_client, connections=8),
            QUIC_JPEG: partial(quic_client, encode="jpeg"),
        }


@contextmanager
def connected(servers: Mapping[str, Callable[[], Asking]], names: Iterable[str]) -> Iterator[dict[str, Asking]]:
    """New connections of the clients with these names."""
    with ExitStack() as stack:
        clients = {}
        for name in names:
            clients[name] = servers[name]()
            stack.callback(clients[name].close)
        yield clients


def ask(client: Asking, obs: dict[str, Any]) -> float:
    """Milliseconds until the reply was there."""
    started_s = time.perf_counter()
    reply = client.infer(obs)
    took_ms = (time.perf_counter() - started_s) * 1e3
    assert np.array_equal(reply["actions"], CHUNK)
    return took_ms


def take_turns(clients: dict[str, Asking], plan: Plan, obs: dict[str, Any]) -> Times:
    """Rounds in which each client has one turn; another one begins each round."""
    times: Times = {(BACK_TO_BACK, name): [] for name in plan.bulk}
    names, started_s = deque(plan.bulk), time.monotonic()
    uncounted, counted = plan.turn
    while time.monotonic() - started_s < plan.bulk_s:
        for name in names:
            times[BACK_TO_BACK, name] += [ask(clients[name], obs) for _ in range(uncounted + counted)][uncounted:]
        names.rotate()
    return times


def side_by_side(clients: dict[str, Asking], plan: Plan, pattern: str, obs: dict[str, Any]) -> Times:
    """All clients at once, each pausing between its requests; those of the first tenth of the time are not counted."""
    pause_s, seconds = PAUSE_S[pattern], plan.paused_s[pattern]
    begun_s = time.monotonic()

    def drive(number: int, name: str) -> list[float]:
        time.sleep(pause_s * number / len(plan.paused))
        times_ms = []
        while (passed_s := time.monotonic() - begun_s) < seconds:
            took_ms = ask(clients[name], obs)
            if passed_s >= max(seconds / 10, pause_s):
                times_ms.append(took_ms)
            time.sleep(pause_s)
        return times_ms

    with ThreadPoolExecutor(len(plan.paused)) as threads:
        results = threads.map(drive, range(len(plan.paused)), plan.paused)
        return {(pattern, name): times_ms for name, times_ms in zip(plan.paused, results, strict=True)}


def measure(plan: Plan, *, seed: int = 1) -> tuple[Times, tuple[Traffic, Traffic]]:
    """The times on one link, and what it carried, to the servers and back."""
    raw, jpegs = observations()
    with (
        emulated_link(rtt_ms=plan.rtt_ms, loss_percent=plan.loss_percent, rate_mbit=RATE_MBIT, queue_packets=QUEUE_PACKETS, seed=seed) as link,
        servers_on(link) as servers,
    ):
        times: Times = {}
        if plan.bulk_s:
            with connected(servers, plan.bulk) as clients:
                times |= take_turns(clients, plan, raw)
        for pattern in plan.paused_s:
            with connected(servers, plan.paused) as clients:
                times |= side_by_side(clients, plan, pattern, jpegs)
        return times, link.traffic()


FULL = (
    Plan(20, 0, bulk_s=15, turn=(10, 20), paused_s={ROBOT: 30}),
    Plan(60, 0, bulk_s=25, turn=(10, 20), paused_s={ROBOT: 30, BREAK: 55}),
    Plan(20, 0.5, bulk_s=60, paused_s={ROBOT: 45}),
    Plan(60, 0.5, bulk_s=90, paused_s={ROBOT: 60}),
    Plan(20, 2, bulk_s=70, paused_s={ROBOT: 45}),
    Plan(60, 2, bulk_s=100, paused_s={ROBOT: 60}),
)
QUICK = (
    Plan(60, 0, bulk=(STOCK, QUIC), bulk_s=1, turn=(10, 10), paused=(STOCK, QUIC), paused_s={ROBOT: 6}),
    Plan(20, 0.5, bulk_s=5, turn=(1, 5)),
    Plan(60, 2, bulk=(STOCK, QUIC_JPEG), bulk_s=1, turn=(1, 3)),
)


def figures_of(times: Times) -> dict[str, dict[str, dict[str, float]]]:
    """Pattern → client → p50 and p99 in ms, their number, and p50 as a share of the stock client's."""
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for (pattern, name), times_ms in times.items():
        p50, p99 = np.percentile(times_ms, (50, 99))
        share = p50 / np.median(times[pattern, STOCK])
        figures.setdefault(pattern, {})[name] = {"p50": float(p50), "p99": float(p99), "n": len(times_ms), "share": float(share)}
    return figures


def goals_of(plan: Plan, figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Goal]:
    """What was promised for such a link."""
    promises = [(ROBOT, QUIC, 0.6)]
    if plan.loss_percent == 0:
        promises.append((BACK_TO_BACK, QUIC, 1.05))
    if plan.loss_percent == 0.5:
        promises += [(BACK_TO_BACK, QUIC, 0.75), (BACK_TO_BACK, QUIC_8, 0.25)]
    if plan.loss_percent:
        promises += [(ROBOT, QUIC_8, 0.6), (BACK_TO_BACK, QUIC_JPEG, 0.1)]
    goals = []
    for pattern, name, most in promises:
        if name in figures.get(pattern, {}):
            share = figures[pattern][name]["share"]
            goals.append(Goal(f"{title(plan)}, {pattern}: {name}, share of the stock client's p50", share, f"<= {most:g}", share <= most))
    return goals


def title(plan: Plan) -> str:
    return f"RTT {plan.rtt_ms:g} ms, loss {plan.loss_percent:g} %"


def main() -> None:
    options = arguments(__doc__)
    print(machine())
    print(f"{RATE_MBIT} Mbit/s, queue of {QUEUE_PACKETS} packets; the stock client and server over TCP {PEER_CONGESTION_CONTROL}")
    figures: dict[str, Any] = {}
    goals: list[Goal] = []
    for plan in QUICK if options.quick else FULL:
        times, ways = measure(plan)
        measured = figures_of(times)
        figures[title(plan)] = measured
        goals += goals_of(plan, measured)
        carried = "; ".join(f"{way.packets} packets, {way.lost / way.packets:.2%} lost, {way.dropped} dropped" for way in ways)
        print(f"\n{title(plan)} (to the servers {carried.replace('; ', '; back ')}; load average {os.getloadavg()[0]:.1f})")
        print(f"  {'ms':13} {'':16}{'p50':>9}{'p99':>9}{'n':>6}{'× stock':>9}")
        for pattern, rows in measured.items():
            for name, row in rows.items():
                print(f"  {pattern:13} {name:16}{row['p50']:9.1f}{row['p99']:9.1f}{row['n']:6.0f}{row['share']:9.2f}", flush=True)
    finish(goals, figures, options.json)


if __name__ == "__main__":
    main()
