"""A slot's Unix socket: framed messages (reference/wire.md §4.1), many clients at once, each answered in the order it asks."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from hosting.answers import Answering, Answers
from hosting.policy import MessageError
from hosting.protocol.framing import MessageReader, header
from hosting.protocol.messages import Message, MessageType
from hosting.transports.socket_file import SocketFile

logger = logging.getLogger(__name__)

_SOCKET_BUFFER_BYTES = 4 << 20
"""Asked for in both directions: an observation then goes over in one system call."""

_BACKLOG = 1024
"""How many clients may wait to be accepted."""

_ACCEPTED_AT_ONCE = 16
"""asyncio takes its backlog for this, too: when the process has no file left, it would log as many failures at once."""

_JOIN_BYTES = 64 * 1024
"""Up to here a body is copied behind its header: cheaper than a second system call, and than waking the client for a header alone."""

_DISCARD_BYTES = 256 * 1024

_LINGER_S = 5.0
"""How long a client that broke the rules may go on sending, in seconds, before the connection is closed under it."""

_CLOSE_S = 5.0
"""How long :meth:`UnixSocketTransport.close` waits for answers under way, in seconds."""


@dataclass(slots=True)
class _Shared:
    """What the connections of one transport have in common."""

    path: Path
    max_message_bytes: int
    stall_timeout_s: float
    clients: set[_Client] = field(default_factory=set)
    draining: bool = False
    closed: bool = False


class UnixSocketTransport:
    """All Unix socket conversations of one slot.

    Args:
        path: the socket file; its directory must exist.
        converse: a new conversation, called once per client.
        max_message_bytes: the largest body that a client may send.
        mode: permission bits of the file from the moment it exists. To connect takes write permission.
        stall_timeout_s: how long a client may send nothing in the middle of a message. Between messages it may wait for ever.
    """

    def __init__(
        self, path: Path, converse: Callable[[], Answering], *, max_message_bytes: int, mode: int = 0o600, stall_timeout_s: float = 30.0
    ) -> None:
        self._converse = converse
        self._mode = mode
        self._shared = _Shared(path, max_message_bytes, stall_timeout_s)
        self._file: SocketFile | None = None
        self._server: asyncio.Server | None = None

    def bind(self) -> None:
        """Claim the path. Clients can connect from now on; they wait until :meth:`start`.

        Raises:
            ConfigError: it cannot be had; names the path and the reason.
        """
        self._file = SocketFile(self._shared.path, mode=self._mode, backlog=_BACKLOG)
        granted = _enlarge_buffers(self._file.socket)
        logger.debug("unix socket %s: connections get buffers of %d bytes to send and %d to receive", self._shared.path, *granted)

    async def start(self) -> None:
        """Begin to serve; :meth:`bind` first."""
        assert self._file is not None
        self._server = await asyncio.get_running_loop().create_unix_server(self._connected, sock=self._file.socket, backlog=_ACCEPTED_AT_ONCE)
        self._file.socket.listen(_BACKLOG)  # asyncio has set it to what it was told

    async def close_idle(self) -> None:
        """Close the conversations that wait for a request (the endpoint must be draining); the others close after their answer.

        Who connects later gets one answer.
        """
        self._shared.draining = True
        for client in list(self._shared.clients):
            client.close_if_idle()

    async def close(self) -> None:
        """Stop listening, remove the socket file, and close every conversation when its answer is sent, after 5 s in any case."""
        self._shared.closed = True
        if self._file is not None:
            self._file.remove()
        if self._server is not None:
            self._server.close()
        if self._file is not None:
            self._file.socket.close()
        await self.close_idle()
        if leaving := {client.gone: client for client in self._shared.clients}:
            _, late = await asyncio.wait(leaving, timeout=_CLOSE_S)
            for gone in late:
                leaving[gone].abort()
            await asyncio.wait(leaving)

    def _connected(self) -> _Client:
        return _Client(self._converse(), self._shared)


class _Client(asyncio.BufferedProtocol):
    """One connection. While there is no room for another request, one more is read, then reading pauses."""

    def __init__(self, conversation: Answering, shared: _Shared) -> None:
        self._conversation = conversation
        self._answers = Answers(conversation, self._send, self._moved)
        self._answering: set[asyncio.Task[None]] = set()
        self._shared = shared
        self._loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        self._reader = MessageReader(shared.max_message_bytes)
        self._transport: asyncio.Transport
        self._next: Message | None = None
        self._written = asyncio.Event()
        self._written.set()
        self._paused = self._eof = False
        self._fault: str | None = None  # why nothing more is read
        self._discard = memoryview(b"")
        self._progress_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def close_if_idle(self) -> None:
        if not self._answers.unsent:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # Writing counts as paused until every byte is gone: a client that does not read its answer gets no other.
        self._transport.set_write_buffer_limits(high=0)
        _enlarge_buffers(transport.get_extra_info("socket"))
        self._shared.clients.add(self)
        if self._shared.closed:
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._shared.clients.discard(self)
        if self._answers.unsent:
            logger.debug("unix socket %s: a client left while it was being answered", self._shared.path)
        for task in self._answering:
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self.gone.set_result(None)
        self._conversation.close()

    def pause_writing(self) -> None:
        self._written.clear()

    def resume_writing(self) -> None:
        self._written.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.get_buffer() if self._fault is None else self._discard

    def buffer_updated(self, nbytes: int) -> None:
        if self._fault is None:
            self._reader.received(nbytes)
            self._look()

    def eof_received(self) -> bool:
        """A client that only has nothing more to say still gets its answers; with one that is gone, they are cancelled."""
        self._eof = True
        return bool(self._answers.unsent) and not _peer_gone(self._transport.get_extra_info("socket"))

    def _look(self) -> None:
        """Something was received, or there may be room for another request: begin what is whole."""
        self._progress_s = self._loop.time()
        while True:
            if self._next is None:
                try:
                    self._next = self._reader.next()
                except MessageError as error:
                    self._fail(str(error))
                    return
                if self._next is None:
                    break
            # Who connects in a drain gets one answer.
            if not self._answers.room or (self._shared.draining and self._answers.unsent):
                self._pause_reading()
                return
            task = self._loop.create_task(self._answers.begin(self._next))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
            self._next = None
        if self._reader.pending and self._timer is None:
            self._timer = self._loop.call_later(self._shared.stall_timeout_s, self._check_stall)
        if self._eof:
            self._settle()
        else:
            self._resume_reading()

    def _moved(self) -> None:
        if self._fault is None and not self._shared.draining:
            self._look()
        else:
            self._settle()

    def _settle(self) -> None:
        """When all is answered: tell the client what it did wrong, or close where nothing more can come."""
        if self._answers.unsent:
            return
        if self._fault is not None:
            self._refuse(self._fault)
        elif self._shared.draining or self._eof:
            self._transport.close()

    async def _send(self, answer: Message) -> None:
        try:
            self._write(answer)
        except Exception:
            logger.exception("unix socket %s: an answer could not be sent; its connection is closed", self._shared.path)
            self._transport.abort()
        if not self._written.is_set():
            await self._written.wait()

    def _write(self, message: Message) -> None:
        size = len(message.body)
        if size <= _JOIN_BYTES:
            self._transport.write(b"".join((header(message.type, size), message.body)))
        else:
            self._transport.write(header(message.type, size))
            self._transport.write(message.body)

    def _pause_reading(self) -> None:
        self._paused = True
        self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._paused:
            self._paused = False
            self._transport.resume_reading()

    def _check_stall(self) -> None:
        self._timer = None
        if self._fault is not None or self._eof or self._paused or not self._reader.pending:
            return
        timeout_s = self._shared.stall_timeout_s
        left_s = self._progress_s + timeout_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._check_stall)
        else:
            self._fail(f"nothing came for {timeout_s:g} s in the middle of a message; send each message whole")

    def _fail(self, text: str) -> None:
        """Read no further. The client is told after the answers under way."""
        self._fault = text
        self._pause_reading()
        self._settle()

    def _refuse(self, text: str) -> None:
        """Say why, and close when the client has heard of it: at its end of the stream, or after ``_LINGER_S``.

        Closing with data unread resets the connection, and a client in the middle of a message that is too large would never read why.
        """
        logger.info("unix socket %s: closing a connection: %s", self._shared.path, text)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(_LINGER_S, self._transport.abort)
        self._discard = memoryview(bytearray(_DISCARD_BYTES))
        self._write(Message(MessageType.ERROR, text.encode()))
        self._transport.write_eof()
        self._resume_reading()


def _enlarge_buffers(connected: socket.socket) -> tuple[int, int]:
    """Returns what was granted to send and to receive, in bytes."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connected.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
    return connected.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF), connected.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def _peer_gone(connected: socket.socket) -> bool:
    """Whether the other side has closed its socket, and not just its sending direction."""
    poll = select.poll()
    poll.register(connected.fileno(), 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))
