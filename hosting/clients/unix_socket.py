"""A blocking conversation over a server's Unix socket (reference/wire.md §4.1)."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Sequence

from hosting.clients.errors import ConnectError, ConnectionLostError, CrossedReplyError, ReplyTimeoutError
from hosting.clients.link import Buffer
from hosting.protocol.framing import MessageReader, header
from hosting.protocol.messages import Message, MessageType
from pi0.errors import MessageError

_SOCKET_BUFFER_BYTES = 4 << 20
"""Asked for in both directions: an observation then goes over in few system calls."""

_TIMEVAL = struct.Struct("@ll")

_MAX_PARTS = 1024
"""How many buffers one system call takes (``IOV_MAX``)."""


class UnixLink:
    """Implements :class:`hosting.clients.link.Link`.

    Args:
        path: the server's socket file.
        connect_timeout_s: how long the server may take to accept.
        ready_timeout_s: how long it may take to load before it greets; None waits for ever.
        max_message_bytes: the largest reply that is taken.

    Raises:
        ConnectError: there is no server, it refuses, or it is not ready in time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        connect_timeout_s: float = 10.0,
        ready_timeout_s: float | None = None,
        max_message_bytes: int = 128 << 20,
    ) -> None:
        self._path = os.fsdecode(path)
        self._reader = MessageReader(max_message_bytes)
        self._closed = False
        self._socket = _connected(self._path, connect_timeout_s)
        try:
            self._hello = self._greeting(ready_timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def hello(self) -> Message:
        """METADATA_REPLY as it came when the conversation began."""
        return self._hello

    @property
    def closed(self) -> bool:
        """Whether the link can no longer be used."""
        return self._closed

    def close(self) -> None:
        """End the conversation; harmless when it has ended."""
        self._closed = True
        self._socket.close()

    def exchange(self, type: int, body: Sequence[Buffer], timeout_s: float | None) -> Message:
        """Send one message (its body in parts, which need no joining before) and wait for its answer, of whatever type.

        Raises:
            ReplyTimeoutError: none came within ``timeout_s``; the link is closed, so that nobody takes the late one for another's.
            ConnectionLostError: the connection is gone; the link is closed.
            CrossedReplyError: the server had sent something unasked; the link is closed.
            MessageError: the body has 4 GiB or more; nothing was sent.
        """
        if self._closed:
            raise ConnectionLostError(f"{self._path}: the connection is closed; connect again")
        parts = [view.cast("B") for view in [memoryview(part) for part in body] if view.nbytes]
        parts.insert(0, memoryview(header(type, sum(map(len, parts)))))
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            if self._reader.pending:
                raise CrossedReplyError(f"{self._path}: the server has sent more than the answer to the last request; the connection is closed")
            sent = self._send(parts, deadline_s)
            answer = self._receive(deadline_s)
        except TimeoutError as error:
            self.close()
            raise ReplyTimeoutError(f"{self._path}: no reply within {timeout_s:g} s; the connection is closed") from error
        except (OSError, MessageError) as error:
            self.close()
            raise ConnectionLostError(f"{self._path}: the connection broke: {getattr(error, 'strerror', None) or error}") from error
        except BaseException:
            self.close()
            raise
        if not sent:
            self.close()
        return answer

    def _greeting(self, ready_timeout_s: float | None) -> Message:
        try:
            hello = self.exchange(MessageType.METADATA, (), ready_timeout_s)
        except ReplyTimeoutError as error:
            raise ConnectError(f"{self._path}: the server was not ready within {ready_timeout_s:g} s") from error
        except ConnectionLostError as error:
            raise ConnectError(f"{error}; is this the socket of a policy server?") from error
        if hello.type == MessageType.ERROR:
            raise ConnectError(bytes(hello.body).decode(errors="replace"))
        if hello.type != MessageType.METADATA_REPLY:
            raise ConnectError(f"{self._path}: message type 0x{hello.type:02x} came for the metadata, expected 0x11; is this a policy server?")
        return hello

    def _send(self, parts: list[memoryview], deadline_s: float | None) -> bool:
        """Send everything; False when the server takes no more, which it may have given a reason for."""
        first = 0
        while first < len(parts):
            self._until(deadline_s)
            try:
                count = self._socket.sendmsg(parts[first : first + _MAX_PARTS])
            except (BrokenPipeError, ConnectionResetError):
                return False
            while first < len(parts) and count >= len(parts[first]):
                count -= len(parts[first])
                first += 1
            if count:
                parts[first] = parts[first][count:]
        return True

    def _receive(self, deadline_s: float | None) -> Message:
        while (message := self._reader.next()) is None:
            self._until(deadline_s)
            count = self._socket.recv_into(self._reader.get_buffer())
            if not count:
                raise ConnectionResetError("the server has closed it")
            self._reader.received(count)
        return message

    def _until(self, deadline_s: float | None) -> None:
        """Give the next system call the time that is left."""
        if deadline_s is None:
            if self._socket.gettimeout() is not None:
                self._socket.settimeout(None)
            return
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._socket.settimeout(left_s)


def _connected(path: str, timeout_s: float) -> socket.socket:
    if "\0" in path:
        # The system would connect to the socket whose name ends there.
        raise ConnectError(f"cannot connect to unix socket {path!r}: the name has a null character")
    connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connecting.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
        # Not settimeout(): a socket that does not block is turned away at once when the server's queue is full.
        connecting.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(timeout_s), int(timeout_s % 1 * 1e6)))
        connecting.connect(path)
        connecting.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(0, 0))
    except (OSError, ValueError) as error:  # the latter for a name that no file can have
        connecting.close()
        reason = f"it did not accept within {timeout_s:g} s" if isinstance(error, BlockingIOError) else getattr(error, "strerror", None) or error
        raise ConnectError(f"cannot connect to unix socket {path}: {reason}; is the server running?") from error
    return connecting
