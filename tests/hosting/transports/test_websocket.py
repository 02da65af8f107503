"""Conversations of the Starlette app, against a server of the test's own, then over real sockets: who is held, who leaves, who comes too late."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import struct
import weakref
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

import hosting.transports.websocket
from hosting.answers import MAX_UNFINISHED
from hosting.endpoint import Endpoint
from hosting.listeners import HTTPListener
from hosting.protocol import msgpack_numpy
from hosting.protocol.messages import Message, MessageType
from hosting.routing import action_route
from hosting.scheduler import SlotWorker
from hosting.transports.websocket import WebSocketTransport
from tests.hosting.gated import SECONDS, Gated, turns, until
from tests.serving import EchoPolicy, service_config

REQUEST = {"type": "websocket.receive", "bytes": msgpack_numpy.pack({"prompt": "x"})}


class Conversation:
    """One client of ``transport``: what it sends goes into ``received``, what the app sends is in ``sent``."""

    def __init__(self, transport: WebSocketTransport) -> None:
        self.received: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.received.put_nowait({"type": "websocket.connect"})
        self.sent: list[dict[str, Any]] = []
        self.full = False
        scope = {"type": "websocket", "path": "/", "headers": [], "query_string": b"", "subprotocols": [], "root_path": ""}
        self.task = asyncio.ensure_future(transport.app(scope, self.received.get, self._send))

    async def _send(self, message: Any) -> None:
        if self.full:
            await asyncio.Event().wait()
        self.sent.append(message)
        if message["type"] == "websocket.close":
            self.received.put_nowait({"type": "websocket.disconnect", "code": message["code"]})

    async def until(self, count: int) -> None:
        """Until the app has sent ``count`` messages."""
        async with asyncio.timeout(30):
            while len(self.sent) < count:
                await asyncio.sleep(0)


@pytest.fixture
async def endpoint():
    worker = SlotWorker("action")
    yield Endpoint("action", {"action": worker})
    worker.close()


def open_(endpoint: Endpoint) -> None:
    endpoint.open(action_route(EchoPolicy()), {})


def types(conversation: Conversation) -> list[str]:
    return [message["type"].removeprefix("websocket.") for message in conversation.sent]


async def test_a_client_that_leaves_while_it_is_held_is_forgotten(endpoint):
    conversation = Conversation(WebSocketTransport(endpoint))
    await conversation.until(1)
    conversation.received.put_nowait({"type": "websocket.disconnect", "code": 1005})
    await asyncio.wait_for(conversation.task, 30)
    assert types(conversation) == ["accept"] and not endpoint.ready


async def test_a_request_that_came_while_the_client_was_held_is_answered(endpoint):
    conversation = Conversation(WebSocketTransport(endpoint))
    await conversation.until(1)
    conversation.received.put_nowait(REQUEST)
    for _ in range(10):
        await asyncio.sleep(0)
    assert types(conversation) == ["accept"]
    open_(endpoint)
    await conversation.until(3)
    assert types(conversation) == ["accept", "send", "send"]
    assert msgpack_numpy.unpack(conversation.sent[2]["bytes"])["asked"] == {"prompt": "x"}
    conversation.received.put_nowait({"type": "websocket.disconnect", "code": 1005})
    await asyncio.wait_for(conversation.task, 30)


@pytest.mark.parametrize("earlier", [0, 1])
async def test_a_request_that_comes_as_its_idle_connection_is_closed_breaks_nothing(endpoint, earlier):
    open_(endpoint)
    transport = WebSocketTransport(endpoint)
    conversation = Conversation(transport)
    for _ in range(earlier):
        conversation.received.put_nowait(REQUEST)
    await conversation.until(2 + earlier)
    conversation.received.put_nowait(REQUEST)  # the app has yet to see it
    await endpoint.drain()
    await transport.close_idle()
    await asyncio.wait_for(conversation.task, 30)
    assert types(conversation) == ["accept", *["send"] * (1 + earlier), "close"]


async def test_a_client_that_does_not_read_holds_up_nobody(endpoint, monkeypatch, caplog):
    """Its close frame cannot be sent, as its connection takes nothing more."""
    monkeypatch.setattr("hosting.transports.websocket._CLOSE_TIMEOUT_S", 0.05)
    caplog.set_level(logging.INFO)
    open_(endpoint)
    transport = WebSocketTransport(endpoint)
    stuck, other = Conversation(transport), Conversation(transport)
    await stuck.until(2)
    await other.until(2)
    stuck.full = True
    await endpoint.drain()
    closing = asyncio.create_task(transport.close_idle())
    await asyncio.wait_for(other.task, 30)
    await asyncio.wait_for(closing, 30)
    assert types(other) == ["accept", "send", "close"] and types(stuck) == ["accept", "send"]
    assert "a client does not read what it was sent; its connection ends without a close frame" in caplog.messages
    stuck.received.put_nowait({"type": "websocket.disconnect", "code": 1006})
    await asyncio.wait_for(stuck.task, 30)


# --- what is asked while something is under way ---------------------------------------------------------------------------------------


class Door:
    """A slot's endpoint that is open; what it would do, a :class:`Gated` does."""

    slot = "action"
    ready = True

    def __init__(self) -> None:
        self.draining = False

    async def opened(self) -> None:
        pass


