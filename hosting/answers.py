"""A connection's requests under way, answered side by side; the answers go out in the order of the requests.

For transports whose messages have no numbers. A connection that reads on while it answers can offer a newer observation before an older one's
turn has come, and sees at once that its client has left. What one client can make a server hold is bounded all the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

from hosting.protocol.messages import Message, MessageType

logger = logging.getLogger(__name__)

MAX_UNFINISHED: Final = 3
"""Requests of one connection that may be under way: one that runs, one that waits, and the one that takes its place."""

MAX_UNSENT: Final = 64
"""Answers of one connection that may wait for an earlier one: most are a line that says "superseded"."""


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
        send: hands an answer to the network and returns when another may follow; called for one at a time. Must not raise.
        moved: called when an answer was made or sent: there may be :attr:`room` again, or nothing left to do.
    """

    def __init__(self, conversation: Answering, send: Callable[[Message], Awaitable[None]], moved: Callable[[], None]) -> None:
        self._conversation = conversation
        self._send = send
        self._moved = moved
        self._places: deque[_Place] = deque()
        self._unfinished = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancelled = False

    @property
    def unsent(self) -> int:
        """How many requests have no answer in the network's hands yet, that which is being sent included."""
        return len(self._places)

    @property
    def room(self) -> bool:
        """Whether another request may be asked: not too many are under way, nor held up by one that is, nor by a client that does not read."""
        if not self._places or self._cancelled:
            return True
        held_up = len(self._places) - self._unfinished
        return self._unfinished < MAX_UNFINISHED and held_up < MAX_UNSENT and self._places[0].answer is None

    def ask(self, message: Message) -> None:
        """Begin to answer ``message``; ignored after :meth:`cancel`."""
        if self._cancelled:
            return
        place = _Place()
        self._places.append(place)
        self._unfinished += 1
        self._tasks.add(asyncio.create_task(self._answer(place, message)))

    def cancel(self) -> None:
        """Nobody waits for the answers any more: give up all that is under way."""
        self._cancelled = True
        for task in self._tasks:
            task.cancel()

    async def _answer(self, place: _Place, message: Message) -> None:
        try:
            place.answer = await answer_of(self._conversation, message)
            del message  # an observation is not kept until a slow client has read its answer
            self._unfinished -= 1
            if place is self._places[0]:
                await self._send_all()
            self._moved()
        finally:
            self._tasks.remove(asyncio.current_task())  # type: ignore[arg-type]

    async def _send_all(self) -> None:
        """Send the first answer, and the later ones that only waited for it."""
        while self._places and not self._cancelled and (answer := self._places[0].answer) is not None:
            await self._send(answer)
            self._places.popleft()
            self._conversation.sent()
