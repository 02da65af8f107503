"""What ``hosting.clients`` exports, and how little it takes to import it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import hosting.clients

EXPORTS = [
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


def test_the_exported_names() -> None:
    assert hosting.clients.__all__ == EXPORTS == sorted(EXPORTS) == dir(hosting.clients)
    for name in EXPORTS:
        exported = getattr(hosting.clients, name)
        assert exported.__name__ == name and exported.__doc__


def test_a_name_that_is_none() -> None:
    with pytest.raises(AttributeError, match=r"^module 'hosting.clients' has no attribute 'nothing'$"):
        _ = hosting.clients.nothing


def imported_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(json.loads(done.stdout))


def test_nothing_is_imported_before_it_is_needed() -> None:
    assert not {"numpy", "msgpack", "websockets"} & imported_by("import hosting.clients")


def test_connecting_imports_neither_the_server_nor_other_transports() -> None:
    code = """
from hosting.clients import ConnectError, connect
try:
    connect("ws://127.0.0.1:1", connect_timeout_s=0.1)
except ConnectError as error:
    assert error.__cause__ is not None
"""
    modules = imported_by(code)
    assert "websockets.client" in modules
    unwanted = {"qh3", "simplejpeg", "PIL", "typer", "pydantic", "rich", "starlette", "fastapi", "uvicorn", "hosting.config", "torch", "jax"}
    assert not unwanted & modules
