"""Messages on a byte stream (reference/wire.md §4.1): u32 big-endian length, type byte, body; the length counts the type byte.

:class:`MessageReader` is fed by whoever owns the socket, asyncio's ``BufferedProtocol`` or a blocking ``recv_into`` alike::

    while (message := reader.next()) is None:
        reader.received(sock.recv_into(reader.get_buffer()))
"""

from __future__ import annotations

import struct
import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

from hosting.protocol.messages import Message
from pi0.errors import MessageError

_LENGTH = struct.Struct("!I")
_HEADER = struct.Struct("!IB")
_MAX_BODY_BYTES = (1 << 32) - 2

_READ_BYTES = 16 * 1024
"""What is read at once while nothing large is expected."""

_TRUSTED_BYTES = 1024 * 1024
"""How much is reserved on the word of a length; an observation fits, so that it never moves."""

_SPARES = 8
"""How many buffers of ``_TRUSTED_BYTES`` are kept for the next messages, by all readers together."""

_GROWTH = 4
"""Beyond that, how many times the bytes that did arrive are reserved: a header alone buys nobody memory."""


def header(type: int, body_bytes: int) -> bytes:
    """What goes before a body of ``body_bytes`` bytes.

    Raises:
        MessageError: the length does not fit into its 32 bits.
    """
    if body_bytes > _MAX_BODY_BYTES:
        raise MessageError(f"the message has {body_bytes} bytes, expected at most {_MAX_BODY_BYTES}, which is all that its length field can say")
    return _HEADER.pack(body_bytes + 1, type)


class MessageReader:
    """Bytes as they come → messages. A body is a view of the buffer that its bytes were received into.

    Args:
        max_message_bytes: the largest body that is taken.
    """

    def __init__(self, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self._buffer: NDArray[np.uint8] | None = None  # None while nothing is pending: who is idle holds no memory
        self._start = 0  # where the next message begins in it
        self._end = 0  # how far it is filled
        self._expected = 0  # size of the body before: the next one is likely to be as large

    @property
    def pending(self) -> int:
        """How many bytes have been received that no message was made of yet."""
        return self._end - self._start

    def get_buffer(self) -> memoryview:
        """Where the next bytes go; never empty. Call :meth:`next` until it has no more before."""
        if self._buffer is None:
            self._buffer = _buffer(_HEADER.size + max(self._expected, _READ_BYTES))
        elif self._end == len(self._buffer):
            pending = self.pending
            size = max(_HEADER.size + _READ_BYTES, min(self._message_bytes(), max(_GROWTH * pending, _TRUSTED_BYTES)))
            moved = _buffer(size)
            moved[:pending] = self._buffer[self._start :]
            self._buffer, self._start, self._end = moved, 0, pending
        return self._buffer.data[self._end :]

    def received(self, count: int) -> None:
        """``count`` bytes came in :meth:`get_buffer`."""
        self._end += count

    def next(self) -> Message | None:
        """The next message, or None until more bytes have come.

        Raises:
            MessageError: what comes is no message, or too large a one. Nothing can be read after it.
        """
        size = self._message_bytes()
        if self._buffer is None or self.pending < size:
            return None
        body_start = self._start + _HEADER.size
        message = Message(int(self._buffer[body_start - 1]), self._buffer.data[body_start : self._start + size])
        self._expected = min(size - _HEADER.size, _TRUSTED_BYTES)
        self._start += size
        if self._start == self._end:
            self._buffer, self._start, self._end = None, 0, 0
        return message

    def _message_bytes(self) -> int:
        """Size of the pending message, header included; that of a header until its length is there."""
        if self._buffer is None or self.pending < _LENGTH.size:
            return _HEADER.size
        (length,) = _LENGTH.unpack_from(self._buffer.data, self._start)
        if length == 0:
            raise MessageError("a message of length 0 came, expected at least 1: the length counts the type byte")
        if length - 1 > self._max_message_bytes:
            raise MessageError(f"the message has {length - 1} bytes, expected at most {self._max_message_bytes} (max_message_bytes)")
        return int(_LENGTH.size + length)


_spares: deque[NDArray[np.uint8]] = deque(maxlen=_SPARES)


def _buffer(size: int) -> NDArray[np.uint8]:
    """An uninitialised buffer; pages that no data comes for never become memory. Only its ``data`` may be handed on.

    An observation's comes back here when nothing refers to it any more. Returned to the allocator, it goes back to the system more often
    than not, and to get its pages again takes longer than to receive 450 kB into them.
    """
    if size <= _HEADER.size + _READ_BYTES or size > _HEADER.size + _TRUSTED_BYTES:
        return np.empty(size, np.uint8)
    try:
        whole = _spares.pop()
    except IndexError:
        whole = np.empty(_HEADER.size + _TRUSTED_BYTES, np.uint8)
    lent = whole[:size]
    weakref.finalize(lent, _spares.append, whole).atexit = False
    return lent
