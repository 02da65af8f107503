"""What :class:`~hosting.clients.client.Client` needs of a transport: one blocking conversation, one request at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hosting.protocol.messages import Message

Buffer = bytes | bytearray | memoryview


class Link(Protocol):
    """An open conversation. Not safe to share between threads; its owner holds a lock."""

    @property
    def hello(self) -> Message:
        """METADATA_REPLY as it came when the conversation began."""
        ...

    def exchange(self, type: int, body: Sequence[Buffer], timeout_s: float | None) -> Message:
        """Send one message (its body in parts, which need no joining before) and wait for its answer.

        Raises:
            ReplyTimeoutError: none came within ``timeout_s``. A link that cannot tell the late answer from the next one is closed.
            ConnectionLostError: the connection is gone; the link is closed.
        """
        ...

    @property
    def closed(self) -> bool:
        """Whether the link can no longer be used."""
        ...

    def close(self) -> None:
        """End the conversation; harmless when it has ended."""
        ...
