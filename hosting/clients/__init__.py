"""The transports seen from the robot. Needs the base install only; what a name needs is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hosting.clients.aio import AsyncClient, connect_async
    from hosting.clients.broker import ActionChunkBroker
    from hosting.clients.client import Client, connect
    from hosting.clients.errors import (
        AuthenticationError,
        ClientError,
        ConnectError,
        ConnectionLostError,
        CrossedReplyError,
        InferenceError,
        ReplyTimeoutError,
        TaskDoneError,
    )
    from hosting.clients.policy import WebsocketClientPolicy
    from hosting.clients.retry import Reconnect

__all__ = [
    "ActionChunkBroker",
    "AsyncClient",
    "AuthenticationError",
    "Client",
    "ClientError",
    "ConnectError",
    "ConnectionLostError",
    "CrossedReplyError",
    "InferenceError",
    "Reconnect",
    "ReplyTimeoutError",
    "TaskDoneError",
    "WebsocketClientPolicy",
    "connect",
    "connect_async",
]

_HOMES = {
    "ActionChunkBroker": "broker",
    "AsyncClient": "aio",
    "Client": "client",
    "Reconnect": "retry",
    "WebsocketClientPolicy": "policy",
    "connect": "client",
    "connect_async": "aio",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return __all__
