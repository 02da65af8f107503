"""The messages of a conversation, the same on every transport: a type and a body.

A Unix socket frames them as wire.md §4.1 says (u32 big-endian length, type byte, body), QUIC carries one per direction of a stream
(type byte, body, end of stream), and a WebSocket knows only binary and text, from which the type follows. Types below 0x10 go to the
server. 0x01–0x03 and 0x11–0x14 are openpi-flash's; the msgpack ones beside them are ours.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class MessageType(IntEnum):
    """What a message is."""

    TEXT = 0x00
    """A WebSocket text frame from a client: nothing that a server takes."""
    METADATA = 0x01
    """Asks for the metadata. Body: empty, or a msgpack map that may have ``api_key``."""
    INFER_FRAME = 0x02
    """An observation as a local frame (wire.md §4.2)."""
    RESET = 0x03
    """Ends what is remembered of the connection's session. Body: empty, or a msgpack map that may have ``session_id`` or ``session_ids``."""
    INFER = 0x04
    """An observation as a msgpack map; all that a WebSocket's binary frame may hold."""
    PART = 0x05
    """A slice of a message that is spread over several QUIC connections (``hosting/protocol/striping.py``)."""

    METADATA_REPLY = 0x11
    """msgpack map."""
    FRAME_REPLY = 0x12
    """The answer to INFER_FRAME, a local frame."""
    ERROR = 0x13
    """UTF-8 text for people: what failed and what to do."""
    RESET_REPLY = 0x14
    """Empty, or a word of confirmation in UTF-8."""
    REPLY = 0x15
    """The answer to INFER, msgpack."""
    FAILURE = 0x16
    """msgpack map ``{"type": "error", "code": …, "message": …}``; ``message`` is what ERROR would say."""
    PART_REPLY = 0x17
    """Empty: a PART other than the first was taken. The whole message is answered where its first part came."""


class Message(NamedTuple):
    """One message. ``type`` is a number that came from the wire and need not be a :class:`MessageType`."""

    type: int
    body: bytes | bytearray | memoryview
