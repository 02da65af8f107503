"""A live Unix socket transport, a conversation that does as it is told, and a client made of raw bytes."""

from __future__ import annotations

import asyncio
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from hosting.protocol.messages import Message, MessageType
from hosting.transports.unix_socket import UnixSocketTransport

LIMIT = 1 << 20
SECONDS = 20  # no test waits longer for what must come


@contextmanager
def socket_directory() -> Iterator[Path]:
    """A directory whose name leaves room for a socket's within 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ux", dir="/tmp") as directory:
        yield Path(directory)


def framed(type: int, body: bytes = b"") -> bytes:
    return struct.pack("!IB", len(body) + 1, type) + body


class Script:
    """Answers each message with its body, but for these: ``hold…`` when :attr:`gate` opens, ``raise`` never, ``bytes N`` with N of them.

    One script is shared by all conversations of a server.
    """

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.gate = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.holding = 0
        self.sent_count = self.closed_count = 0
        self._changed = asyncio.Condition()

    async def answer(self, message: Message) -> Message:
        body = bytes(message.body)
        self.asked.append(body)
        if message.type == MessageType.METADATA:
            return Message(MessageType.METADATA_REPLY, b"\x80")
        if body == b"raise":
            raise RuntimeError("what never happens")
        if body.startswith(b"bytes "):
            return Message(MessageType.REPLY, bytes(int(body[6:])))
        if body.startswith(b"hold"):
            await self._now_holding(self.holding + 1)
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            finally:
                self.holding -= 1
        return Message(MessageType.REPLY, body)

    def sent(self) -> None:
        self.sent_count += 1

    def close(self) -> None:
        self.closed_count += 1

    async def until_holding(self, count: int) -> None:
        async with asyncio.timeout(SECONDS), self._changed:
            await self._changed.wait_for(lambda: self.holding == count)

    async def _now_holding(self, count: int) -> None:
        self.holding = count
        async with self._changed:
            self._changed.notify_all()


@asynccontextmanager
async def serving(path: Path, converse: Callable[[], Any], **options: Any) -> AsyncIterator[UnixSocketTransport]:
    transport = UnixSocketTransport(path, converse, **{"max_message_bytes": LIMIT, **options})
    transport.bind()
    await transport.start()
    try:
        yield transport
    finally:
        await transport.close()


class RawClient:
    """Bytes over a socket; what is awaited comes within ``SECONDS`` or fails the test."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def __aenter__(self) -> RawClient:
        self._reader, self._writer = await asyncio.open_unix_connection(str(self._path))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(SECONDS):
            self._writer.write(data)
            await self._writer.drain()

    async def read(self) -> tuple[int, bytes] | None:
        """The next message as (type, body), or None at the end of the stream."""
        async with asyncio.timeout(SECONDS):
            if not (first := await self._reader.read(1)):
                return None
            length, type = struct.unpack("!IB", first + await self._reader.readexactly(4))
            return type, await self._reader.readexactly(length - 1)

    async def ask(self, body: bytes, type: int = MessageType.INFER) -> tuple[int, bytes] | None:
        await self.send(framed(type, body))
        return await self.read()

    def end(self) -> None:
        """Nothing more is sent."""
        self._writer.write_eof()

    def vanish(self) -> None:
        """Go as a killed process goes."""
        self._writer.transport.abort()

    @property
    def socket(self) -> socket.socket:
        return self._writer.get_extra_info("socket")
