"""msgpack with NumPy arrays, in the two dialects that robots speak (reference/wire.md §2, peers.md §1.7).

=========  =========================================================================================================================
OPENPI     array: bytes keys ``__ndarray__``, ``data``, ``dtype``, ``shape``; NumPy scalar: ``__npgeneric__``, ``data``, ``dtype``
PYPI       of the package ``msgpack-numpy``. Array: bytes keys ``nd`` (true), ``type``, ``kind``, ``shape``, ``data``; scalar: ``nd`` (false),
           ``type``, ``data`` (its bytes). Old senders write an array's keys as str.
=========  =========================================================================================================================

Decoded arrays are read-only, C-contiguous views of the message, which lives as long as one of them does. They begin where their
bytes do, so they need not be aligned (NumPy takes them as they are; code that needs alignment copies). Whatever a peer sends,
:func:`unpack` returns a value or raises :class:`MessageError`: object, void and complex dtypes are refused, and so is a shape that
does not match its data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from struct import Struct
from typing import Any

import msgpack
import numpy as np

from hosting.protocol.msgpack_reader import MAX_DEPTH, Map, read
from pi0.errors import MessageError

_REFUSED_KINDS = "OVc"  # object (needs pickle), void and structured, complex: openpi refuses them as well
_SCALAR_DATA = {"U": (str,), "S": (bytes,)}
_MAX_NDIM = 32
_UNPACKABLE = (ValueError, TypeError, OverflowError)

_PART_BYTES = 4096
"""Joining smaller arrays to what stands before them is cheaper than two more parts."""

_STAND_IN = msgpack.ExtType(0, os.urandom(16))
"""Where an array's data will be; never sent. Nobody else can write it."""
_PACKED_STAND_IN = msgpack.packb(_STAND_IN)
_BIN16, _BIN32 = Struct(">BH"), Struct(">BI")


class Dialect(Enum):
    """How arrays and NumPy scalars are written."""

    OPENPI = "openpi"
    """As openpi-client and everything that came from it does; byte for byte."""
    PYPI = "pypi"
    """As the package ``msgpack-numpy`` does; byte for byte."""


def pack(value: Any, dialect: Dialect = Dialect.OPENPI) -> bytes:
    """``value`` as msgpack; arrays in C order.

    Raises:
        ValueError: an array or scalar of a dtype that the dialect does not have, or text that UTF-8 does not have. Like the others, it names the key.
        TypeError: an object that msgpack does not have.
        OverflowError: an integer beyond 64 bits.
    """
    return _packed(value, _encode_openpi if dialect is Dialect.OPENPI else _encode_pypi)


def pack_parts(value: Any) -> list[bytes | memoryview]:
    """``pack(value)`` in parts, which need no joining before they are sent: the data of large arrays are views of the caller's memory.

    Raises:
        ValueError, TypeError, OverflowError: as :func:`pack`.
    """
    arrays: list[memoryview] = []

    def encode(item: Any) -> Any:
        encoded = _encode_openpi(item)
        data = encoded[b"data"]
        if isinstance(item, np.ndarray) and len(data) >= _PART_BYTES:
            arrays.append(memoryview(data))
            encoded[b"data"] = _STAND_IN
        return encoded

    pieces = _packed(value, encode).split(_PACKED_STAND_IN)
    parts: list[bytes | memoryview] = []
    for piece, data in zip(pieces, arrays, strict=False):
        size = len(data)
        parts += (piece + (_BIN16.pack(0xC5, size) if size < 1 << 16 else _BIN32.pack(0xC6, size)), data)
    return [*parts, pieces[-1]]


def unpack(message: bytes | bytearray | memoryview) -> Any:
    """The value of one msgpack ``message`` in either dialect.

    Raises:
        MessageError: not msgpack, bytes left over, too deeply nested, too many elements, or an array that cannot be one.
    """
    return unpack_with_dialect(message)[0]


def unpack_with_dialect(message: bytes | bytearray | memoryview) -> tuple[Any, Dialect | None]:
    """The value of ``message`` and the dialect of its first array or NumPy scalar; None when it has neither.

    Raises:
        MessageError: as :func:`unpack` does.
    """
    first: Dialect | None = None

    def hook(entries: Map) -> Any:
        nonlocal first
        if b"__ndarray__" in entries:
            first = first or Dialect.OPENPI
            return _array(entries.get(b"dtype"), entries.get(b"shape"), entries.get(b"data"))
        if b"__npgeneric__" in entries:
            first = first or Dialect.OPENPI
            return _openpi_scalar(entries.get(b"dtype"), entries.get(b"data"))
        if b"nd" in entries:
            first = first or Dialect.PYPI
            return _pypi_value(entries)
        if "nd" in entries and "type" in entries and "shape" in entries and "data" in entries:
            first = first or Dialect.PYPI
            return _array(entries["type"], entries["shape"], entries["data"])
        if b"complex" in entries and b"data" in entries:
            raise MessageError("a complex number cannot be read; send its real and imaginary parts as two numbers")
        return entries

    return read(message, hook), first


def _packed(value: Any, encode: Callable[[Any], Any]) -> bytes:
    try:
        packed: bytes = msgpack.packb(value, default=encode)
    except _UNPACKABLE as error:
        kind = next(kind for kind in _UNPACKABLE if isinstance(error, kind))
        raise kind(f"{_culprit(value, encode)}{error}") from error
    return packed


def _culprit(value: Any, encode: Callable[[Any], Any]) -> str:
    """The keys and indices, with dots and a colon, of the first thing in ``value`` that cannot be packed; empty where it has none."""
    keys: list[str] = []
    while isinstance(value, dict | list | tuple) and len(keys) < MAX_DEPTH:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            try:
                msgpack.packb(item, default=encode)
            except _UNPACKABLE:
                keys.append(str(key))
                value = item
                break
        else:
            break  # it is the key that cannot
    return f"{'.'.join(keys)}: " if keys else ""


