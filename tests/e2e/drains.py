"""One drain: a server process under load from robots on every transport gets SIGTERM, and then its books are compared with theirs.

The books: the stub policy logs every request that it begins, the server every one that it answers (:mod:`hosting.request_log`). A robot books what it
sent, what came back, and how its connection ended.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from hosting.clients.quic_channel import Channel, pump
from hosting.config import ActionTransportConfig, PlannerConfig
from hosting.logs import JSONFormatter
from hosting.protocol import msgpack_numpy
from hosting.protocol.framing import MessageReader, header
from hosting.protocol.messages import Message, MessageType
from hosting.quic_settings import client_configuration
from hosting.service import Loaders, Service
from tests.serving import service_config

SECONDS = 30.0
"""No reply and no end takes that long; what does is a hang."""

DRAIN_S = 20.0
REASON = "the server is shutting down"

began = logging.getLogger("stub.began")


# --- the server ------------------------------------------------------------------------------------------------------------------------------


class BookkeepingPolicy:
    """Logs what it begins, takes a few milliseconds, and gives the request's name back."""

    metadata: dict[str, Any] = {"action_horizon": 1, "image_specs": []}  # noqa: RUF012 - never modified
    default_prompt = None

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        return self.infer_batch([obs])[0]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], *, seeds: Any = None) -> list[dict[str, Any]]:
        for obs in observations:
            began.info("%s", obs["name"])
        time.sleep(0.004)  # the model's work
        return [{"actions": np.zeros((1, 2)), "name": obs["name"]} for obs in observations]


class SlowPlanner:
    """A planner that takes longer than the policy, so that a drain meets requests that wait for their subtask."""

    metadata: dict[str, Any] = {}  # noqa: RUF012 - never modified

    def infer(self, obs: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
        return self.infer_batch([obs], **settings)[0]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], **settings: Any) -> list[dict[str, Any]]:
        time.sleep(0.03)  # the model's work
        return [{"subtask": {"text": f"begin to {obs['prompt']}", "ms": 30.0}} for obs in observations]


def serve(directory: str, ready: Connection) -> None:
    """A process's whole life; it exits with the service's code. ``ready`` gets endpoint → URL and the certificate's fingerprint."""
    handler = logging.FileHandler(Path(directory) / "log")
    handler.setFormatter(JSONFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)

    async def main() -> int:
        config = service_config(
            action_transport=ActionTransportConfig(websocket_port=0, quic_port=0, unix_socket_path=f"{directory}/action.sock"),
            planner=PlannerConfig(checkpoint_dir="unused", refresh="async", interval_s=0.05),
            quic_certificate_dir=f"{directory}/../tls",
            drain_s=DRAIN_S,
        )
        service = Service(config, loaders=Loaders(lambda config: BookkeepingPolicy(), lambda config: SlowPlanner()))
        serving = asyncio.create_task(service.serve())
        await service.ready.wait()
        ready.send((service.addresses, service.status()["quic_certificate_sha256"]))
        return await serving

    raise SystemExit(asyncio.run(main()))


# --- the wires -------------------------------------------------------------------------------------------------------------------------------


class Ended(Exception):  # noqa: N818 - no error: every drain ends so
    """The connection is over.

    Attributes:
        clean: whether the server said goodbye, or, on a Unix socket, closed it between two messages.
    """

    def __init__(self, text: str, *, clean: bool) -> None:
        super().__init__(text)
        self.clean = clean


class Wire(Protocol):
    """A client's end, on which requests can be sent before earlier ones are answered."""

    def send(self, body: bytes) -> None:
        """Raises nothing: that the connection is over is found out when its last answers have been received."""
        ...

    def receive(self) -> Message:
        """The next answer.

        Raises:
            Ended: there is none any more.
        """
        ...

    def close(self) -> None: ...


class WebSocketWire:
    def __init__(self, url: str, pin: str) -> None:
        self._stack = ExitStack()
        self._websocket = self._stack.enter_context(connect(f"{url}?errors=map", compression=None, max_size=None, close_timeout=SECONDS))
        self._websocket.recv(SECONDS)

    def send(self, body: bytes) -> None:
        with suppress(ConnectionClosed):
            self._websocket.send(body)

    def receive(self) -> Message:
        try:
            return Message(MessageType.REPLY, self._websocket.recv(SECONDS))  # type: ignore[arg-type]
        except ConnectionClosed as closed:
            received = closed.rcvd
            raise Ended(str(closed), clean=received is not None and (received.code, received.reason) == (1001, REASON)) from closed

    def close(self) -> None:
        self._stack.close()


