"""``tandem test``: what is timed, and the one line that says why it cannot be."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from websockets.sync.server import ServerConnection

from action.embodiments import Aloha
from hosting.clients.errors import InferenceError
from hosting.clients.measure import TestError, measure, render
from tests.hosting.clients.scripted import HELLO, server
from tests.serving import EchoPolicy, RunningService, service_config, start, stubs


class AlohaEcho(EchoPolicy):
    """Asks for ALOHA's cameras, remembers what it was sent."""

    def __init__(self) -> None:
        self.seen: list[Mapping[str, Any]] = []
        super().__init__(self.seen.append)
        self.metadata = {**self.metadata, "image_specs": [spec.as_metadata() for spec in Aloha().image_specs]}


@pytest.fixture(scope="module")
def policy() -> AlohaEcho:
    return AlohaEcho()


@pytest.fixture(scope="module")
def service(policy: AlohaEcho) -> Any:
    with start(service_config(), stubs(policy)) as running:
        yield running


def run(url: str, **arguments: Any) -> dict[str, Any]:
    return measure(url, **{"mode": None, "embodiment": None, "prompt": "tidy", "iterations": 2, **arguments})


def test_one_call_to_warm_up_and_then_the_timed_ones(service: RunningService, policy: AlohaEcho) -> None:
    policy.seen.clear()
    report = run(service.addresses["action"], iterations=3)
    assert len(policy.seen) == 4
    first, second = (obs["images"]["cam_high"] for obs in policy.seen[:2])
    assert (first != second).any(), "fresh images each time"
    assert report["embodiment"] == "aloha" and report["mode"] == "default" and report["metadata"]["slot"] == "action"
    assert report["reply"]["actions"] == "float64 [10, 14]" and report["reply"]["subtask"]["text"] == "first step of tidy"
    assert list(report["ms"]) == ["client", "network", "server", "overhead", "policy", "planner"]
    for ms in report["ms"].values():
        assert ms["min"] <= ms["mean"] <= ms["max"]
    means = {name: ms["mean"] for name, ms in report["ms"].items()}
    assert means["client"] == pytest.approx(means["network"] + means["server"])
    assert means["server"] == pytest.approx(means["overhead"] + means["policy"] + means["planner"])
    assert report["ms"]["policy"] == {"mean": 1.0, "min": 1.0, "max": 1.0}
    assert report["ms"]["client"]["min"] >= report["ms"]["server"]["min"]


def test_times_that_the_server_does_not_report_are_absent(service: RunningService) -> None:
    assert list(run(service.addresses["planner"])["ms"]) == ["client", "network", "server", "overhead", "planner"]
    assert list(run(service.addresses["action"], mode="action_only")["ms"]) == ["client", "network", "server", "overhead", "policy"]


def test_the_mode_and_the_embodiment_are_sent(service: RunningService, policy: AlohaEcho) -> None:
    policy.seen.clear()
    report = run(service.addresses["action"], mode="action_only", embodiment="libero", prompt="stack")
    assert report["mode"] == "action_only" and report["embodiment"] == "libero"
    assert "observation/state" in policy.seen[0] and policy.seen[0]["prompt"] == "stack"


def test_for_people(service: RunningService) -> None:
    lines = render(run(service.addresses["action"])).splitlines()
    assert lines[0] == f"{service.addresses['action']}  mode default, aloha observations"
    assert lines[1:4] == ["subtask: 'first step of tidy'", "actions: float64 [10, 14]", f"{'ms':9}{'mean':>10}{'min':>10}{'max':>10}"]
    assert [line.split()[0] for line in lines[4:]] == ["client", "network", "server", "overhead", "policy", "planner"]
    assert lines[8] == f"{'policy':9}{1.0:10.2f}{1.0:10.2f}{1.0:10.2f}"


def test_a_reply_without_actions_because_nothing_is_left_to_do_says_so() -> None:
    report = {"url": "ws://h", "mode": "default", "embodiment": "table", "reply": {"subtask": {"text": "all done", "done": True}}, "ms": {}}
    assert render(report).splitlines()[1] == "subtask: 'all done' (done: nothing left to do, so no actions)"


def test_a_server_whose_cameras_are_unknown() -> None:
    with start(service_config("action"), stubs()) as running:
        url = running.addresses["action"]
        with pytest.raises(TestError) as error:
            run(url)
        known = "aloha|droid|libero|table"
        assert str(error.value) == f"the server at {url} names no known cameras; say which observation to send with --embodiment {known}"
        assert run(url, embodiment="droid")["embodiment"] == "droid"


def test_a_server_that_refuses_the_observation(service: RunningService) -> None:
    with pytest.raises(InferenceError, match=r"^mode: action_only is not served on this endpoint, which has no action policy$"):
        run(service.addresses["planner"], mode="action_only")


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"ws://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(TestError) as error:
        run(url)
    assert str(error.value) == (f"cannot connect to {url}: [Errno 111] Connection refused; is the server running, and is this its WebSocket port?")


@pytest.mark.parametrize("url", ["localhost:8000", "http://localhost:8000", "ws://"])
def test_no_address(url: str) -> None:
    expected = rf"^cannot connect to {url}: it isn't an address of a policy server; expected ws://"
    with pytest.raises(TestError, match=expected):
        run(url)


def test_the_admin_port_is_none_either(service: RunningService) -> None:
    url = service.addresses["admin"].replace("http://", "ws://")
    with pytest.raises(TestError, match=rf"^cannot connect to {url}: the server answered HTTP 40\d, not as a WebSocket; is the server running, "):
        run(url)


def test_a_server_that_goes_away_during_a_call() -> None:
    def converse(connection: ServerConnection) -> None:
        connection.send(HELLO)
        connection.recv()

    with server(converse) as url, pytest.raises(TestError) as error:
        run(url, embodiment="aloha")
    assert str(error.value).startswith(f"call 1: the connection to {url} broke: ") and str(error.value).endswith("; see the server's log")
    assert "\n" not in str(error.value)


def test_a_reply_with_a_plain_value_is_shown_as_it_is() -> None:
    report = {"url": "ws://h", "mode": "default", "embodiment": "aloha", "reply": {"n": 1}, "ms": {"client": {"mean": 2.0, "min": 1.0, "max": 3.0}}}
    assert render(report).splitlines()[1:] == [f"{'ms':9}{'mean':>10}{'min':>10}{'max':>10}", f"client   {2.0:10.2f}{1.0:10.2f}{3.0:10.2f}"]
    assert np.isfinite(report["ms"]["client"]["mean"])  # type: ignore[index]


def test_an_option_without_meaning_and_a_server_that_is_not_trusted_are_told_plainly() -> None:
    with pytest.raises(TestError, match=r"^pin: 'ab' is no SHA-256 fingerprint"):
        run("quic://127.0.0.1:1", pin="ab")
    with start(service_config("action", api_key="sesame"), stubs()) as service, pytest.raises(TestError, match=r"give the server's api_key$"):
        run(service.addresses["action"])
