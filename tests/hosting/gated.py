"""A conversation that answers when the test says so, and in what order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hosting.protocol.messages import Message, MessageType

SECONDS = 20  # no test waits longer for what must come


async def until(condition: Callable[[], object]) -> None:
    """Returns as soon as it holds; the test fails where it never does."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0)


async def turns(count: int = 10) -> None:
    """What is ready to happen happens."""
    for _ in range(count):
        await asyncio.sleep(0)


class Gated:
    """Answers each message with its body, once :meth:`let` has been called with it; all of them at once while ``open`` is set."""

    def __init__(self, *, open: bool = False) -> None:
        self.asked: list[bytes] = []
        self.cancelled: list[bytes] = []
        self.sent_count = self.closed_count = 0
        self.open = open
        self._gates: dict[bytes, asyncio.Future[Message]] = {}

    @property
    def held(self) -> list[bytes]:
        """Bodies of the messages that wait for :meth:`let`, in the order they came."""
        return [body for body in self.asked if body in self._gates]

    def let(self, body: bytes, outcome: Message | Exception | None = None) -> None:
        """Have the message answered: with ``outcome``, else with its body."""
        gate = self._gates[body]
        if isinstance(outcome, Exception):
            gate.set_exception(outcome)
        else:
            gate.set_result(outcome or Message(MessageType.REPLY, body))

    async def hello(self) -> Message:
        return Message(MessageType.METADATA_REPLY, b"\x80")

    async def answer(self, message: Message) -> Message:
        body = bytes(message.body)
        del message
        self.asked.append(body)
        if self.open:
            return Message(MessageType.REPLY, body)
        self._gates[body] = asyncio.get_running_loop().create_future()
        try:
            return await self._gates[body]
        except asyncio.CancelledError:
            self.cancelled.append(body)
            raise
        finally:
            del self._gates[body]

    def sent(self) -> None:
        self.sent_count += 1

    def close(self) -> None:
        self.closed_count += 1
