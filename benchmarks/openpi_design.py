"""The peer of the benchmarks: openpi's server design and client, built here from its description (reference/wire.md §1, §2).

An asyncio ``websockets`` server that unpacks with msgpack's own decoder, calls the policy inline in its event loop and packs; and a
blocking ``websockets`` client, compression off. What openpi does with defaults of ``websockets`` is left at its defaults.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import ssl
import time
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect


def pack(value: Any) -> bytes:
    """openpi's dialect, arrays as copies of their bytes."""
    packed: bytes = msgpack.packb(value, default=_encode)
    return packed


def unpack(message: bytes) -> Any:
    """The value of a message."""
    return msgpack.unpackb(message, object_hook=_decode)


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"cannot send a {type(value).__name__}")


def _decode(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        return np.ndarray(buffer=value[b"data"], dtype=np.dtype(value[b"dtype"]), shape=value[b"shape"])
    if b"__npgeneric__" in value:
        return np.dtype(value[b"dtype"]).type(value[b"data"])
    return value


def serve_inline(policy: Any, announce: Callable[[str], None], *, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> None:
    """Serve ``policy`` until the process is ended; ``announce`` gets the URL."""

    async def handler(websocket: Any) -> None:
        await websocket.send(pack({}))
        prev_total_s = None
        while True:
            started_s = time.monotonic()
            try:
                message = await websocket.recv()
            except ConnectionClosed:
                return
            obs = unpack(message)
            infer_s = time.monotonic()
            reply = policy.infer(obs)
            reply = {**reply, "server_timing": {"infer_ms": (time.monotonic() - infer_s) * 1e3}}
            if prev_total_s is not None:
                reply["server_timing"]["prev_total_ms"] = prev_total_s * 1e3
            await websocket.send(pack(reply))
            prev_total_s = time.monotonic() - started_s

    def health(connection: Any, request: Any) -> Any:
        return connection.respond(http.HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None

    async def main() -> None:
        async with serve(handler, host, port, compression=None, max_size=None, process_request=health, ssl=tls) as server:
            announce(f"{'wss' if tls else 'ws'}://{host}:{server.sockets[0].getsockname()[1]}")
            await server.serve_forever()

    asyncio.run(main())


class StockClient:
    """openpi-client's way of talking: sync ``websockets``, one request at a time."""

    def __init__(self, url: str, *, tls: ssl.SSLContext | None = None) -> None:
        self._closing = contextlib.ExitStack()
        self._connection = self._closing.enter_context(connect(url, compression=None, max_size=None, ssl=tls))
        self.metadata = unpack(self._receive())

    def infer(self, obs: Any) -> Any:
        self._connection.send(pack(obs))
        return unpack(self._receive())

    def close(self) -> None:
        self._closing.close()

    def _receive(self) -> bytes:
        message = self._connection.recv()
        if isinstance(message, str):
            raise RuntimeError(f"Error in inference server:\n{message}")
        return message
