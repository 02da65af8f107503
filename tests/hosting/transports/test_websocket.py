"""One conversation of the Starlette app, against a server of the test's own: who is held, who leaves, who comes too late."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from hosting.endpoint import Endpoint
from hosting.protocol import msgpack_numpy
from hosting.routing import action_route
from hosting.scheduler import SlotWorker
from hosting.transports.websocket import WebSocketTransport
from tests.serving import EchoPolicy

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
