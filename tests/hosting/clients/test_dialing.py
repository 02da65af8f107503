"""Addresses, what each opens, and the order of ``auto://``."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from hosting.clients.dialing import DialOptions, dial, ways_to
from hosting.clients.errors import AuthenticationError, ConnectError
from tests.hosting.clients.scripted import StubLink


class Opened:
    """Stands in for the three links' modules: what was opened, and what fails."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.failing: dict[str, Exception] = {}

    def link(self, kind: str) -> Any:
        def make(*arguments: Any, **options: Any) -> StubLink:
            name = kind if kind != "websocket" else arguments[0].partition(":")[0]
            self.calls.append((name, arguments, options))
            if name in self.failing:
                raise self.failing[name]
            return StubLink()

        return make

    @property
    def tried(self) -> list[str]:
        return [name for name, _, _ in self.calls]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    opened = Opened()
    for module, name, kind in (("quic", "QuicLink", "quic"), ("websocket", "WebSocketLink", "websocket"), ("unix_socket", "UnixLink", "unix")):
        monkeypatch.setitem(sys.modules, f"hosting.clients.{module}", SimpleNamespace(**{name: opened.link(kind)}))
    return opened


def options(**fields: Any) -> DialOptions:
    return DialOptions(**fields)


def test_websocket(opened: Opened) -> None:
    url, _ = dial("wss://robot:1/p?q=1", options(api_key="k", pin="p", cafile="c", verify=False, server_name="s", congestion_control=None), 3.0, 4.0)
    assert url == "wss://robot:1/p?q=1"
    assert opened.calls == [
        (
            "wss",
            ("wss://robot:1/p?q=1",),
            {
                "api_key": "k",
                "pin": "p",
                "cafile": "c",
                "verify": False,
                "server_name": "s",
                "congestion_control": None,
                "connect_timeout_s": 3.0,
                "ready_timeout_s": 4.0,
            },
        )
    ]


def test_unix_socket(opened: Opened) -> None:
    dial("unix:///tmp/a%20b.sock", options(), 3.0, None)
    assert opened.calls == [("unix", ("/tmp/a b.sock",), {"connect_timeout_s": 3.0, "ready_timeout_s": None})]


@pytest.mark.parametrize(
    ("url", "where"),
    [("quic://robot", ("robot", 5555)), ("quic://robot:1", ("robot", 1)), ("quic://[::1]:2", ("::1", 2)), ("quic://10.0.0.1/", ("10.0.0.1", 5555))],
)
def test_quic(opened: Opened, url: str, where: tuple[str, int]) -> None:
    dial(url, options(api_key="k", pin="p", connections=8), 3.0, 4.0)
    (name, arguments, given), *_ = opened.calls
    assert (name, arguments) == ("quic", where)
    assert given == {
        "api_key": "k",
        "pin": "p",
        "cafile": None,
        "verify": True,
        "server_name": None,
        "connections": 8,
        "connect_timeout_s": 3.0,
        "ready_timeout_s": 4.0,
    }


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "http://robot",
        "robot",
        "",
        "ws://",
        "quic://",
        "unix://tmp/x",
        "unix:",
        "auto://",
        "ws://robot:0",
        "ws://robot:99999",
        "ws://[::1",
    ],
)
def test_no_address(opened: Opened, url: str) -> None:
    with pytest.raises(ConnectError) as error:
        dial(url, options(), 1.0, None)
    text = str(error.value)
    assert text.startswith(f"cannot connect to {url}: ") and text.endswith(
        "expected ws://host:port, wss://host:port, quic://host[:5555], unix:///path or auto://host[:8000]"
    )
    assert not opened.calls and "\n" not in text