class UnixWire:
    def __init__(self, url: str, pin: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        self._socket.connect(url.removeprefix("unix://"))
        self._reader = MessageReader(1 << 20)
        self._send(MessageType.METADATA, b"")
        self.receive()

    def send(self, body: bytes) -> None:
        self._send(MessageType.INFER, body)

    def receive(self) -> Message:
        while (message := self._reader.next()) is None:
            try:
                count = self._socket.recv_into(self._reader.get_buffer())
            except ConnectionResetError as error:
                # What Linux makes of closing a Unix socket that has something to read; every answer was read before.
                raise Ended("reset", clean=not self._reader.pending) from error
            if not count:
                raise Ended("end of stream", clean=not self._reader.pending)
            self._reader.received(count)
        return message

    def close(self) -> None:
        self._socket.close()

    def _send(self, type: MessageType, body: bytes) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(header(type, len(body)) + body)


class QuicWire:
    def __init__(self, url: str, pin: str) -> None:
        host, port = url.removeprefix("quic://").split(":")
        configuration = client_configuration(host, pin=pin, cafile=None, verify=True, loopback=True, idle_timeout_s=SECONDS)
        self._channel = Channel(socket.AF_INET, (host, int(port)), configuration, max_message_bytes=1 << 20)
        assert pump([self._channel], lambda: self._channel.connection.established, time.monotonic() + SECONDS)
        self._channel.request(MessageType.METADATA, [b""])
        self.receive()

    def send(self, body: bytes) -> None:
        self._channel.request(MessageType.INFER, [body])

    def receive(self) -> Message:
        channel = self._channel
        assert pump([channel], lambda: bool(channel.outcomes) or channel.lost is not None, time.monotonic() + SECONDS), "no answer came"
        if not channel.outcomes:
            raise Ended(str(channel.lost), clean=REASON in str(channel.lost))
        outcome = channel.outcomes.pop(next(iter(channel.outcomes)))
        assert isinstance(outcome, Message), outcome
        return outcome

    def close(self) -> None:
        self._channel.close()


WIRES: dict[str, type[WebSocketWire | UnixWire | QuicWire]] = {"action": WebSocketWire, "action unix": UnixWire, "action quic": QuicWire}


# --- the robots ------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Books:
    """What one robot knows.

    Attributes:
        sent: names of its requests.
        outcomes: name → ``ok``, or the code of a failure.
        ending: how its connection ended.
    """

    sent: set[str] = field(default_factory=set)
    outcomes: dict[str, str] = field(default_factory=dict)
    ending: Ended | None = None

    @property
    def unanswered(self) -> set[str]:
        return self.sent - self.outcomes.keys()


class Robot:
    """Asks until its connection ends, with ``depth`` requests under way.

    Args:
        many: every request is of another session, as with several robots on one connection; else a newer one takes an older one's place.
    """

    def __init__(self, name: str, wire: Wire, depth: int, *, many: bool, replied: threading.Semaphore) -> None:
        self.books = Books()
        self.error: BaseException | None = None
        self._name, self._wire, self._depth, self._many, self._replied = name, wire, depth, many, replied
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(2 * SECONDS)
        assert not self._thread.is_alive(), f"{self._name} waits for ever"
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        numbers = itertools.count()
        try:
            while True:
                while len(self.books.unanswered) < self._depth:
                    self._ask(next(numbers))
                self._take(msgpack_numpy.unpack(self._wire.receive().body))
                self._replied.release()
        except Ended as ended:
            self.books.ending = ended
        except BaseException as error:  # noqa: BLE001 - raised in join()
            self.error = error
        finally:
            self._wire.close()

    def _ask(self, number: int) -> None:
        name = f"{self._name}:{number}"
        # Now and then a new task, whose request waits for the planner.
        obs: dict[str, Any] = {
            "name": name,
            "request_id": name,
            "prompt": f"task {number // 8}",
            "images": {"cam_high": np.zeros((4, 4, 3), np.uint8)},
        }
        if self._many:
            obs["session_id"] = f"{self._name} {number % self._depth}"
        self.books.sent.add(name)
        self._wire.send(msgpack_numpy.pack(obs))

    def _take(self, reply: Mapping[str, Any]) -> None:
        name = reply["request_id"]
        assert name in self.books.unanswered, f"{name} was answered twice, or never asked"
        if "code" in reply:
            self.books.outcomes[name] = reply["code"]
        else:
            assert reply["name"] == name, f"{name} got another one's reply"
            self.books.outcomes[name] = "ok"


FLEET = (
    *(("action", depth, many) for depth, many in ((1, False), (1, False), (4, False), (6, True))),
    *(("action unix", depth, many) for depth, many in ((1, False), (4, False), (6, True))),
    *(("action quic", depth, many) for depth, many in ((1, False), (3, False), (4, True))),
)
"""Transport, requests under way, and whether each is another session's."""


# --- the comparison --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drain:
    """Everybody's books.

    Attributes:
        exit_code: of the process.
        took_s: from the signal to its end.
        under_way: requests that robots waited for when the signal was sent.
    """

    exit_code: int
    took_s: float
    under_way: int
    robots: tuple[Books, ...]
    log: tuple[dict[str, Any], ...]

    @cached_property
    def replies(self) -> Counter[str]:
        """Outcome → how many robots were told so."""
        return Counter(outcome for books in self.robots for outcome in books.outcomes.values())

    @cached_property
    def lost(self) -> set[str]:
        """Requests that the server began or answered, other than by refusing them for its end, and whose reply did not come."""
        started = {entry["message"] for entry in self.log if entry["logger"] == began.name}
        answered = {entry["request_id"] for entry in self._requests if entry["outcome"] != "draining"}
        return (started | answered) - {name for books in self.robots for name in books.outcomes}

    @cached_property
    def _requests(self) -> list[dict[str, Any]]:
        """The log's lines about robots' requests, the cancelled ones among them."""
        return [entry for entry in self.log if entry["logger"] == "hosting.requests" and "request_id" in entry]

    @property
    def faults(self) -> list[str]:
        """What must not be."""
        faults = [f"exit code {self.exit_code}"] if self.exit_code else []
        faults += [f"took {self.took_s:.1f} s"] if self.took_s > DRAIN_S else []
        faults += [f"lost: {name}" for name in sorted(self.lost)]
        faults += [f"a reply of {outcome}" for outcome in self.replies if outcome not in ("ok", "superseded", "draining")]
        for index, books in enumerate(self.robots):
            assert books.ending is not None
            if not books.ending.clean:
                faults.append(f"robot {index} ({FLEET[index][0]}): {books.ending}, {len(books.unanswered)} requests unanswered")
        told = {name: outcome for books in self.robots for name, outcome in books.outcomes.items()}
        for entry in self._requests:
            if (outcome := told.get(entry["request_id"], entry["outcome"])) != entry["outcome"]:
                faults.append(f"{entry['request_id']}: logged as {entry['outcome']}, replied {outcome}")
        for entry in self.log:
            if entry["level"] in ("ERROR", "CRITICAL") or "traceback" in entry:
                faults.append(f"log: {entry['message']}: {entry.get('traceback', '')[-2000:]}")
        return faults


def drain(directory: Path, seed: int) -> Drain:
    """Start, load, signal at a moment that ``seed`` chooses, and wait for the end."""
    directory.mkdir()
    # Forked from a process that has imported everything: a start takes milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(str(directory), theirs))
    process.start()
    theirs.close()
    robots: list[Robot] = []
    try:
        addresses, pin = ours.recv()
        replied = threading.Semaphore(0)
        wires: deque[Wire] = deque(WIRES[transport](addresses[transport], pin) for transport, _, _ in FLEET)
        for index, (_, depth, many) in enumerate(FLEET):
            robots.append(Robot(f"r{index}", wires.popleft(), depth, many=many, replied=replied))
        for _ in range(random.Random(seed).randint(20, 400)):
            assert replied.acquire(timeout=SECONDS), "the server does not answer"
        under_way = sum(len(robot.books.unanswered) for robot in robots)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        signalled_s = time.perf_counter()
        process.join(DRAIN_S + SECONDS)
        took_s = time.perf_counter() - signalled_s
        assert process.exitcode is not None, "the server does not end"
    finally:
        process.kill()
        process.join()
        for robot in robots:
            robot.join()
    log = tuple(json.loads(line) for line in (directory / "log").read_text().splitlines())
    return Drain(process.exitcode, took_s, under_way, tuple(robot.books for robot in robots), log)
