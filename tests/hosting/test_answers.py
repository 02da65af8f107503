"""Requests of one connection side by side: their order, their limits, their end."""

from __future__ import annotations

import asyncio
import random
import weakref

import numpy as np
import pytest

from hosting.answers import MAX_UNFINISHED, MAX_UNSENT, Answers
from hosting.protocol.messages import Message, MessageType
from tests.hosting.gated import Gated, turns, until


class Connection:
    """What was sent, in order; ``jammed`` holds up whoever sends."""

    def __init__(self) -> None:
        self.conversation = Gated()
        self.sent: list[bytes] = []
        self.moves = 0
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.sending = 0
        self.tasks: list[asyncio.Task[None]] = []
        self.answers = Answers(self.conversation, self._send, self._moved)

    async def _send(self, answer: Message) -> None:
        self.sending += 1
        assert self.sending == 1, "one at a time"
        self.sent.append(bytes(answer.body))
        await self.flowing.wait()
        self.sending -= 1

    def _moved(self) -> None:
        self.moves += 1

    def ask(self, *bodies: bytes) -> None:
        for body in bodies:
            self.tasks.append(asyncio.create_task(self.answers.begin(Message(MessageType.INFER, body))))


@pytest.fixture
async def connection():
    return Connection()


async def test_answers_go_out_in_the_order_of_the_requests(connection):
    connection.ask(b"1", b"2", b"3")
    await turns()
    assert connection.conversation.asked == [b"1", b"2", b"3"], "all are under way at once"
    for body, sent in [(b"2", []), (b"3", []), (b"1", [b"1", b"2", b"3"])]:
        connection.conversation.let(body)
        await turns()
        assert connection.sent == sent
    assert connection.answers.unsent == 0 and connection.conversation.sent_count == 3


async def test_so_many_may_be_unfinished(connection):
    for number in range(MAX_UNFINISHED):
        assert connection.answers.room
        connection.ask(b"%d" % number)
    assert not connection.answers.room
    await turns()
    connection.conversation.let(b"1")
    await until(lambda: connection.moves)
    assert connection.answers.room and not connection.sent, "one that waits has given way; the first still runs"
    connection.ask(b"newest")
    assert not connection.answers.room


async def test_so_many_answers_may_wait_for_an_earlier_one(connection):
    connection.ask(b"slow")
    for number in range(MAX_UNSENT):
        assert connection.answers.room
        connection.ask(b"%d" % number)
        await turns()
        connection.conversation.let(b"%d" % number)
        await turns()
    assert not connection.answers.room and not connection.sent
    connection.conversation.let(b"slow")
    await turns(200)
    assert connection.sent == [b"slow", *(b"%d" % number for number in range(MAX_UNSENT))]
    assert connection.answers.room and not connection.answers.unsent


async def test_a_client_that_does_not_read_is_asked_nothing_more(connection):
    connection.flowing.clear()
    connection.ask(b"1", b"2")
    await turns()
    connection.conversation.let(b"1")
    await turns()
    assert connection.sent == [b"1"] and not connection.answers.room
    connection.conversation.let(b"2")
    await turns()
    assert connection.sent == [b"1"] and not connection.answers.room and connection.answers.unsent == 2
    connection.flowing.set()
    await turns()
    assert connection.sent == [b"1", b"2"] and connection.answers.room


async def test_an_observation_is_kept_no_longer_than_until_it_is_answered(connection):
    body = np.zeros(1000, np.uint8)
    seen = weakref.ref(body)
    connection.ask(b"slow")
    answering = asyncio.create_task(connection.answers.begin(Message(MessageType.INFER, body.data)))
    asked = bytes(body)
    del body
    await turns()
    connection.conversation.let(asked, Message(MessageType.REPLY, b"done"))
    await turns()
    assert not connection.sent and seen() is None
    connection.conversation.let(b"slow")
    await answering
    await turns()
    assert connection.sent == [b"slow", b"done"]


async def test_what_is_cancelled_is_not_begun_and_not_sent(connection):
    connection.ask(b"1", b"2")
    await turns()
    connection.ask(b"not begun")
    connection.conversation.let(b"2")
    for task in connection.tasks:
        task.cancel()
    await turns()
    assert connection.conversation.asked == [b"1", b"2"] and b"1" in connection.conversation.cancelled
    assert not connection.sent


async def test_a_connection_that_breaks_as_an_answer_is_sent_is_sent_no_other():
    conversation = Gated()
    sent = []

    async def send(answer: Message) -> None:
        sent.append(bytes(answer.body))
        raise ConnectionResetError

    answers = Answers(conversation, send, lambda: None)
    first, second, third = (asyncio.create_task(answers.begin(Message(MessageType.INFER, b"%d" % number))) for number in range(3))
    await turns()
    conversation.let(b"1")
    await second
    conversation.let(b"0")
    with pytest.raises(ConnectionResetError):
        await first
    conversation.let(b"2")
    await third
    assert sent == [b"0"]


async def test_a_conversation_that_raises_is_an_error_for_that_request_alone(connection, caplog):
    connection.ask(b"1", b"2")
    await turns()
    connection.conversation.let(b"1", RuntimeError("what never happens"))
    connection.conversation.let(b"2")
    await turns()
    assert connection.sent == [b"internal error; the server's log has it", b"2"]
    (record,) = caplog.records
    assert record.exc_info is not None and record.exc_info[0] is RuntimeError


@pytest.mark.parametrize("seed", range(20))
async def test_any_depth_and_any_order_of_completion(connection, seed):
    """Requests are asked whenever there is room, answered in any order, read now and then: each is answered once, in order, within the limits."""
    chance = random.Random(seed)
    asked = finished = 0
    while finished < 500:
        match chance.randrange(5):
            case 0 | 1:
                for _ in range(chance.randrange(1, 6)):
                    if connection.answers.room:
                        connection.ask(b"%d" % asked)
                        asked += 1
            case 2 | 3 if connection.conversation.held:
                connection.conversation.let(chance.choice(connection.conversation.held))
                finished += 1
            case _:
                (connection.flowing.set if chance.random() < 0.7 else connection.flowing.clear)()
        await turns(chance.randrange(4) + 1)
        assert len(connection.conversation.held) <= MAX_UNFINISHED
        assert connection.answers.unsent <= MAX_UNFINISHED + MAX_UNSENT
        assert connection.sent == [b"%d" % number for number in range(len(connection.sent))]
    connection.flowing.set()
    while connection.conversation.held:
        connection.conversation.let(connection.conversation.held[-1])
        await turns()
    await turns(100)
    assert len(connection.sent) == asked and connection.answers.unsent == 0
