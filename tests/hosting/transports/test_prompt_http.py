"""Requests that go wrong behind one that is still being answered (time limits: ``tests/hosting/test_listeners.py``)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from hosting.config import WebSocketConfig
from hosting.listeners import server_config

SECONDS = 20
GOOD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
UNFINISHED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
GARBAGE = b"\x00no HTTP\r\n\r\n"


class App:
    """Sends the first ``sent`` of its answer's three messages at once, and the rest when the gate opens."""

    def __init__(self, sent: int) -> None:
        self._sent = sent
        self.gate, self.done = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        answer: list[dict[str, Any]] = [{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}]
        answer += [{"type": "http.response.body", "body": piece, "more_body": piece == b"O"} for piece in (b"O", b"K")]
        for index, message in enumerate(answer):
            if index == self._sent:
                await self.gate.wait()
            await send(message)
        self.done.set()


@asynccontextmanager
async def serving(app: App) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    config = server_config(app, max_message_bytes=1000, kept=WebSocketConfig())
    config.load()
    state = uvicorn.server.ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: config.http_protocol_class(config=config, server_state=state, app_state={}), "127.0.0.1", 0)  # type: ignore[call-arg, union-attr]
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    async with asyncio.timeout(SECONDS):
        yield reader, writer
    writer.close()
    server.close()


@pytest.mark.parametrize(("sent", "received"), [(0, b"HTTP/1.1 400 Bad Request\r\n"), (1, b"HTTP/1.1 200 "), (2, b"HTTP/1.1 200 ")])
async def test_garbage_behind_a_request_that_is_being_answered(caplog: pytest.LogCaptureFixture, sent: int, received: bytes) -> None:
    app = App(sent)
    async with serving(app) as (reader, writer):
        writer.write(UNFINISHED)
        if sent:
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(received)
        writer.write(GARBAGE)
        rest = await reader.read()
        assert sent or rest.startswith(received)
        app.gate.set()
        await app.done.wait()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_garbage_that_comes_with_the_request(caplog: pytest.LogCaptureFixture) -> None:
    app = App(3)
    async with serving(app) as (reader, writer):
        writer.write(UNFINISHED + GARBAGE)
        assert (await reader.read()).startswith(b"HTTP/1.1 400 Bad Request\r\n")
        await app.done.wait()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_garbage_in_a_body_whose_request_has_been_answered(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(App(3)) as (reader, writer):
        writer.write(UNFINISHED)
        await reader.readuntil(b"\r\n\r\nOK")
        writer.write(GARBAGE)
        assert await reader.read() == b""
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_garbage_behind_a_request_that_has_been_answered() -> None:
    async with serving(App(3)) as (reader, writer):
        writer.write(GOOD)
        await reader.readuntil(b"\r\n\r\nOK")
        writer.write(GARBAGE)
        assert (await reader.read()).startswith(b"HTTP/1.1 400 Bad Request\r\n")
