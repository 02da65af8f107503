"""Both ends of QUIC for tests: a pair in memory with a clock and a loss rate, and a live server in a thread."""

from __future__ import annotations

import asyncio
import functools
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgpack

from hosting.certificates import Certificate, local_certificate
from hosting.protocol.messages import Message, MessageType
from hosting.quic import Event, IdsChanged, MessageConnection
from hosting.quic_endings import Ended
from hosting.quic_settings import ALPN, client_configuration, server_configuration
from hosting.transports.quic import QuicTransport
from hosting.udp import Received

CLIENT_ADDRESS, SERVER_ADDRESS = ("127.0.0.1", 4001), ("127.0.0.1", 4002)
LIMIT = 1 << 20
RESET_KEY = b"the reset key"


@functools.cache
def certificate() -> Certificate:
    """One for all tests; making a key takes time."""
    with tempfile.TemporaryDirectory() as directory:
        return local_certificate(Path(directory))


class Pair:
    """A client and a server connection with a network of ``delay_s`` each way between them that loses datagrams at random."""

    def __init__(
        self,
        *,
        loss: float = 0.0,
        seed: int = 0,
        delay_s: float = 0.005,
        limit: int = LIMIT,
        idle_timeout_s: float = 600.0,
        server_protocol: str = ALPN,
        **client: Any,
    ) -> None:
        self.now = 0.0
        self.loss, self._random, self._delay_s = loss, random.Random(seed), delay_s
        options = {"pin": certificate().sha256, "idle_timeout_s": idle_timeout_s, **client}
        configuration = client_configuration(options.pop("server_name", "localhost"), **options)
        self.client = MessageConnection.client(configuration, SERVER_ADDRESS, self.now, max_message_bytes=limit)
        original_id = self.client._quic.original_destination_connection_id
        settings = server_configuration(certificate(), idle_timeout_s=idle_timeout_s)
        settings.alpn_protocols = [server_protocol]
        self.server = MessageConnection.server(settings, original_id, max_message_bytes=limit, reset_key=RESET_KEY)
        self.client_address = CLIENT_ADDRESS
        self.events: dict[MessageConnection, list[Event]] = {self.client: [], self.server: []}
        self._flying: list[tuple[float, MessageConnection, Received]] = []
        self.lost = self.sent = 0

    def request(self, type: int, *body: bytes) -> int:
        stream = -1
        for stream in self.client.request(type, body):  # noqa: B007
            self._send(self.client)
        return stream

    def take(self, end: MessageConnection, kind: type[Event] | None = None) -> list[Any]:
        """The events at one end since the last call, only those of ``kind``."""
        events, self.events[end] = self.events[end], []
        return [event for event in events if kind is None or isinstance(event, kind)]

    def run(self, until: Callable[[], object], *, for_s: float = 60.0) -> None:
        """Let time pass until something is so; fails the test when it is not after ``for_s``."""
        end = self.now + for_s
        while True:
            for side in (self.client, self.server):
                side.handle_timer(self.now)
                self.events[side] += [event for event in side.events() if not isinstance(event, IdsChanged)]
                self._send(side)
            if until():
                return
            times = [at for at, _, _ in self._flying] + [timer for side in (self.client, self.server) if (timer := side.next_timer_s()) is not None]
            assert times, "nothing will ever happen again"
            assert min(times) <= end, f"not so after {for_s} s"
            self.now = max(self.now, min(times))
            arrived = [flight for flight in self._flying if flight[0] <= self.now]
            self._flying = [flight for flight in self._flying if flight[0] > self.now]
            for _, side, received in arrived:
                side.receive(received, self.now)

    def ended(self) -> tuple[Ended | None, Ended | None]:
        return self.client.ended, self.server.ended

    def _send(self, side: MessageConnection) -> None:
        other, address = (self.server, self.client_address) if side is self.client else (self.client, SERVER_ADDRESS)
        for datagram, _ in side.datagrams_to_send(self.now):
            self.sent += 1
            if self._random.random() < self.loss:
                self.lost += 1
                continue
            at = self.now + self._delay_s
            self._flying.append((at, other, Received(datagram, len(datagram), address, at)))


def digest(body: bytes | bytearray | memoryview) -> bytes:
    return sha256(body).digest()


class EchoConversation:
    """Answers INFER with the SHA-256 of what it got; ``hold…`` only when the server's gate is open; ``small`` and ``large`` by size."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self.sent_count = self.closed_count = 0
        self.closed = threading.Event()
        server.conversations.append(self)

    async def answer(self, message: Message) -> Message:
        if message.type == MessageType.METADATA:
            key = msgpack.unpackb(message.body).get("api_key") if message.body else None
            await self._server.ready.wait()
            if key != self._server.api_key:
                return Message(MessageType.ERROR, b"unauthorized: the API key is wrong")
            return Message(MessageType.METADATA_REPLY, msgpack.packb({"conversation": len(self._server.conversations)}))
        if bytes(message.body[:4]) == b"hold":
            self._server.holding.set()
            try:
                await self._server.gate.wait()
            except asyncio.CancelledError:
                self._server.cancelled.set()
                raise
        if bytes(message.body[:5]) == b"large":
            return Message(MessageType.REPLY, bytes(int(bytes(message.body[5:]))))
        return Message(MessageType.REPLY, digest(message.body))

    def sent(self) -> None:
        self.sent_count += 1

    def close(self) -> None:
        self.closed_count += 1
        self.closed.set()


class LiveServer:
    """A transport on a free loopback port; its event loop runs in a thread of its own."""

    def __init__(self, *, api_key: str | None = None, host: str = "127.0.0.1", max_message_bytes: int = LIMIT, **options: Any) -> None:
        self.api_key = api_key
        self.conversations: list[EchoConversation] = []
        self.holding, self.cancelled = threading.Event(), threading.Event()
        self._options = {"certificate": certificate(), "max_message_bytes": max_message_bytes, **options}
        self._host = host
        self.loop = asyncio.new_event_loop()
        self.gate, self.ready = asyncio.Event(), asyncio.Event()
        self.ready.set()
        self._thread = threading.Thread(target=self.loop.run_forever, name="event loop of a test")

    def __enter__(self) -> LiveServer:
        self._thread.start()
        self.transport: QuicTransport = self.call(self._make)
        self.transport.bind()
        self.wait(self.transport.start())
        self.host, self.port = self.transport.address[:2]
        return self

    def __exit__(self, *_: object) -> None:
        self.wait(self.transport.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.loop.close()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run ``function`` on the server's event loop."""

        async def run() -> Any:
            return function()

        return self.wait(run())

    def wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def _make(self) -> QuicTransport:
        return QuicTransport(self._host, 0, lambda: EchoConversation(self), loop=self.loop, **self._options)


@contextmanager
def serving(**options: Any) -> Iterator[LiveServer]:
    with LiveServer(**options) as server:
        yield server
        assert not server.transport.failed.done(), server.transport.failed
