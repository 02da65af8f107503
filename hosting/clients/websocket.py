"""A small blocking client of openpi's WebSocket protocol."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from websockets.sync.client import ClientConnection, connect

from hosting.policy import Reply, TandemError
from hosting.protocol import msgpack_numpy


class InferenceError(TandemError):
    """The server refused or failed a request; the message is the server's. The connection is still good."""


class WebSocketClient:
    """One conversation with an openpi-compatible server.

    Args:
        url: ``ws://host:port`` or ``wss://…``, any path.
        api_key: sent as ``Authorization: Api-Key …``.
        connect_timeout_s: how long the TCP and WebSocket handshake may take.
        ready_timeout_s: how long the server may take to load before it greets; None waits for ever.
        timeout_s: how long one reply may take; None waits for ever.

    Raises:
        OSError: the server cannot be reached.
        TimeoutError: a time-out passed.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        connect_timeout_s: float = 10.0,
        ready_timeout_s: float | None = None,
        timeout_s: float | None = None,
    ) -> None:
        headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._timeout_s = timeout_s
        with contextlib.ExitStack() as stack:
            connecting = connect(url, additional_headers=headers, compression=None, max_size=None, open_timeout=connect_timeout_s)
            self._connection: ClientConnection = stack.enter_context(connecting)
            self._metadata: dict[str, Any] = msgpack_numpy.unpack(self._receive(ready_timeout_s))
            self._closing = stack.pop_all()

    def get_server_metadata(self) -> dict[str, Any]:
        """What the server said when it greeted."""
        return self._metadata

    def infer(self, obs: Mapping[str, Any]) -> Reply:
        """One observation → the server's reply.

        Raises:
            InferenceError: the server answered with an error.
            TimeoutError: no reply came within ``timeout_s``; the connection is then closed.
            websockets.ConnectionClosed: the connection is gone.
        """
        self._connection.send(msgpack_numpy.pack(dict(obs)))
        try:
            answer = self._receive(self._timeout_s)
        except InferenceError:
            raise
        except BaseException:
            # Whoever stopped waiting must not get the late reply as that to the next observation.
            self._connection.close_socket()
            raise
        reply: Reply = msgpack_numpy.unpack(answer)
        return reply

    def reset(self) -> None:
        """Nothing to reset: the protocol keeps no state between observations."""

    def close(self) -> None:
        """End the conversation."""
        self._closing.close()

    def __enter__(self) -> WebSocketClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _receive(self, timeout_s: float | None) -> bytes:
        message = self._connection.recv(timeout=timeout_s)
        if isinstance(message, str):
            raise InferenceError(message)
        return message
