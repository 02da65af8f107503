"""openpi's msgpack-numpy as most clients carry it along (reference/wire.md §2); knows nothing of the server's."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np


def pack(value: Any) -> bytes:
    """Arrays and scalars as maps with bytes keys."""
    return msgpack.packb(value, default=_encode)


def unpack(message: bytes) -> Any:
    """Strict as upstream: keys are text or bytes; a text frame is no message at all."""
    return msgpack.unpackb(message, object_hook=_decode)


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return value


def _decode(entries: dict[Any, Any]) -> Any:
    if b"__ndarray__" in entries:
        return np.ndarray(buffer=entries[b"data"], dtype=np.dtype(entries[b"dtype"]), shape=entries[b"shape"])
    if b"__npgeneric__" in entries:
        return np.dtype(entries[b"dtype"]).type(entries[b"data"])
    return entries