@pytest.fixture
async def conversations(monkeypatch):
    """One for each client, in the order they came."""
    made: list[Gated] = []

    def converse(endpoint: Any, connection: Any, *, transport: str) -> Gated:
        assert transport == "websocket"
        made.append(Gated())
        return made[-1]

    monkeypatch.setattr(hosting.transports.websocket, "Conversation", converse)
    return made


@pytest.fixture
async def clock(monkeypatch):
    """Seconds that the event loop's clock is ahead, in a list of one."""
    loop, ahead = asyncio.get_running_loop(), [0.0]
    real = loop.time
    monkeypatch.setattr(loop, "time", lambda: real() + ahead[0])
    return ahead


def request(body: bytes | memoryview) -> dict[str, Any]:
    return {"type": "websocket.receive", "bytes": body}


async def test_no_connection_is_idle_while_a_request_is_under_way(conversations, clock):
    conversation = Conversation(WebSocketTransport(Door(), idle_timeout_s=10))
    await conversation.until(2)
    clock[0] += 9
    for body in (b"1", b"2"):
        conversation.received.put_nowait(request(body))
    await until(lambda: len(conversations[0].held) == 2)
    clock[0] += 1000
    await turns()
    conversations[0].let(b"1")
    await conversation.until(3)
    clock[0] += 1000
    await turns()
    conversations[0].let(b"2")
    await conversation.until(4)
    clock[0] += 9
    await turns()
    assert types(conversation) == ["accept", "send", "send", "send"]
    clock[0] += 2
    await asyncio.wait_for(conversation.task, SECONDS)
    assert conversation.sent[-1] == {"type": "websocket.close", "code": 1001, "reason": "no request came for 10 s"}
    assert conversations[0].closed_count == 1


async def test_a_client_that_never_asks_is_idle_from_its_greeting_on(conversations, clock):
    conversation = Conversation(WebSocketTransport(Door(), idle_timeout_s=10))
    await conversation.until(2)
    clock[0] += 9
    await turns()
    assert not conversation.task.done()
    clock[0] += 2
    await asyncio.wait_for(conversation.task, SECONDS)
    assert types(conversation) == ["accept", "send", "close"] and conversations[0].closed_count == 1


async def test_a_drain_answers_what_was_begun_and_begins_nothing(conversations):
    door = Door()
    transport = WebSocketTransport(door)
    conversation = Conversation(transport)
    await conversation.until(2)
    for body in (b"1", b"2"):
        conversation.received.put_nowait(request(body))
    await until(lambda: len(conversations[0].held) == 2)
    door.draining = True
    await transport.close_idle()
    conversation.received.put_nowait(request(b"too late"))
    conversations[0].let(b"2")
    await turns()
    assert types(conversation) == ["accept", "send"]
    conversations[0].let(b"1")
    await asyncio.wait_for(conversation.task, SECONDS)
    assert [message.get("bytes") for message in conversation.sent[2:]] == [b"1", b"2", None]
    assert conversation.sent[-1]["type"] == "websocket.close" and conversation.sent[-1]["code"] == 1001
    assert b"too late" not in conversations[0].asked and conversations[0].closed_count == 1


