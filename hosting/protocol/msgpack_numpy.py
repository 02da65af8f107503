"""msgpack with NumPy arrays, in openpi's dialect, byte for byte (reference/wire.md §2).

An array is a map with *bytes* keys ``__ndarray__``, ``data``, ``dtype``, ``shape``; a NumPy scalar one with ``__npgeneric__``,
``data``, ``dtype``. Decoded arrays are read-only views of the message. Whatever a peer sends, :func:`unpack` returns a value or
raises :class:`MessageError`: object, void and complex dtypes are refused, and so is a shape that does not match its data.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np

from pi0.errors import MessageError

_REFUSED_KINDS = "OVc"  # object (needs pickle), void and structured, complex: openpi refuses them as well
_MAX_NDIM = 32


def pack(value: Any) -> bytes:
    """``value`` as msgpack; arrays in C order.

    Raises:
        ValueError: an array or scalar of a dtype that the dialect does not have.
        TypeError: an object that msgpack does not have.
        OverflowError: an integer beyond 64 bits.
    """
    packed: bytes = msgpack.packb(value, default=_encode)
    return packed


def unpack(message: bytes | memoryview) -> Any:
    """The value of one msgpack ``message``.

    Raises:
        MessageError: not msgpack, bytes left over, too deeply nested, or an array that cannot be one.
    """
    try:
        return msgpack.unpackb(message, object_hook=_decode, raw=False)
    except MessageError:
        raise
    except (ValueError, TypeError, RecursionError, OverflowError, MemoryError) as error:
        raise MessageError(f"the message is not msgpack as openpi clients send it ({_reason(error)})") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        _refuse(value.dtype, ValueError)
        flat = np.ascontiguousarray(value).reshape(-1)
        # A byte view spares a copy; dtypes of no bytes (an empty string array) cannot be viewed as bytes.
        data = flat.view(np.uint8).data if flat.size and flat.dtype.kind not in "Mm" else flat.tobytes()
        return {b"__ndarray__": True, b"data": data, b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        _refuse(value.dtype, ValueError)
        item = value.item()
        if isinstance(item, np.generic):
            raise ValueError(f"Unsupported dtype: {value.dtype}")
        return {b"__npgeneric__": True, b"data": item, b"dtype": value.dtype.str}
    raise TypeError(f"cannot send a {type(value).__name__}; convert it to an array, number, string, list or map")


def _decode(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        return _decode_array(value)
    if b"__npgeneric__" in value:
        dtype = _dtype(value.get(b"dtype"))
        data = value.get(b"data")
        try:
            if not isinstance(data, bool | int | float | str | bytes):
                raise TypeError(f"its data is a {type(data).__name__}")
            return dtype.type(data)
        except (ValueError, TypeError, OverflowError) as error:
            raise MessageError(f"a NumPy scalar of dtype {dtype} cannot be read ({_reason(error)})") from error
    return value


def _decode_array(value: dict[Any, Any]) -> np.ndarray[Any, Any]:
    dtype, shape, data = _dtype(value.get(b"dtype")), value.get(b"shape"), value.get(b"data")
    if not isinstance(shape, list) or len(shape) > _MAX_NDIM or not all(type(n) is int and n >= 0 for n in shape):
        raise MessageError(f"an array has shape {_short(shape)}, expected a list of at most {_MAX_NDIM} sizes")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        came = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise MessageError(f"an array of shape {shape} and dtype {dtype.str} needs {math.prod(shape) * dtype.itemsize} bytes of data, got {came}")
    if dtype.itemsize == 0:
        # NumPy makes elements of no bytes one byte long, so this would let an empty message ask for any amount of memory.
        if math.prod(shape):
            raise MessageError(f"an array of shape {shape} has dtype {dtype.str}, whose elements hold nothing; send texts of at least one character")
        return np.zeros(shape, dtype)
    return np.frombuffer(data, dtype).reshape(shape)


def _dtype(name: Any) -> np.dtype[Any]:
    if not isinstance(name, str) or len(name) > 32:
        raise MessageError(f"an array has dtype {_short(name)}, expected a string such as '<f4'")
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError, SyntaxError) as error:
        raise MessageError(f"an array has dtype {name!r}, which is none of NumPy's") from error
    _refuse(dtype, MessageError)
    return dtype


def _refuse(dtype: np.dtype[Any], error: type[Exception]) -> None:
    if dtype.kind in _REFUSED_KINDS:
        raise error(f"Unsupported dtype: {dtype}; send arrays of numbers, booleans or text")


def _reason(error: Exception) -> str:
    # Some of msgpack's errors say everything with their type.
    return f"{type(error).__name__}: {_short(error)}" if str(error) else type(error).__name__


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else text[:117] + "..."
