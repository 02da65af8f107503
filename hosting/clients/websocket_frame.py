"""A client's large WebSocket frame (RFC 6455 §5.2), made in memory that is used again.

The library's way there makes three new objects of the message's size. Their memory goes back to the system after every request, and to get
its pages again takes a third of a millisecond for 450 kB, as long as everything else that a client does.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from websockets.frames import Opcode

from hosting.clients.link import Buffer

LARGE_BYTES = 1 << 16
"""From here on a frame's length takes 64 bits."""

_HEADER = struct.Struct("!BBQ4s")
_WHOLE_BINARY = 0x80 | Opcode.BINARY
_MASKED_LENGTH_64 = 0x80 | 127
_MASK_BYTES = 4
_PAYLOAD = 16
"""Where the payload begins, so that it lies on whole words; the header ends there."""
_HEADER_BEGINS = _PAYLOAD - _HEADER.size

_KEPT_BYTES = 4 << 20
"""Larger messages get memory of their own."""


class FrameMemory:
    """Makes one frame at a time."""

    def __init__(self) -> None:
        self._kept = np.empty(0, np.uint64)

    def frame(self, parts: Sequence[Buffer]) -> memoryview:
        """The binary message made of ``parts``, of ``LARGE_BYTES`` or more, as one masked frame. Good until the next call."""
        size = sum(memoryview(part).nbytes for part in parts)
        words = self._memory(size)
        memory = memoryview(words).cast("B")  # type: ignore[arg-type]
        mask = secrets.token_bytes(_MASK_BYTES)
        _HEADER.pack_into(memory, _HEADER_BEGINS, _WHOLE_BINARY, _MASKED_LENGTH_64, size, mask)
        end = _PAYLOAD
        for part in parts:
            view = memoryview(part).cast("B")
            begin, end = end, end + len(view)
            memory[begin:end] = view
        payload = words[_PAYLOAD // 8 :]
        np.bitwise_xor(payload, np.frombuffer(mask * 2, np.uint64), out=payload)
        return memory[_HEADER_BEGINS:end]

    def _memory(self, size: int) -> NDArray[np.uint64]:
        count = _PAYLOAD // 8 + -(-size // 8)
        if len(self._kept) >= count:
            return self._kept[:count]
        words = np.empty(count, np.uint64)
        if words.nbytes <= _KEPT_BYTES:
            self._kept = words
        return words
