"""A msgpack reader that trusts nothing and copies little.

Every size is checked against the bytes that are there before anything is made of it, and nesting and the number of elements are
bounded, so memory stays in proportion to the message whatever a peer sends. Array data, nearly all of a robot's traffic, is not copied: a
``bin`` in a map is shown to the map's hook as a read-only view of the message.

What it reads, it reads as ``msgpack.unpackb(message, raw=False)`` does (of equal keys the last wins); extension types and timestamps it refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Any

from pi0.errors import MessageError

MAX_DEPTH = 32
"""Containers within containers."""
MAX_ELEMENTS = 50_000
"""List items and map entries in one message."""

Map = dict[str | bytes, Any]

_FLOAT64, _FLOAT32 = Struct(">d").unpack_from, Struct(">f").unpack_from
_HEADER_SIZES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
# Bytes after the first, and whether there is a sign.
_INTEGERS = {0xCC: (1, False), 0xCD: (2, False), 0xCE: (4, False), 0xCF: (8, False)} | {0xD0 + i: (1 << i, True) for i in range(4)}
# The bytes around an array's data, its dtype and its shape.
_ARRAY_BEGINS = b"\xc4\x0b__ndarray__\xc3\xc4\x04data"
_DTYPE_OF_3 = b"\xc4\x05dtype\xa3"
_SHAPE = b"\xc4\x05shape"
_BIN_HEADER_SIZES = {0xC4: 1, 0xC5: 2, 0xC6: 4}


def read(message: bytes | bytearray | memoryview, hook: Callable[[Map], Any] | None = None) -> Any:
    """The value of one msgpack ``message``.

    Args:
        hook: called with every map that has a bytes key or a ``bin`` value (no other can stand for an array), inner ones first; what it
            returns takes the map's place. ``bin`` values come to it as views of ``message``; in a map that it hands back they become ``bytes``.

    Raises:
        MessageError: not msgpack, cut short, bytes left over, or beyond :data:`MAX_DEPTH` or :data:`MAX_ELEMENTS`.
    """
    reader = _Reader(message, hook)
    try:
        value = reader.value(0)
    except UnicodeDecodeError as error:
        raise malformed(f"text: a str that ends before byte {reader.position} is not UTF-8, {error.reason}") from error
    if reader.position != reader.size:
        raise malformed(f"trailing: the value ends at byte {reader.position} of {reader.size}")
    return bytes(value) if type(value) is memoryview else value


def malformed(reason: str) -> MessageError:
    """The error for bytes that are not msgpack; ``reason`` begins with one word for the kind of defect."""
    return MessageError(f"the message is not msgpack as openpi clients send it ({reason})")


class _Reader:
    """Where the reader is in one message, and how many elements it will still make."""

    __slots__ = ("data", "elements_left", "hook", "position", "size", "view")

    def __init__(self, message: bytes | bytearray | memoryview, hook: Callable[[Map], Any] | None) -> None:
        if type(message) is bytes:
            # Indexing and slicing bytes is quicker than its view.
            self.data: bytes | memoryview = message
            self.view = memoryview(message)
        else:
            self.data = self.view = memoryview(message).toreadonly().cast("B")
        self.size = len(self.view)
        self.position = 0
        self.elements_left = MAX_ELEMENTS
        self.hook = hook

    def value(self, depth: int) -> Any:
        """The value at the position, which moves behind it; a ``bin`` as a view. The first byte tells all; the common ones come first."""
        start = self.position
        if start >= self.size:
            raise malformed(f"truncated: the message ends at byte {self.size}, where a value should begin")
        self.position = position = start + 1
        head = self.data[start]
        if head < 0x80:
            return head
        if head < 0x90:
            return self.map(head & 0x0F, depth)
        if head < 0xA0:
            return self.list(head & 0x0F, depth)
        if head < 0xC0:
            self.position = end = position + (head & 0x1F)
            if end > self.size:
                raise self.too_long("str", start, head & 0x1F)
            return str(self.data[position:end], "utf-8")
        if head >= 0xE0:
            return head - 0x100
        if head == 0xCB:
            self.position = position + 8
            if position + 8 > self.size:
                raise self.too_long("float", start, 8)
            return _FLOAT64(self.data, position)[0]
        if head in _HEADER_SIZES:
            return self.sized(head, depth)
        if head == 0xC3:
            return True
        if head == 0xC2:
            return False
        if head == 0xC0:
            return None
        if head in _INTEGERS:
            width, signed = _INTEGERS[head]
            self.skip(width)
            return int.from_bytes(self.data[position : position + width], "big", signed=signed)
        if head == 0xCA:
            self.skip(4)
            return _FLOAT32(self.data, position)[0]
        if head == 0xC1:
            raise malformed(f"reserved: byte 0xc1 at {start} begins nothing")
        raise malformed(f"extension: a value of an extension type or a timestamp begins at byte {start}; send numbers, text or arrays")

    def sized(self, head: int, depth: int) -> Any:
        """A ``bin`` (as a view), str, list or map whose size stands behind its first byte."""
        position, start = self.position, self.position - 1
        self.skip(_HEADER_SIZES[head])
        length = int.from_bytes(self.data[position : self.position], "big")
        if head >= 0xDC:
            return self.list(length, depth) if head < 0xDE else self.map(length, depth)
        position = self.position
        self.position = end = position + length
        if end > self.size:
            raise self.too_long("bin" if head < 0xD9 else "str", start, length)
        return self.view[position:end] if head < 0xD9 else str(self.data[position:end], "utf-8")

    def list(self, count: int, depth: int) -> list[Any]:
        """A list of ``count`` items."""
        self.elements_left -= count
        if depth >= MAX_DEPTH or count > self.size - self.position or self.elements_left < 0:
            raise self.refused(count, depth)
        value = self.value
        depth += 1
        items = []
        for _ in range(count):
            item = value(depth)
            items.append(bytes(item) if type(item) is memoryview else item)
        return items

    def map(self, count: int, depth: int) -> Any:
        """What the hook makes of a map of ``count`` entries."""
        self.elements_left -= count
        if depth >= MAX_DEPTH or 2 * count > self.size - self.position or self.elements_left < 0:
            raise self.refused(count, depth)
        depth += 1
        if count == 4 and self.hook is not None and (array := self.openpi_array(depth)) is not None:
            return self.hook(array)
        data, size = self.data, self.size
        value = self.value
        entries: Map = {}
        bytes_keys = False
        views = []
        for _ in range(count):
            start = self.position
            head = data[start] if start < size else 0
            # The two forms that nearly all keys have, without a call.
            if 0xA0 <= head < 0xC0:
                self.position = end = start + 1 + (head & 0x1F)
                if end > size:
                    raise self.too_long("str", start, head & 0x1F)
                key: Any = str(data[start + 1 : end], "utf-8")
            elif head == 0xC4 and start + 1 < size:
                self.position = end = start + 2 + data[start + 1]
                if end > size:
                    raise self.too_long("bin", start, data[start + 1])
                key = bytes(data[start + 2 : end])
                bytes_keys = True
            else:
                key = value(depth)
                if type(key) is memoryview:
                    key = bytes(key)
                    bytes_keys = True
                elif type(key) is not str:
                    raise malformed(f"keys: a map has a key of type {type(key).__name__} at byte {start}, expected str or bytes")
            entries[key] = item = value(depth)
            if type(item) is memoryview:
                views.append(key)
        if self.hook is not None and (bytes_keys or views):
            result = self.hook(entries)
            if result is not entries:
                return result
        for key in views:
            item = entries[key]
            if type(item) is memoryview:  # it need not be, if the key came again
                entries[key] = bytes(item)
        return entries

    def openpi_array(self, depth: int) -> Map | None:
        """The entries of a map that is an array just as openpi's clients write it, or None: a quick way, as nearly all bytes come in such maps."""
        data = self.data
        position = self.position + len(_ARRAY_BEGINS)
        if data[self.position : position] != _ARRAY_BEGINS or position >= self.size:
            return None
        header_size = _BIN_HEADER_SIZES.get(data[position])
        if header_size is None:
            return None
        begin = position + 1 + header_size
        end = begin + int.from_bytes(data[position + 1 : begin], "big")
        if data[end : end + 8] != _DTYPE_OF_3 or data[end + 11 : end + 18] != _SHAPE:
            return None
        self.position = end + 18
        return {
            b"__ndarray__": True,
            b"data": self.view[begin:end],
            b"dtype": str(data[end + 8 : end + 11], "utf-8"),
            b"shape": self.value(depth),
        }

    def refused(self, count: int, depth: int) -> MessageError:
        """The error for a list or map of ``count`` elements of which nothing has been made yet."""
        if depth >= MAX_DEPTH:
            return malformed(f"nesting: lists and maps are nested more than {MAX_DEPTH} deep at byte {self.position}")
        if self.elements_left < 0 and count <= self.size - self.position:
            return malformed(f"elements: more than {MAX_ELEMENTS} list items and map entries; send numbers as arrays")
        return malformed(f"truncated: {count} elements are announced at byte {self.position}, but {self.size - self.position} bytes are left")

    def skip(self, count: int) -> None:
        """Move the position; there must be that many bytes."""
        self.position += count
        if self.position > self.size:
            raise malformed(f"truncated: the message ends at byte {self.size}, within a value")

    def too_long(self, kind: str, start: int, length: int) -> MessageError:
        """The error for a ``kind`` of ``length`` bytes at ``start`` that is not all there."""
        return malformed(f"truncated: a {kind} of {length} bytes begins at byte {start}, but the message ends at byte {self.size}")
