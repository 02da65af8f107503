"""Messages that come in pieces, many at once: on each stream of a QUIC connection one, ``type byte, body``, ended by the end of the stream."""

from __future__ import annotations

from dataclasses import dataclass, field

from hosting.protocol.messages import Message, MessageType
from hosting.protocol.striping import PART_HEADER_BYTES


@dataclass
class _Partial:
    """``chunks`` is None when the rest of the message is thrown away."""

    chunks: list[bytes] | None = field(default_factory=list)
    bytes: int = 0


class Gatherer:
    """Pieces → messages.

    Args:
        max_message_bytes: of one message's body, and of all that are unfinished together; a PART's header does not count. May be set later.

    Attributes:
        held_bytes: of what has come of unfinished messages.
    """

    def __init__(self, max_message_bytes: int) -> None:
        self.max_message_bytes = max_message_bytes
        self.held_bytes = 0
        self._partials: dict[int, _Partial] = {}

    def __contains__(self, stream: int) -> bool:
        """Whether more is to come on a stream."""
        return stream in self._partials

    def __len__(self) -> int:
        return len(self._partials)

    def begin(self, stream: int) -> None:
        """Pieces will come on a stream that has not been heard of."""
        self._partials[stream] = _Partial()

    def add(self, stream: int, data: bytes, *, last: bool) -> Message | str | None:
        """The next piece of what comes on a stream → the message when it is whole, or why it is refused; the rest of a refused one is thrown away."""
        partial = self._partials[stream]
        if last:
            del self._partials[stream]
        if partial.chunks is None:
            return None
        partial.chunks.append(data)
        partial.bytes += len(data)
        self.held_bytes += len(data)
        if self.held_bytes > self.max_message_bytes + 1 + PART_HEADER_BYTES:
            self._discard(partial)
            return self._too_large()
        if not last:
            return None
        chunks = partial.chunks
        self._discard(partial)
        whole = memoryview(chunks[0] if len(chunks) == 1 else b"".join(chunks))
        if not whole:
            return "the message is empty; expected a type byte and a body"
        message = Message(whole[0], whole[1:])
        if len(message.body) > self.max_message_bytes + (PART_HEADER_BYTES if message.type == MessageType.PART else 0):
            return self._too_large()
        return message

    def discard(self, stream: int) -> bool:
        """Throw away what has come on a stream and what will come. False if there was nothing to throw away any more."""
        partial = self._partials.get(stream)
        if partial is None or partial.chunks is None:
            return False
        self._discard(partial)
        return True

    def end(self, stream: int) -> None:
        """Nothing more will come on a stream."""
        self.discard(stream)
        self._partials.pop(stream, None)

    def _discard(self, partial: _Partial) -> None:
        partial.chunks = None
        self.held_bytes -= partial.bytes

    def _too_large(self) -> str:
        return f"the message has more than {self.max_message_bytes} bytes"
