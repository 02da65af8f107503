"""openpi-flash's class name over our QUIC."""

from __future__ import annotations

from typing import Any

import pytest

from hosting.flash_transport_policy import FlashTransportPolicy
from tests.hosting.clients.scripted import StubLink

PIN = "ab" * 32


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        (("robot",), "quic://robot:5555"),
        (("robot", 5556), "quic://robot:5556"),
        (("0.0.0.0",), "quic://127.0.0.1:5555"),
        (("::1", 1), "quic://[::1]:1"),
    ],
)
def test_where_it_connects(monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...], url: str) -> None:
    dialled: list[Any] = []
    link = StubLink(metadata={})
    monkeypatch.setattr("hosting.clients.client.dial", lambda url, options, *_: (dialled.append((url, options)), (url, link))[1])
    with FlashTransportPolicy(*arguments, pin=PIN, connections=8, timeout_s=1.0) as policy:
        assert policy.infer({"n": 1})["n"] == 1
        policy.reset()
        assert policy.get_server_metadata() == {}
    assert dialled[0][0] == url and (dialled[0][1].pin, dialled[0][1].connections) == (PIN, 8)
    assert link.closed