def _encode_openpi(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": _data(value), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        _refuse(value.dtype, ValueError)
        item = value.item()
        if isinstance(item, np.generic):
            raise ValueError(f"Unsupported dtype: {value.dtype}")
        return {b"__npgeneric__": True, b"data": item, b"dtype": value.dtype.str}
    raise _unknown(value)


def _encode_pypi(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {b"nd": True, b"type": value.dtype.str, b"kind": b"", b"shape": value.shape, b"data": _data(value)}
    if isinstance(value, np.bool_ | np.number):
        _refuse(value.dtype, ValueError)
        return {b"nd": False, b"type": value.dtype.str, b"data": value.tobytes()}
    raise _unknown(value)


def _data(array: np.ndarray[Any, Any]) -> memoryview | bytes:
    _refuse(array.dtype, ValueError)
    flat = np.ascontiguousarray(array).reshape(-1)
    # A byte view spares a copy; dtypes of no bytes (an empty string array) cannot be viewed as bytes.
    return flat.view(np.uint8).data if flat.size and flat.dtype.kind not in "Mm" else flat.tobytes()


def _unknown(value: object) -> Exception:
    if isinstance(value, int):
        return OverflowError("an integer of more than 64 bits; send it as text")
    return TypeError(f"cannot send a {type(value).__name__}; convert it to an array, number, string, list or map")


def _array(name: Any, shape: Any, data: Any) -> np.ndarray[Any, Any]:
    dtype = _dtype(name)
    if type(shape) is not list or len(shape) > _MAX_NDIM:
        raise _bad_shape(shape)
    size = dtype.itemsize
    for length in shape:
        if type(length) is not int or length < 0:
            raise _bad_shape(shape)
        size *= length
    if type(data) is not memoryview or data.nbytes != size:
        came = f"{data.nbytes} bytes" if isinstance(data, memoryview) else type(data).__name__
        raise MessageError(f"an array of shape {shape} and dtype {dtype.str} needs {size} bytes of data, got {came}")
    if dtype.itemsize == 0:
        # NumPy makes elements of no bytes one byte long, so this would let an empty message ask for any amount of memory.
        if math.prod(shape):
            raise MessageError(f"an array of shape {shape} has dtype {dtype.str}, whose elements hold nothing; send texts of at least one character")
        return np.zeros(shape, dtype)
    try:
        return np.ndarray(shape, dtype, data)
    except ValueError as error:  # an empty array whose other sizes are beyond what NumPy counts
        raise MessageError(f"an array of shape {shape} and dtype {dtype.str} cannot be made ({_reason(error)})") from error


def _bad_shape(shape: object) -> MessageError:
    return MessageError(f"an array has shape {_short(shape)}, expected a list of at most {_MAX_NDIM} sizes")


def _openpi_scalar(name: Any, data: Any) -> Any:
    dtype = _dtype(name)
    number: Any = bytes(data) if isinstance(data, memoryview) else data
    try:
        # By kind, as NumPy would make a text of as many zeros as an integer says.
        if type(number) not in _SCALAR_DATA.get(dtype.kind, (bool, int, float)):
            raise TypeError(f"its data is a {type(number).__name__}")
        # NumPy cuts fractions off, and before version 2 lets integers wrap around.
        if dtype.kind in "iu" and not (int(number) == number and np.iinfo(dtype).min <= number <= np.iinfo(dtype).max):
            raise ValueError(f"{number} is no {dtype}")
        with np.errstate(over="raise"):
            scalar = dtype.type(number)
    except (ValueError, TypeError, OverflowError, FloatingPointError) as error:
        raise MessageError(f"a NumPy scalar of dtype {dtype} cannot be read ({_reason(error)})") from error
    return scalar


def _pypi_value(entries: Map) -> Any:
    name, data = entries.get(b"type"), entries.get(b"data")
    if entries[b"nd"] is True:
        kind = entries.get(b"kind", b"")
        if isinstance(kind, str | bytes | memoryview) and kind in (b"V", b"O", "V", "O"):
            raise MessageError(f"Unsupported dtype: {_short(name)}; send arrays of numbers, booleans or text")
        return _array(name, entries.get(b"shape"), data)
    dtype = _dtype(name)
    if dtype.kind not in "biuf" or not isinstance(data, memoryview) or data.nbytes != dtype.itemsize:
        came = f"{data.nbytes} bytes" if isinstance(data, memoryview) else type(data).__name__
        raise MessageError(f"a NumPy scalar of dtype {dtype} cannot be read (expected {dtype.itemsize} bytes of a number, got {came})")
    return np.frombuffer(data, dtype)[0]


def _dtype(name: Any) -> np.dtype[Any]:
    if not isinstance(name, str) or len(name) > 32:
        raise MessageError(f"an array has dtype {_short(name)}, expected a string such as '<f4'")
    return _named_dtype(name)


@lru_cache(maxsize=256)
def _named_dtype(name: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError, SyntaxError, OverflowError, MemoryError, DeprecationWarning) as error:
        raise MessageError(f"an array has dtype {name!r}, which is none of NumPy's") from error
    _refuse(dtype, MessageError)
    return dtype


def _refuse(dtype: np.dtype[Any], error: type[Exception]) -> None:
    if dtype.kind in _REFUSED_KINDS:
        raise error(f"Unsupported dtype: {dtype}; send arrays of numbers, booleans or text")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {_cut(str(error))}"


def _short(value: object) -> str:
    return _cut(repr(bytes(value[:120]) if isinstance(value, memoryview) else value))


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:117] + "..."