async def test_an_observation_is_not_kept_once_it_is_answered(conversations):
    conversation = Conversation(WebSocketTransport(Door()))
    await conversation.until(2)
    for number in range(2):
        body = np.zeros(1000, np.uint8)
        seen = weakref.ref(body)
        conversation.received.put_nowait(request(body.data))
        del body
        await until(lambda: conversations[0].held)
        conversations[0].let(bytes(1000), Message(MessageType.REPLY, b"%d" % number))
        await conversation.until(3 + number)
        await turns()
        assert seen() is None


async def test_an_answer_that_cannot_be_sent_ends_the_conversation(conversations):
    conversation = Conversation(WebSocketTransport(Door()))
    await conversation.until(2)
    for body in (b"1", b"2"):
        conversation.received.put_nowait(request(body))
    await until(lambda: len(conversations[0].held) == 2)
    conversations[0].let(b"1", Message(MessageType.ERROR, b"\xff"))
    with pytest.raises(UnicodeDecodeError):
        await asyncio.wait_for(conversation.task, SECONDS)
    await until(lambda: conversations[0].cancelled)
    assert types(conversation) == ["accept", "send"]
    assert conversations[0].cancelled == [b"2"] and conversations[0].closed_count == 1


async def test_a_client_that_cannot_be_greeted_has_its_conversation_closed(conversations, monkeypatch):
    async def hello(self: Gated) -> Message:
        raise ConnectionResetError

    monkeypatch.setattr(Gated, "hello", hello)
    conversation = Conversation(WebSocketTransport(Door()))
    await asyncio.wait_for(conversation.task, SECONDS)
    assert conversations[0].closed_count == 1


# --- over real sockets ----------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(door: Door):
    """Yields the listener, served as the service serves it."""
    transport = WebSocketTransport(door)
    listener = HTTPListener("a field", "127.0.0.1", 0, transport.app, service_config("action"), websocket=transport)
    listener.bind()
    await listener.start()
    try:
        yield listener
    finally:
        await listener.close()


@asynccontextmanager
async def greeted(listener: HTTPListener):
    async with connect(listener.url, compression=None, max_size=None) as client:
        await answer(client)
        yield client


async def answer(client: ClientConnection) -> Any:
    async with asyncio.timeout(SECONDS):
        return await client.recv()


@pytest.mark.parametrize("size", [0, 100_000])
async def test_a_newer_request_reaches_the_conversation_while_an_older_one_is_under_way(conversations, size):
    bodies = [b"%d" % number + bytes(size) for number in range(6)]
    async with serving(Door()) as listener, greeted(listener) as client:
        (gated,) = conversations
        for count, body in enumerate(bodies[:MAX_UNFINISHED]):
            await client.send(body)
            await until(lambda count=count: len(gated.held) == count + 1)
            async with asyncio.timeout(SECONDS):
                await (await client.ping())
        for body in bodies[MAX_UNFINISHED:]:
            await client.send(body)
        gated.let(bodies[1])
        await until(lambda: bodies[3] in gated.held)
        assert bodies[4] not in gated.asked
        for body in (bodies[3], bodies[2], bodies[0]):
            gated.let(body)
        await until(lambda: gated.held == bodies[4:])
        gated.let(bodies[5])
        gated.let(bodies[4])
        assert [await answer(client) for _ in bodies] == bodies
        assert gated.sent_count == len(bodies) and gated.asked == bodies


@pytest.mark.parametrize("count", [1, MAX_UNFINISHED])
@pytest.mark.parametrize("how", ["close frame", "reset", "end of the stream"])
async def test_a_client_that_leaves_has_its_requests_cancelled(conversations, how, count):
    async with serving(Door()) as listener, greeted(listener) as other:
        await other.send(b"another's")
        async with greeted(listener) as client:
            for number in range(count):
                await client.send(b"%d" % number)
            await until(lambda: len(conversations[1].held) == count)
            match how:
                case "close frame":
                    await client.close()
                case "reset":
                    client.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    client.transport.abort()
                case _:
                    client.transport.abort()
            await until(lambda: len(conversations[1].cancelled) == count)
            await until(lambda: conversations[1].closed_count)
        conversations[0].let(b"another's")
        assert await answer(other) == b"another's"
    assert [gated.closed_count for gated in conversations] == [1, 1]
    assert not conversations[0].cancelled and conversations[1].sent_count == 0


