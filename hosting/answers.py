"""A connection's requests under way, answered side by side; the answers go out in the order of the requests.

For transports whose messages have no numbers. A connection that reads on while it answers can offer a newer observation before an older one's
turn has come, and sees at once that its client has left. What one client can make a server hold is bounded all the same.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, Protocol

from hosting.protocol.messages import Message, MessageType

logger = logging.getLogger(__name__)

MAX_UNFINISHED: Final = 3
"""Requests of one connection that may be under way: one that runs, one that waits, and the one that takes its place."""

MAX_UNSENT: Final = 8
"""Answers of one connection that may wait for an earlier one: most are a line that says "superseded".

It bounds what clients that send as fast as they can cost the others: with 64, four of them made the 99th percentile of healthy ones 1.8 times what it
is without them, with 8 it is 1.2 times.
"""


class Answering(Protocol):
    """One client's conversation (:class:`hosting.conversation.Conversation`)."""

    async def answer(self, message: Message) -> Message:
        """Never raises; may be called again while an answer is under way."""
        ...

    def sent(self) -> None:
        """The last answer has been handed to the network."""
        ...

    def close(self) -> None:
        """The connection has ended; called once."""
        ...


async def answer_of(conversation: Answering, message: Message) -> Message:
    """The conversation's answer; an error where, against its word, it raises."""
    try:
        return await conversation.answer(message)
    except Exception:
        logger.exception("a conversation raised instead of answering")
        return Message(MessageType.ERROR, b"internal error; the server's log has it")


@dataclass(slots=True, eq=False)
class _Place:
    """One request's place in the order of answers; its answer, once there is one."""

    answer: Message | None = None


class Answers:
    """The requests of one connection that are not answered yet.

    Args:
        conversation: what answers.
        send: hands an answer to the network and returns when another may follow; called for one at a time, and no more once it has raised.
        moved: called when an answer was made or sent: there may be :attr:`room` again, or nothing left to do.
    """

    def __init__(self, conversation: Answering, send: Callable[[Message], Awaitable[None]], moved: Callable[[], None]) -> None:
        self._conversation = conversation
        self._send = send
        self._moved = moved
        self._places: deque[_Place] = deque()
        self._unfinished = 0

    @property
    def unsent(self) -> int:
        """How many requests have no answer in the network's hands yet, that which is being sent included."""
        return len(self._places)

    @property
    def room(self) -> bool:
        """Whether another request may begin: not too many are under way, nor held up by one that is, nor by a client that does not read."""
        if not self._places:
            return True
        held_up = len(self._places) - self._unfinished
        return self._unfinished < MAX_UNFINISHED and held_up < MAX_UNSENT and self._places[0].answer is None

    def begin(self, message: Message) -> Coroutine[Any, Any, None]:
        """Give ``message`` the next place in the order of answers.

        What is returned answers it, and raises what ``send`` raises; cancel it when nobody waits for the answers any more.
        """
        place = _Place()
        self._places.append(place)
        self._unfinished += 1
        return self._answer(place, message)

    async def _answer(self, place: _Place, message: Message) -> None:
        place.answer = await answer_of(self._conversation, message)
        del message  # an observation is not kept until a slow client has read its answer
        self._unfinished -= 1
        if place is self._places[0]:
            # Later ones may have waited for this one.
            while self._places and (answer := self._places[0].answer) is not None:
                await self._send(answer)
                self._places.popleft()
                self._conversation.sent()
        self._moved()
