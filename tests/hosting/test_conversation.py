"""A conversation with an endpoint: every message has one answer, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest

from hosting.conversation import Conversation
from hosting.endpoint import Endpoint
from hosting.policy import DrainingError, ObservationError, RequestError
from hosting.protocol import local_frame, msgpack_numpy
from hosting.protocol.connection import Connection
from hosting.protocol.messages import Message, MessageType
from hosting.protocol.profiles import Profile, choose_profile
from hosting.routing import action_route
from hosting.scheduler import SlotWorker
from tests.serving import EchoPolicy

TYPED = Profile("openpi", errors="map")


@pytest.fixture
def worker() -> Iterator[SlotWorker]:
    worker = SlotWorker("action")
    yield worker
    worker.close()


def opened(worker: SlotWorker, policy: Any = None) -> Endpoint:
    endpoint = Endpoint("action", {"action": worker})
    endpoint.open(action_route(policy or EchoPolicy()), {"action_horizon": 10})
    return endpoint


def infer(value: Any) -> Message:
    return Message(MessageType.INFER, msgpack_numpy.pack(value))


async def test_hello_waits_for_the_slot(worker: SlotWorker) -> None:
    endpoint = Endpoint("action", {"action": worker})
    conversation = Conversation(endpoint, Connection(TYPED))
    greeting = asyncio.create_task(conversation.answer(Message(MessageType.METADATA, b"")))
    await asyncio.sleep(0)
    assert not greeting.done()
    endpoint.open(action_route(EchoPolicy()), {"action_horizon": 10})
    answer = await greeting
    assert answer.type == MessageType.METADATA_REPLY
    assert msgpack_numpy.unpack(answer.body) == {**endpoint.metadata}
    assert await conversation.hello() == answer


async def test_there_is_no_hello_from_a_server_that_is_leaving(worker: SlotWorker) -> None:
    endpoint = opened(worker)
    endpoint.close()
    with pytest.raises(DrainingError):
        await Conversation(endpoint, Connection(TYPED)).hello()
    answer = await Conversation(endpoint, Connection(TYPED)).answer(Message(MessageType.METADATA, b""))
    assert answer == (MessageType.ERROR, b"the server is shutting down; the action endpoint takes no new requests")


async def test_a_profile_that_cannot_be_served_has_no_hello(worker: SlotWorker) -> None:
    with pytest.raises(RequestError, match=r"^profile roboarena: the server does not know"):
        await Conversation(opened(worker), Connection(choose_profile("/", "profile=roboarena"))).hello()


async def test_observations_of_both_encodings_and_resets_are_answered(worker: SlotWorker) -> None:
    conversation = Conversation(opened(worker), Connection(TYPED))
    reply = await conversation.answer(infer({"prompt": "a"}))
    conversation.sent()
    assert reply.type == MessageType.REPLY and msgpack_numpy.unpack(reply.body)["asked"] == {"prompt": "a"}
    frame = await conversation.answer(Message(MessageType.INFER_FRAME, local_frame.encode({"prompt": "b"}, "x")))
    decoded = local_frame.decode(frame.body).value
    assert decoded["asked"] == {"prompt": "b"} and decoded["server_timing"].keys() == {"infer_ms", "prev_total_ms"}
    assert await conversation.answer(Message(MessageType.RESET, b"")) == (MessageType.RESET_REPLY, b"")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ObservationError("state: is wrong"), "observation", "state: is wrong"),
        (ZeroDivisionError("secret"), "internal", "internal error "),
    ],
)
async def test_failures_are_answers_and_the_conversation_goes_on(worker: SlotWorker, error: Exception, code: str, text: str) -> None:
    def fail(obs: Any) -> None:
        if obs["prompt"] == "bad":
            raise error

    conversation = Conversation(opened(worker, EchoPolicy(fail)), Connection(TYPED))
    failed = await conversation.answer(infer({"prompt": "bad", "request_id": 5}))
    body = msgpack.unpackb(failed.body)
    assert failed.type == MessageType.FAILURE and body["code"] == code and body["message"].startswith(text) and body["request_id"] == 5
    assert "secret" not in body["message"]
    assert (await conversation.answer(infer({"prompt": "good"}))).type == MessageType.REPLY


@pytest.mark.parametrize("extra", [{"odd": {1, 2}}, {"odd": object()}, {"odd": np.array([object()])}, {"odd": 1 << 70}])
async def test_a_reply_that_cannot_be_sent_is_the_servers_failure(worker: SlotWorker, extra: dict[str, Any]) -> None:
    class Odd(EchoPolicy):
        def infer(self, obs: Any) -> dict[str, Any]:
            return {**super().infer(obs), **extra}

    conversation = Conversation(opened(worker, Odd()), Connection(TYPED))
    for message in (infer({"prompt": "x"}), Message(MessageType.INFER_FRAME, local_frame.encode({"prompt": "x"}))):
        answer = await conversation.answer(message)
        assert answer.type in (MessageType.FAILURE, MessageType.ERROR) and b"internal error" in bytes(answer.body)


async def test_several_answers_may_be_under_way(worker: SlotWorker) -> None:
    conversation = Conversation(opened(worker), Connection(TYPED))
    answers = await asyncio.gather(*(conversation.answer(infer({"prompt": str(i), "request_id": i, "session_id": i})) for i in range(20)))
    replies = [msgpack_numpy.unpack(answer.body) for answer in answers]
    assert [(reply["asked"]["prompt"], reply["request_id"]) for reply in replies] == [(str(i), i) for i in range(20)]