class TestAuto:
    def test_quic_first_and_not_for_long(self, opened: Opened) -> None:
        url, _ = dial("auto://robot", options(), 10.0, 60.0, remembered={})
        assert url == "quic://robot:5555" and opened.tried == ["quic"]
        assert opened.calls[0][2]["connect_timeout_s"] == 1.5 and opened.calls[0][2]["ready_timeout_s"] == 60.0

    def test_then_wss_then_ws(self, opened: Opened) -> None:
        opened.failing = {"quic": ConnectError("no UDP"), "wss": ConnectError("no TLS")}
        url, _ = dial("auto://robot:8002/path", options(), 10.0, None, remembered={})
        assert url == "ws://robot:8002/path" and opened.tried == ["quic", "wss", "ws"]
        assert opened.calls[0][1] == ("robot", 5556), "the planner's QUIC port belongs to the planner's WebSocket port"
        assert opened.calls[1][2]["connect_timeout_s"] == 10.0

    def test_everything_fails(self, opened: Opened) -> None:
        opened.failing = {"quic": ConnectError("no UDP"), "wss": ConnectError("no TLS"), "ws": ConnectError("no TCP")}
        with pytest.raises(ConnectError, match=r"^cannot connect to auto://robot: no UDP; no TLS; no TCP$") as error:
            dial("auto://robot", options(), 10.0, None, remembered={})
        assert error.value.__cause__ is opened.failing["ws"], "who waits for a server looks for a refused connection there"

    def test_the_choice_is_remembered_until_it_fails(self, opened: Opened) -> None:
        remembered: dict[str, str] = {}
        opened.failing = {"quic": ConnectError("no UDP")}
        for _ in range(2):
            dial("auto://robot", options(), 10.0, None, remembered=remembered)
        assert opened.tried == ["quic", "wss", "wss"]
        dial("auto://other", options(), 10.0, None, remembered=remembered)
        assert opened.tried[3:] == ["quic", "wss"], "another host knows nothing of it"
        opened.calls.clear()
        opened.failing = {"wss": ConnectError("gone")}
        dial("auto://robot", options(), 10.0, None, remembered=remembered)
        dial("auto://robot", options(), 10.0, None, remembered=remembered)
        assert opened.tried == ["wss", "quic", "quic"]

    @pytest.mark.parametrize(("given", "schemes"), [({}, 3), ({"api_key": "k"}, 2), ({"pin": "p"}, 2), ({"cafile": "c"}, 2)])
    @pytest.mark.parametrize(("host", "is_local"), [("robot", False), ("10.0.0.1", False), ("127.0.0.1", True), ("localhost", True), ("[::1]", True)])
    def test_nothing_secret_goes_over_plain_tcp(self, given: dict[str, str], schemes: int, host: str, is_local: bool) -> None:
        ways = ways_to(f"auto://{host}", options(**given))
        assert [way.url.partition(":")[0] for way in ways] == ["quic", "wss", "ws"][: 3 if is_local else schemes]
        assert ways[0].url == f"quic://{host}:5555" and ways[1].url == f"wss://{host}:8000"

    @pytest.mark.parametrize("given", [{"pin": "p"}, {"cafile": "c"}])
    def test_the_wrong_server_ends_the_search(self, opened: Opened, given: dict[str, str]) -> None:
        opened.failing = {"quic": AuthenticationError("has another certificate")}
        with pytest.raises(AuthenticationError, match="another certificate"):
            dial("auto://localhost", options(**given), 10.0, None, remembered={})
        assert opened.tried == ["quic"]

    def test_so_does_a_wrong_key(self, opened: Opened) -> None:
        opened.failing = {"quic": AuthenticationError("unauthorized: this is not the API key")}
        with pytest.raises(AuthenticationError):
            dial("auto://localhost", options(api_key="k"), 10.0, None, remembered={})
        assert opened.tried == ["quic"]

    def test_an_unknown_certificate_is_passed_by_with_a_warning(self, opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
        opened.failing = {"quic": AuthenticationError("unknown certificate; pin it")}
        with caplog.at_level(logging.WARNING):
            assert dial("auto://robot", options(), 10.0, None, remembered={})[0] == "wss://robot:8000"
        assert [record.getMessage() for record in caplog.records] == ["not by quic://robot:5555: unknown certificate; pin it"]

    def test_other_ports_need_both(self, opened: Opened) -> None:
        with pytest.raises(
            ConnectError, match=r"^cannot connect to auto://robot:9000: the QUIC port .* is not known; say auto://robot:9000\?quic=PORT$"
        ):
            dial("auto://robot:9000", options(), 10.0, None, remembered={})
        assert dial("auto://robot:9000?quic=9001", options(), 10.0, None, remembered={})[0] == "quic://robot:9001"
        assert opened.calls[0][1] == ("robot", 9001)


def test_the_key_is_in_no_repr() -> None:
    assert "sesame" not in repr(options(api_key="sesame"))
