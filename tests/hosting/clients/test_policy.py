"""openpi-client's class by another hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hosting.clients import ActionChunkBroker, WebsocketClientPolicy
from hosting.clients.client import Client
from tests.hosting.clients.scripted import StubLink
from tests.serving import service_config, start, stubs


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        ((), "ws://127.0.0.1"),
        (("0.0.0.0", 8000), "ws://127.0.0.1:8000"),
        (("robot", 8000), "ws://robot:8000"),
        (("robot:8000",), "ws://robot:8000"),
        (("wsomething", 8000), "ws://wsomething:8000"),
        (("ws://0.0.0.0:8000/path?profile=empty",), "ws://127.0.0.1:8000/path?profile=empty"),
        (("wss://robot", 443, "key"), "wss://robot:443"),
    ],
)
def test_where_it_connects(monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...], url: str) -> None:
    dialled: list[Any] = []
    monkeypatch.setattr("hosting.clients.client.dial", lambda url, options, *_: (dialled.append((url, options)), (url, StubLink()))[1])
    policy = WebsocketClientPolicy(*arguments)
    assert isinstance(policy, Client) and dialled[0][0] == url and dialled[0][1].api_key == (arguments[2] if len(arguments) > 2 else None)


def test_it_waits_for_ever_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(Client, "__init__", lambda self, url, **options: given.append(options))
    WebsocketClientPolicy()
    WebsocketClientPolicy("robot", wait_s=0.0, timeout_s=1.0)
    assert given == [{"api_key": None, "wait_s": math.inf}, {"api_key": None, "wait_s": 0.0, "timeout_s": 1.0}]


def test_a_robot_of_openpis(monkeypatch: pytest.MonkeyPatch) -> None:
    with start(service_config("action"), stubs()) as service:
        host, _, port = service.addresses["action"].removeprefix("ws://").partition(":")
        with WebsocketClientPolicy(host=host, port=int(port)) as policy:
            assert policy.get_server_metadata()["action_horizon"] == 10
            broker = ActionChunkBroker(policy, action_horizon=10)
            assert broker.infer({"prompt": "x"})["actions"].shape == (14,)
            broker.reset()
