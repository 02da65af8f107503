"""One message spread over several connections of a client: on a lossy link each connection has its own congestion window.

A PART's body is a header (big-endian: 16 bytes transfer id, u16 index, u16 count, u8 type of the whole message, u64 its body's bytes) and a slice
of the body. The transfer id is the client's choice, random, so that nobody else's parts get in. Part 0's stream carries the answer to the whole;
the others are answered with an empty PART_REPLY as they are taken, or with an ERROR. An ERROR on any of the streams answers the whole message.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from hosting.protocol.messages import Message, MessageType
from pi0.errors import MessageError

MAX_PARTS = 64
MAX_UNFINISHED = 256
TRANSFER_ID_BYTES = 16
_HEADER = struct.Struct(f"!{TRANSFER_ID_BYTES}sHHBQ")
PART_HEADER_BYTES = _HEADER.size

Buffer = bytes | bytearray | memoryview
Reply = TypeVar("Reply", bound=Hashable)


def split(type: int, body: Sequence[Buffer], parts: int, transfer_id: bytes) -> Iterator[list[Buffer]]:
    """The bodies of the PART messages that carry a message: its body cut into ``parts`` contiguous slices of about the same length.

    Args:
        body: in pieces; nothing of them is copied.
        parts: 1 to 64.
        transfer_id: 16 random bytes.
    """
    pieces = [memoryview(piece).cast("B") for piece in body]
    total = sum(piece.nbytes for piece in pieces)
    for index in range(parts):
        start, stop = total * index // parts, total * (index + 1) // parts
        part: list[Buffer] = [_HEADER.pack(transfer_id, index, parts, type, total)]
        offset = 0
        for piece in pieces:
            cut = piece[max(0, start - offset) : max(0, stop - offset)]
            if cut.nbytes:
                part.append(cut)
            offset += piece.nbytes
        yield part


@dataclass(frozen=True)
class Taken(Generic[Reply]):
    """A part that was taken.

    Attributes:
        index: its number; the stream of number 0 is answered with the answer to the whole.
        whole: with the last part, the message and where its answer goes.
    """

    index: int
    whole: tuple[Reply, Message] | None


@dataclass
class _Transfer(Generic[Reply]):
    """What has arrived of one message."""

    count: int
    type: int
    total_bytes: int
    deadline_s: float
    slices: dict[int, Buffer] = field(default_factory=dict)
    arrived_bytes: int = 0
    first: Reply | None = None


class Assembler(Generic[Reply]):
    """Puts transfers together. ``Reply`` names, for the caller, the stream on which a part came.

    Args:
        max_message_bytes: for one whole message; twice that is held at most in unfinished ones, and what comes beyond is refused.
        timeout_s: after its latest part, how long a transfer waits for the next.
    """

    def __init__(self, *, max_message_bytes: int, timeout_s: float = 30.0) -> None:
        self._max_message_bytes = max_message_bytes
        self._timeout_s = timeout_s
        self._transfers: dict[bytes, _Transfer[Reply]] = {}
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of the transfers that are not whole yet."""
        return self._held_bytes

    def add(self, body: Buffer, reply: Reply, now: float) -> Taken[Reply]:
        """Take one part.

        Raises:
            MessageError: the part is malformed, does not fit its transfer, or there is no room for it; what arrived before is kept.
        """
        if len(body) < _HEADER.size:
            raise MessageError(f"a part has {len(body)} bytes; expected a header of {_HEADER.size} bytes and a slice")
        transfer_id, index, count, type, total = _HEADER.unpack_from(body)
        piece = memoryview(body)[_HEADER.size :]
        if not 1 <= count <= MAX_PARTS or index >= count:
            raise MessageError(f"a part says that it is number {index} of {count}; expected 1 to {MAX_PARTS} parts, counted from 0")
        if type == MessageType.PART:
            raise MessageError("a part carries a part; expected a whole message cut once")
        if total > self._max_message_bytes:
            raise MessageError(f"the message has {total} bytes; the server takes at most {self._max_message_bytes}")
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            transfer = _Transfer(count, type, total, now)
        if (count, type, total) != (transfer.count, transfer.type, transfer.total_bytes):
            raise MessageError(f"part {index} disagrees with the parts before it on the message's type, length or number of parts")
        if index in transfer.slices:
            raise MessageError(f"part {index} came twice")
        arrived = transfer.arrived_bytes + len(piece)
        if arrived > total or (len(transfer.slices) + 1 == count and arrived != total):
            raise MessageError(f"the parts have {arrived} bytes together; they announce {total}")
        crowded = transfer_id not in self._transfers and len(self._transfers) >= MAX_UNFINISHED
        if crowded or self._held_bytes + len(piece) > 2 * self._max_message_bytes:
            raise MessageError("too many unfinished striped messages at once; send again, over fewer connections")
        transfer.slices[index] = piece
        transfer.arrived_bytes = arrived
        transfer.deadline_s = now + self._timeout_s
        if index == 0:
            transfer.first = reply
        self._transfers[transfer_id] = transfer
        self._held_bytes += len(piece)
        if len(transfer.slices) < count:
            return Taken(index, None)
        self._drop(transfer_id)
        assert transfer.first is not None
        return Taken(index, (transfer.first, Message(type, b"".join(transfer.slices[number] for number in range(count)))))

    def expire(self, now: float) -> list[tuple[Reply, str]]:
        """Forget transfers whose parts stopped coming. Returns where a client waits, and what to tell it."""
        expired = [(transfer_id, transfer) for transfer_id, transfer in self._transfers.items() if transfer.deadline_s <= now]
        for transfer_id, _ in expired:
            self._drop(transfer_id)
        return [
            (transfer.first, f"only {len(transfer.slices)} of {transfer.count} parts came within {self._timeout_s:g} s; send the request again")
            for _, transfer in expired
            if transfer.first is not None
        ]

    def next_deadline_s(self) -> float | None:
        """When :meth:`expire` has something to do."""
        return min((transfer.deadline_s for transfer in self._transfers.values()), default=None)

    def forget(self, abandoned: Callable[[Reply], bool]) -> None:
        """Drop the transfers whose answers nobody waits for any more."""
        for transfer_id, transfer in list(self._transfers.items()):
            if transfer.first is not None and abandoned(transfer.first):
                self._drop(transfer_id)

    def _drop(self, transfer_id: bytes) -> None:
        self._held_bytes -= self._transfers.pop(transfer_id).arrived_bytes