async def test_a_client_that_leaves_behind_more_than_is_read_is_noticed_when_reading_goes_on(conversations):
    async with serving(Door()) as listener, greeted(listener) as client:
        (gated,) = conversations
        for number in range(MAX_UNFINISHED + 1):
            await client.send(b"%d" % number)
        await until(lambda: len(gated.held) == MAX_UNFINISHED)
        client.transport.abort()
        gated.let(b"0")
        await until(lambda: gated.closed_count)
        await until(lambda: not gated.held)
        assert {b"1", b"2"} <= set(gated.cancelled) and gated.sent_count <= 1


async def test_a_client_that_reads_nothing_is_asked_little_more(conversations, monkeypatch):
    """10,000 requests, 160 MB of answers, and no more in memory at once than what is under way; when it reads, each is there."""
    count, alive, most_alive, most_unsent = 10_000, 0, 0, 0

    def let_go() -> None:
        nonlocal alive
        alive -= 1

    async def answer_at_once(self: Gated, message: Message) -> Message:
        nonlocal alive, most_alive, most_unsent
        weakref.finalize(message.body.obj, let_go).atexit = False
        alive += 1
        self.asked.append(bytes(message.body[:5]))
        most_alive, most_unsent = max(most_alive, alive), max(most_unsent, len(self.asked) - self.sent_count)
        return Message(MessageType.REPLY, bytes(message.body[:5]) + bytes(16_000))

    monkeypatch.setattr(Gated, "answer", answer_at_once)

    async def send(client: ClientConnection) -> None:
        for number in range(count):
            await client.send(b"%05d" % number + bytes(4096))

    async with serving(Door()) as listener, greeted(listener) as client, greeted(listener) as other:
        sending = asyncio.create_task(send(client))
        seen = -1
        while seen < (seen := conversations[0].sent_count):  # until it is held up
            for number in range(20):
                await other.send(b"%05d" % number + bytes(4096))
                assert (await answer(other))[:5] == b"%05d" % number
        assert 0 < seen < count and not sending.done()
        for number in range(count):
            assert (await answer(client))[:5] == b"%05d" % number
        await sending
    assert max(most_alive, most_unsent) <= MAX_UNFINISHED + 1  # one of the other client's


@pytest.mark.parametrize("seed", range(5))
async def test_any_depth_and_any_order_of_completion(conversations, seed):
    chance = random.Random(seed)
    count, sent, received = 300, 0, 0
    sizes = [chance.choice((10, 5000, 70_000)) for _ in range(count)]

    def body(number: int) -> bytes:
        return b"%d " % number + bytes(sizes[number])

    async def let(gated: Gated) -> None:
        while received < count:
            if gated.held:
                gated.let(chance.choice(gated.held))
            await turns(chance.randrange(1, 5))

    async with serving(Door()) as listener, greeted(listener) as client:
        letting = asyncio.create_task(let(conversations[0]))
        while received < count:
            for _ in range(min(chance.randrange(1, 9), count - sent)):
                await client.send(body(sent))
                sent += 1
            while received < sent and chance.random() < 0.8:
                assert await answer(client) == body(received)
                received += 1
        await letting
    assert conversations[0].sent_count == count


async def test_a_drain_over_real_sockets(conversations):
    door = Door()
    async with serving(door) as listener, greeted(listener) as idle, greeted(listener) as busy:
        for number in range(MAX_UNFINISHED):
            await busy.send(b"%d" % number)
        await until(lambda: len(conversations[1].held) == MAX_UNFINISHED)
        door.draining = True
        await listener.close_idle()
        with pytest.raises(ConnectionClosed):
            await answer(idle)
        for number in reversed(range(MAX_UNFINISHED)):
            conversations[1].let(b"%d" % number)
        assert [await answer(busy) for _ in range(MAX_UNFINISHED)] == [b"%d" % number for number in range(MAX_UNFINISHED)]
        with pytest.raises(ConnectionClosed):
            await answer(busy)
        assert [client.close_code for client in (idle, busy)] == [1001, 1001]
