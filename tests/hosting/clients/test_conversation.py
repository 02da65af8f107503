"""What the greeting says of a server; answers are tested through the client."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hosting.clients.conversation import Conversation, Request
from hosting.clients.errors import ConnectError, ConnectionLostError, InferenceError
from hosting.protocol.messages import Message, MessageType
from tests.hosting.clients.scripted import OURS, StubLink, reply


@pytest.mark.parametrize(
    ("metadata", "is_ours", "takes_resets"),
    [(OURS, True, True), ({}, False, False), ({"needs_session_id": False}, False, True), ({"server_name": "other"}, False, False)],
)
def test_whom_one_talks_to(metadata: dict[str, Any], is_ours: bool, takes_resets: bool) -> None:
    conversation = Conversation("ws://robot", StubLink(metadata=metadata))
    assert (conversation.is_ours, conversation.takes_resets, conversation.metadata) == (is_ours, takes_resets, metadata)


@pytest.mark.parametrize("body", [b"\xc1", b"", reply([1]).body])
def test_no_greeting(body: bytes) -> None:
    link = StubLink()
    link.hello = Message(MessageType.METADATA_REPLY, body)
    with pytest.raises(ConnectError, match=r"^ws://robot does not greet as a policy server: "):
        Conversation("ws://robot", link)
    assert link.closed


def test_a_metadata_key_called_type_is_no_error() -> None:
    assert Conversation("ws://robot", StubLink(metadata={"type": "error"})).metadata == {"type": "error"}


def test_a_failure_of_a_batch_names_all_its_requests() -> None:
    failure = reply({"type": "error", "code": "observation", "message": "batch[1]: no", "request_id": ["a", "b"]}, MessageType.FAILURE)
    conversation = Conversation("ws://robot", StubLink(failure))
    with pytest.raises(InferenceError, match=r"^batch\[1\]: no$"):
        conversation.exchange(Request(MessageType.INFER, [b""], ["a", "b"]), None)


def test_a_body_may_be_any_buffer() -> None:
    packed = reply({"actions": np.ones((2, 3))}).body
    for body in (packed, bytearray(packed), memoryview(packed)):
        conversation = Conversation("ws://robot", StubLink(Message(MessageType.REPLY, body), metadata={}))
        assert conversation.exchange(Request(MessageType.INFER, [b""]), None)["actions"].shape == (2, 3)


def test_a_server_that_is_leaving_is_a_lost_connection() -> None:
    """As on the transports where it closes instead of answering: nothing was computed, and the next server will."""
    link = StubLink(reply({"type": "error", "code": "draining", "message": "the server is shutting down"}, MessageType.FAILURE))
    with pytest.raises(ConnectionLostError, match=r"^ws://robot: the server is shutting down$"):
        Conversation("ws://robot", link).exchange(Request(MessageType.INFER, [b""]), None)
    assert link.closed
