"""Servers and links that do as they are told."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from websockets.sync.server import ServerConnection, serve

from hosting.clients.errors import ConnectionLostError
from hosting.protocol import msgpack_numpy
from hosting.protocol.messages import Message, MessageType

HELLO = msgpack_numpy.pack({"action_horizon": 2})
OURS = {"server_name": "tandem", "action_horizon": 2}


@contextmanager
def server(converse: Callable[[ServerConnection], None], *, context: ssl.SSLContext | None = None, **options: Any) -> Iterator[str]:
    """A WebSocket server on a free port, one thread per connection."""
    with serve(converse, "127.0.0.1", 0, compression=None, max_size=None, ssl=context, **options) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"{'ws' if context is None else 'wss'}://127.0.0.1:{running.socket.getsockname()[1]}"
        finally:
            running.shutdown()
            thread.join(30)


def echo(connection: ServerConnection) -> None:
    """Answers ``{"error": text}`` with that error and anything else with itself."""
    connection.send(HELLO)
    for message in connection:
        obs = msgpack_numpy.unpack(message)
        connection.send(obs.get("error", message))


def reply(value: Any, type: int = MessageType.REPLY) -> Message:
    """An answer with a msgpack body."""
    return Message(type, msgpack_numpy.pack(value))


def echoed(asked: Message) -> Message:
    """The reply that repeats its request, id included, as a whole reply does."""
    return reply({**msgpack_numpy.unpack(asked.body), "server_timing": {"infer_ms": 1.0}})


class StubLink:
    """A link that gives these answers in turn (a message, an exception to raise, or a function of what was asked), then repeats requests."""

    def __init__(self, *answers: Message | Exception | Callable[[Message], Message], metadata: Any = OURS) -> None:
        self.hello = Message(MessageType.METADATA_REPLY, msgpack_numpy.pack(metadata))
        self.asked: list[Message] = []
        self.timeouts_s: list[float | None] = []
        self.closed = False
        self._answers = list(answers)

    def exchange(self, type: int, body: Sequence[bytes | bytearray | memoryview], timeout_s: float | None) -> Message:
        asked = Message(type, b"".join(body))
        self.asked.append(asked)
        self.timeouts_s.append(timeout_s)
        answer = self._answers.pop(0) if self._answers else echoed
        if isinstance(answer, ConnectionLostError):
            self.closed = True
        if isinstance(answer, Exception):
            raise answer
        return answer(asked) if callable(answer) else answer

    def close(self) -> None:
        self.closed = True

    @property
    def maps(self) -> list[dict[str, Any]]:
        """What was asked, decoded."""
        return [msgpack_numpy.unpack(asked.body) if asked.body else {} for asked in self.asked]
