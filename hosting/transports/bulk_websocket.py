"""uvicorn's WebSocket protocol with a short way in for large binary messages: an observation with its camera images.

The sans-I/O parser below it appends every read to a growing buffer, slices the frame out and unmasks it into a third copy; for
450 kB that costs about as much as everything else the server does. Here a large frame is received into the buffer that the app gets, and
unmasked in place. Everything else is the parser's business: the handshake, control frames, text, small or fragmented messages,
close codes, and every frame that breaks RFC 6455.

To know where a frame begins, the headers of all frames are read here as well (RFC 6455 §5.2); no state of the parser is touched.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Opcode
from websockets.protocol import State

_BULK_BYTES = 4 * 1024
"""From here on a frame takes the short way: three cameras as JPEG are 20 to 60 kB."""

_READ_BYTES = 16 * 1024
"""What is read at once while nothing large is expected."""

_TRUSTED_BYTES = 1024 * 1024
"""How much is reserved for a frame on the word of its header; an observation fits, so that it never moves."""

_GROWTH = 4
"""Beyond that, how many times the bytes that did arrive are reserved: a header alone buys a client no memory."""

_PROGRESS_BYTES = 16 * 1024
"""What has to come within a ping timeout of a client whose pong does not: in the middle of a long message there is no room for one."""

_LINGER_S = 5.0
"""How long a client that broke the rules may go on sending, in seconds, before the connection is closed under it."""

_FIN = 0x80
_MASKED = 0x80
_WHOLE_BINARY = _FIN | Opcode.BINARY
_MASKED_LENGTHS = (_MASKED | 126, _MASKED | 127)
_BULK_HEADER_16, _BULK_HEADER_64 = 8, 14
_MAX_HEADER = _BULK_HEADER_64
_HEADER_SIZE = tuple(2 + {126: 2, 127: 8}.get(second & 127, 0) + (4 if second & _MASKED else 0) for second in range(256))
"""Size of a frame header by its second byte."""

_PAYLOAD = 16
"""Where the payload of a frame goes that is read together with its header: aligned to words."""


class BulkWebSocketProtocol(WebSocketsSansIOProtocol, asyncio.BufferedProtocol):
    """For ``ws=`` of :class:`uvicorn.Config`.

    ``websocket.receive`` events carry a :class:`memoryview` instead of bytes for a masked, unfragmented binary frame of
    ``_BULK_BYTES`` or more. Order, ``ws_max_size``, close codes and flow control are the parent's: reading pauses behind a message that the app
    does not wait for. An app that reads on while it works has pings answered meanwhile, and hears when its client leaves.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._landing: NDArray[np.uint8] | None = None  # where a read goes that begins outside a bulk frame
        self._begin = 0  # where in it
        self._expected = 0  # size of the bulk frame before: the next one is likely to be as large
        self._header = b""  # of the next frame, until it is whole
        self._to_parser = 0  # bytes of the current frame that the parser has yet to get
        self._fragmented = False  # between the first and the last frame of a fragmented message
        self._bulk: _BulkFrame | None = None
        self._app_waits = False
        self._ignoring = False
        self._came = self._unsent = 0  # bytes received since the last ping, and bytes that were waiting to be sent then

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._bulk is not None:
            return self._bulk.free()
        # Made when something comes and dropped once it is read: an idle connection holds nothing.
        self._begin = _PAYLOAD - (_BULK_HEADER_16 if self._expected < 1 << 16 else _BULK_HEADER_64)
        self._landing = np.empty(_PAYLOAD + max(self._expected, _READ_BYTES), np.uint8)
        return self._landing.data[self._begin :]

    def buffer_updated(self, nbytes: int) -> None:
        self._came += nbytes
        if self._bulk is not None:
            self._bulk.filled(nbytes)
            self._deliver_if_whole(self._bulk)
            return
        assert self._landing is not None
        landing, self._landing = self._landing, None
        self._expected = 0
        self._feed(landing.data[self._begin : self._begin + nbytes], landing)

    def data_received(self, data: bytes) -> None:
        """The upgrade request comes this way, and all data from event loops that prefer it (uvloop)."""
        self._came += len(data)
        if self.handshake_initiated:
            self._feed(memoryview(data))
            return
        super().data_received(data)
        if not self.handshake_initiated:
            # The parent would keep a connection whose upgrade its parser refuses, and not answer: a body, endless headers.
            self.transport.write(b"".join(self.conn.data_to_send()) or _bad_request(self.conn.handshake_exc))
            self.transport.close()

    async def receive(self) -> Any:
        self._app_waits = True
        try:
            return await super().receive()
        finally:
            self._app_waits = False

    async def send(self, message: Any) -> None:
        if message["type"] == "websocket.send" and message.get("bytes") is not None and self._open_for_replies():
            # What the parent would send, without its frame objects and copies.
            payload = message["bytes"]
            self.transport.writelines((_frame_header(len(payload)), payload))
            return
        if message["type"] == "websocket.send" and self.close_sent:
            # The app did not close: the client broke the rules or answered no ping while its answer was made. The parent would blame the app.
            raise ClientDisconnected
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            # The app refused the upgrade with an answer of its own; the parent would report that as an app that gave none.
            self.handshake_complete = True

    def _open_for_replies(self) -> bool:
        ready = self.handshake_complete and self.initial_response is None and self.writable.is_set()
        return ready and not (self.disconnected or self.close_sent) and self.conn.state is State.OPEN

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text" and not self.close_sent and not _is_utf8(b"".join(self.frames)):
            # As the parent, which would log a traceback for it.
            self.frames = []
            self.conn.send_close(1007)
            self.handle_parser_exception()
            return
        if not self._app_waits or self.read_paused:
            super().send_receive_event_to_app()
            return
        # The parent would pause reading until the app takes the message, which is at once: spare two system calls.
        self._app_waits = False
        self.read_paused = True
        super().send_receive_event_to_app()
        self.read_paused = False

    def send_keepalive_ping(self) -> None:
        if self.close_sent or self.transport.is_closing():
            self.ping_timer = None
            unsent, self._unsent = self._unsent, self.transport.get_write_buffer_size()
            if 0 < unsent <= self._unsent:
                # It was closed, and the client does not take the rest of what it was sent.
                self.transport.abort()
            else:
                self.schedule_ping()
            return
        super().send_keepalive_ping()
        self._came, self._unsent = 0, self.transport.get_write_buffer_size()

    def keepalive_timeout(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        stuck = 0 < self._unsent <= unsent
        taking = unsent < self._unsent
        # Of a client that sends or takes something, the pong may be on its way behind it; or it has come, behind messages that are not read yet.
        if self._came >= _PROGRESS_BYTES or taking or (self.read_paused and not stuck):
            self.pong_timer = self.pending_ping_payload = None
        else:
            super().keepalive_timeout()
        self.schedule_ping()

    def handle_parser_exception(self) -> None:
        """As the parent, but the connection is closed when the client has heard of it: it answers with a close frame (or ``_LINGER_S`` pass).

        Closing it with data unread resets it, and a client in the middle of a message that is too large would never read why.
        """
        assert self.conn.close_sent is not None
        close = self.conn.close_sent
        self.queue.put_nowait({"type": "websocket.disconnect", "code": close.code, "reason": close.reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = self._ignoring = True
        self._bulk = None
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        self.close_timer = self.loop.call_later(_LINGER_S, self.transport.abort)

    def _feed(self, data: memoryview, landing: NDArray[np.uint8] | None = None) -> None:
        """Take ``data`` apart into frames. ``landing`` is the buffer that ``data`` begins in, where it may stay."""
        # After a close frame nothing counts any more.
        while data and not self.transport.is_closing():
            if self._bulk is not None:
                data = data[self._bulk.take(data) :]
                self._deliver_if_whole(self._bulk)
            elif self._to_parser:
                piece, data = data[: self._to_parser], data[self._to_parser :]
                self._to_parser -= len(piece)
                if not self._ignoring:
                    super().data_received(bytes(piece))
            else:
                data = self._begin_frame(data, landing)
            landing = None

    def _begin_frame(self, data: memoryview, landing: NDArray[np.uint8] | None) -> memoryview:
        """Complete the header of the next frame and decide who takes the frame; returns what is left of ``data``."""
        known = len(self._header)
        header = self._header + bytes(data[: _MAX_HEADER - known])
        size = _HEADER_SIZE[header[1]] if len(header) > 1 else _MAX_HEADER
        if len(header) < size:
            self._header = header
            return data[len(header) - known :]
        self._header, header, data = b"", header[:size], data[size - known :]
        length = header[1] & 127
        if length >= 126:
            length = int.from_bytes(header[2 : 4 if length == 126 else 10], "big")
        if self._ignoring:
            self._to_parser = length
            if header[0] & 0x0F == Opcode.CLOSE:
                self.transport.close()
        elif self._is_bulk(header, length):
            self._expected = min(length, _TRUSTED_BYTES)
            if landing is not None and not known:
                self._bulk = _BulkFrame(length, header[-4:], landing[self._begin + size :])
                count = min(length, len(data))
                self._bulk.filled(count)
                data = data[count:]
            else:
                self._bulk = _BulkFrame(length, header[-4:], np.empty(self._expected, np.uint8))
            self._deliver_if_whole(self._bulk)
        else:
            if header[0] & 0x0F in (Opcode.CONT, Opcode.TEXT, Opcode.BINARY):
                self._fragmented = not header[0] & _FIN
            self._to_parser = length
            super().data_received(header)
        return data

    def _is_bulk(self, header: bytes, length: int) -> bool:
        plain = header[0] == _WHOLE_BINARY and header[1] in _MASKED_LENGTHS and not self._fragmented
        return plain and _BULK_BYTES <= length <= self.config.ws_max_size

    def _deliver_if_whole(self, bulk: _BulkFrame) -> None:
        if not bulk.whole:
            return
        self._bulk = None
        self.curr_msg_data_type = "bytes"
        self.frames = [cast(bytes, bulk.unmasked())]
        self.send_receive_event_to_app()


def _bad_request(error: Exception | None) -> bytes:
    text = f"the upgrade request cannot be read: {(error and error.__cause__) or error}\n".encode()
    head = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n\r\n"
    return head % len(text) + text


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _frame_header(length: int) -> bytes:
    """Of an unfragmented binary frame, unmasked as all of a server's are."""
    if length < 126:
        return bytes((_WHOLE_BINARY, length))
    if length < 1 << 16:
        return bytes((_WHOLE_BINARY, 126)) + length.to_bytes(2, "big")
    return bytes((_WHOLE_BINARY, 127)) + length.to_bytes(8, "big")


class _BulkFrame:
    """The payload of one frame as it arrives.

    Args:
        length: bytes of payload that the header announced.
        mask: the 4 bytes that the client XORed it with, over and over.
        buffer: where it goes, at least at first; may be smaller or larger than the payload.
    """

    def __init__(self, length: int, mask: bytes, buffer: NDArray[np.uint8]) -> None:
        self._length = length
        self._mask = mask
        self._received = 0
        self._buffer = buffer[:length]

    @property
    def whole(self) -> bool:
        return self._received == self._length

    def free(self) -> memoryview:
        """Where the next bytes of the payload go; never empty while the frame is not whole, never beyond its end."""
        if self._received == len(self._buffer):
            # Not zeroed: pages that no data came for never become memory.
            grown = np.empty(min(self._length, max(_GROWTH * self._received, _TRUSTED_BYTES)), np.uint8)
            grown[: self._received] = self._buffer
            self._buffer = grown
        return self._buffer.data[self._received :]

    def filled(self, count: int) -> None:
        """``count`` bytes came in :meth:`free`."""
        self._received += count

    def take(self, data: memoryview) -> int:
        """Copy from ``data`` what belongs to this frame; returns how many bytes that were."""
        free = self.free()
        count = min(len(free), len(data))
        free[:count] = data[:count]
        self._received += count
        return count

    def unmasked(self) -> memoryview:
        """The payload of the whole frame, unmasked in place: call it once."""
        words = self._buffer[: self._length & ~7].view(np.uint64)
        np.bitwise_xor(words, np.frombuffer(self._mask * 2, np.uint64), out=words)
        rest = self._buffer[self._length & ~7 :]
        np.bitwise_xor(rest, np.frombuffer(self._mask * 2, np.uint8, len(rest)), out=rest)
        return self._buffer.data
