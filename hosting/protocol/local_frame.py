"""The local frame of openpi-flash: an observation or a reply as raw arrays and one JSON object (reference/wire.md §4.2).

What openpi-flash can say comes out byte for byte as it says it. Where it loses or breaks something, this codec does not: 0-d arrays keep
their shape, empty maps survive, big-endian arrays are converted, and what the format does not have is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from struct import Struct
from struct import error as StructError
from typing import Any, NamedTuple

import numpy as np

from hosting.protocol.msgpack_reader import MAX_DEPTH, MAX_ELEMENTS
from pi0.errors import MessageError

MAX_JSON_BYTES = 1 << 20
"""Length of the JSON text; numbers in bulk belong in arrays."""

Path = tuple[str, ...]
Array = np.ndarray[Any, Any]

_MAX_NDIM = 32
_MIN_INT, _MAX_INT = -(1 << 63), (1 << 64) - 1
_INLINE_BYTES = 4096  # joining smaller arrays to what stands before them is cheaper than one more part
_NAMES = ("|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8", "|b1")
_DTYPES = {code: np.dtype(name) for code, name in enumerate(_NAMES, start=1)}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_U16, _U32, _U64 = Struct(">H"), Struct(">I"), Struct(">Q")
# After an array's path: dtype code, ndim, shape, byte length.
_ARRAY_HEADS = [Struct(f">BB{ndim}IQ") for ndim in range(_MAX_NDIM + 1)]
_JSON_TYPES = (str, int, float, bool, type(None), list)
_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class LocalFrame(NamedTuple):
    """A decoded frame.

    Attributes:
        schema_id: the sender's hint at what it is, such as ``aloha``; ``unknown`` by default.
        value: nested maps with str keys. Arrays are read-only views of the frame's bytes and need not be aligned.
    """

    schema_id: str
    value: dict[str, Any]


def encode(value: Mapping[str, Any], schema_id: str = "unknown") -> bytes:
    """``value`` as one frame; see :func:`encode_parts`."""
    return b"".join(encode_parts(value, schema_id))


def encode_parts(value: Mapping[str, Any], schema_id: str = "unknown") -> list[bytes | memoryview]:
    """``value`` as a frame in parts, which need no joining before they are sent: large arrays are views of the caller's memory.

    Maps may hold maps, arrays (any layout and byte order), NumPy scalars, str, bool, int, float, None, and lists of anything but arrays.

    Raises:
        ValueError: something that a local frame cannot hold; the message names its key with dots.
    """
    arrays: list[tuple[Path, Array]] = []
    text = _to_json(_scalars(value, (), arrays)).encode()
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"everything but the arrays is {len(text)} bytes of JSON, at most {MAX_JSON_BYTES} fit; send numbers as arrays")
    if len(arrays) > 0xFFFF:
        raise ValueError(f"{len(arrays)} arrays, at most 65535 fit into a local frame; stack some of them")
    schema = schema_id.encode()
    if len(schema) > 0xFF:
        raise ValueError(f"schema_id: has {len(schema)} bytes, at most 255 fit")
    parts: list[bytes | memoryview] = []
    head = bytearray((len(schema),)) + schema + _U16.pack(len(arrays))
    for path, array in arrays:
        head.append(len(path))
        for component in path:
            key = component.encode()
            if len(key) > 0xFF:
                raise ValueError(f"{_dotted(path)}: a key on the way to an array has {len(key)} bytes, at most 255 fit")
            head.append(len(key))
            head += key
        try:
            head += _ARRAY_HEADS[array.ndim].pack(_CODES[array.dtype], array.ndim, *array.shape, array.nbytes)
        except StructError as error:
            raise ValueError(f"{_dotted(path)}: has shape {list(array.shape)}, sizes up to 4294967295 fit") from error
        data = array.reshape(-1).view(np.uint8).data
        if array.nbytes < _INLINE_BYTES:
            head += data
        else:
            parts += (bytes(head), data)
            head = bytearray()
    head += _U32.pack(len(text))
    parts.append(bytes(head + text))
    return parts


def decode(body: bytes | bytearray | memoryview) -> LocalFrame:
    """The frame in ``body``, which lives as long as one of its arrays does.

    Raises:
        MessageError: cut short, bytes left over, sizes that do not match, paths that contradict each other, JSON that is none or not finite,
            or beyond :data:`MAX_DEPTH`, :data:`MAX_ELEMENTS` or :data:`MAX_JSON_BYTES`.
    """
    view = memoryview(body).toreadonly().cast("B")
    data = body if type(body) is bytes else view
    try:
        begin = 1 + data[0]
        schema_id = str(data[1:begin], "utf-8")
        arrays, elements, position = _read_arrays(data, view, begin)
        length = _U32.unpack_from(data, position)[0]
    except (IndexError, StructError) as error:
        raise _malformed(f"truncated: it ends at byte {len(view)}, within a value") from error
    except UnicodeDecodeError as error:
        raise _malformed(f"text: a key or the schema id is not UTF-8, {error.reason}") from error
    position += 4
    if length != len(view) - position:
        raise _malformed(f"its JSON is announced with {length} bytes, but {len(view) - position} bytes are left")
    value = _parse(view[position:], elements) if length else {}
    for path, array in arrays:
        _insert(value, path, array)
    return LocalFrame(schema_id, value)


def _scalars(value: Mapping[str, Any], path: Path, arrays: list[tuple[Path, Array]] | None) -> dict[str, Any]:
    """``value`` for JSON. Its arrays go to ``arrays``; where that is None (within a list) there must be none."""
    if len(path) >= MAX_DEPTH:
        raise ValueError(f"{_dotted(path)}: maps and lists are nested more than {MAX_DEPTH} deep")
    kept: dict[str, Any] = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise ValueError(f"{_dotted((*path, repr(key)))}: the key is of type {type(key).__name__}, expected str")
        here = (*path, key)
        _check_text(key, here)
        if arrays is not None and isinstance(item, np.ndarray):
            arrays.append((here, _plain_array(item, here)))
        elif type(item) is dict or (type(item) not in _JSON_TYPES and isinstance(item, Mapping)):
            inner = _scalars(item, here, arrays)
            # A map of nothing but arrays stands in their paths; an empty one would be lost.
            if inner or not item:
                kept[key] = inner
        else:
            kept[key] = _scalar(item, here)
    return kept


def _scalar(value: Any, path: Path) -> Any:
    """A value that is no map, for JSON."""
    match value:
        case str():
            _check_text(value, path)
            return value
        case None | bool():
            return value
        case int():
            if not _MIN_INT <= value <= _MAX_INT:
                raise ValueError(f"{_dotted(path)}: the integer has more than 64 bits; send it as text")
            return value
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{_dotted(path)}: is {float(value)}, which JSON does not have; send a finite number, or an array of it")
            return value
        case np.bool_() | np.integer() | np.floating() if not isinstance(value, np.longdouble):
            return _scalar(value.item(), path)
        case list() | tuple():
            if len(path) >= MAX_DEPTH:
                raise ValueError(f"{_dotted(path)}: maps and lists are nested more than {MAX_DEPTH} deep")
            return [
                _scalars(item, (*path, str(i)), None) if isinstance(item, Mapping) else _scalar(item, (*path, str(i))) for i, item in enumerate(value)
            ]
        case np.ndarray():
            raise ValueError(f"{_dotted(path)}: an array in a list, which a local frame does not have; stack them into one, or use a map")
        case bytes() | bytearray() | memoryview():
            raise ValueError(f"{_dotted(path)}: bytes, which JSON does not have; send text as str and anything else as an array of uint8")
    raise ValueError(f"{_dotted(path)}: a {type(value).__name__}, which JSON does not have; send an array, number, text, list or map")


def _plain_array(array: Array, path: Path) -> Array:
    """``array`` little-endian and in C order; itself if it is both."""
    if array.dtype not in _CODES:
        little = array.dtype.newbyteorder("<")
        if little not in _CODES:
            fix = "send text as str" if array.dtype.kind in "US" else "send numbers or booleans of at most 64 bits"
            raise ValueError(f"{_dotted(path)}: an array of dtype {array.dtype}, which a local frame does not have; {fix}")
        array = array.astype(little)
    if array.ndim > _MAX_NDIM:
        raise ValueError(f"{_dotted(path)}: an array of {array.ndim} dimensions, at most {_MAX_NDIM} fit")
    return np.asarray(array, order="C")


def _check_text(text: str, path: Path) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{_dotted(path)}: text that UTF-8 does not have, {error.reason} (a file name read with surrogateescape?)") from error


def _read_arrays(data: bytes | memoryview, view: memoryview, position: int) -> tuple[list[tuple[list[str], Array]], int, int]:
    """The arrays with their paths, the number of path components, and the position behind them. ``data`` is ``view``, or quicker than it."""
    arrays = []
    elements = 0
    count = _U16.unpack_from(data, position)[0]
    position += 2
    for _ in range(count):
        depth = data[position]
        position += 1
        elements += depth
        if not 1 <= depth <= MAX_DEPTH:
            raise _malformed(f"an array has a path of {depth} keys at byte {position - 1}, expected 1 to {MAX_DEPTH}")
        if elements > MAX_ELEMENTS:
            raise _malformed(f"it has more than {MAX_ELEMENTS} elements")
        path = []
        for _ in range(depth):
            end = position + 1 + data[position]
            path.append(str(data[position + 1 : end], "utf-8"))
            position = end
        ndim = data[position + 1]
        if ndim > _MAX_NDIM:
            raise _malformed(f"the array {_quoted(path)} has {ndim} dimensions, expected at most {_MAX_NDIM}")
        head = _ARRAY_HEADS[ndim]
        code, _, *shape, length = head.unpack_from(data, position)
        position += head.size
        dtype = _DTYPES.get(code)
        if dtype is None:
            raise _malformed(f"the array {_quoted(path)} has dtype code {code}, expected 1 to {len(_DTYPES)}")
        needed = math.prod(shape) * dtype.itemsize
        if length != needed:
            raise _malformed(f"the array {_quoted(path)} of shape {shape} and dtype {dtype} needs {needed} bytes, but {length} are announced")
        if length > len(view) - position:
            raise _malformed(f"the array {_quoted(path)} has {length} bytes, but {len(view) - position} are left")
        try:
            arrays.append((path, np.ndarray(shape, dtype, view, position)))
        except ValueError as error:  # an empty array whose other sizes are beyond what NumPy counts
            raise _malformed(f"the array {_quoted(path)} cannot have shape {shape}, {error}") from error
        position += length
    return arrays, elements, position


def _insert(value: dict[str, Any], path: list[str], array: Array) -> None:
    for key in path[:-1]:
        value = value.setdefault(key, {})
        if type(value) is not dict:
            raise _malformed(f"the array {_quoted(path)} lies within something that is no map")
    if path[-1] in value:
        raise _malformed(f"{_quoted(path)} is there twice")
    value[path[-1]] = array


def _parse(text: memoryview, elements: int) -> dict[str, Any]:
    """The JSON object in ``text``; ``elements`` are counted already."""
    if len(text) > MAX_JSON_BYTES:
        raise _malformed(f"everything but the arrays is {len(text)} bytes of JSON, expected at most {MAX_JSON_BYTES}; send numbers as arrays")
    try:
        decoded = str(text, "utf-8")
        value = _from_json(decoded)
        if "\\u" in decoded:
            _to_json(value).encode()  # an escape can make half a character, which nothing could ever send back
    except (ValueError, RecursionError) as error:
        raise _malformed(f"its JSON cannot be read, {type(error).__name__}: {' '.join(str(error).split())[:120]}") from error
    if type(value) is not dict:
        raise _malformed(f"its JSON is a {type(value).__name__}, expected an object")
    _check(value, elements)
    return value


def _check(value: dict[str, Any], elements: int) -> None:
    """Every number is finite and of at most 64 bits, and there are neither too many elements nor too many levels."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner = []
        for container in level:
            elements += len(container)
            if elements > MAX_ELEMENTS:
                raise _malformed(f"it has more than {MAX_ELEMENTS} elements; send numbers as arrays")
            for item in container.values() if type(container) is dict else container:
                if type(item) is dict or type(item) is list:
                    inner.append(item)
                elif (type(item) is float and not math.isfinite(item)) or (type(item) is int and not _MIN_INT <= item <= _MAX_INT):
                    raise _malformed("its JSON has a number beyond 64 bits")
        if not inner:
            return
        level = inner
    raise _malformed(f"its JSON is nested more than {MAX_DEPTH} deep")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object has the same key twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"it has {name}, which is no JSON")


_from_json = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant).decode


def _malformed(reason: str) -> MessageError:
    return MessageError(f"the message is not a local frame ({reason})")


def _dotted(path: Path) -> str:
    """A path for people, on one line whatever its keys hold."""
    text = ".".join(path).encode("unicode_escape").decode()
    return text if len(text) <= 120 else text[:117] + "..."


def _quoted(path: list[str]) -> str:
    return f"'{_dotted(tuple(path))}'"
