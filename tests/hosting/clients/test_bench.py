"""``tandem bench``: targets take turns, every client its own process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from action.embodiments import Aloha
from hosting.clients.bench import Load, bench, render
from hosting.clients.measure import TestError
from hosting.config import ActionTransportConfig
from hosting.policy import ObservationError
from tests.serving import EchoPolicy, RunningService, service_config, start, stubs


class Picky(EchoPolicy):
    def __init__(self) -> None:
        self.prompts: list[str] = []
        super().__init__(self._look)
        self.metadata = {**self.metadata, "image_specs": [spec.as_metadata() for spec in Aloha().image_specs]}

    def _look(self, obs: Mapping[str, Any]) -> None:
        self.prompts.append(obs["prompt"])
        if obs["prompt"] == "refuse me":
            raise ObservationError("prompt: is refused")


@pytest.fixture(scope="module")
def policy() -> Picky:
    return Picky()


@pytest.fixture(scope="module")
def service(policy: Picky) -> Iterator[RunningService]:
    with tempfile.TemporaryDirectory(prefix="tandem") as directory:
        transport = ActionTransportConfig(websocket_port=0, quic_port=None, unix_socket_path=f"{directory}/a.sock")
        with start(service_config("action", action_transport=transport), stubs(policy)) as running:
            yield running


def test_all_targets_are_asked_by_all_clients(service: RunningService, policy: Picky) -> None:
    targets = [service.addresses["action"], service.addresses["action unix"]]
    load = Load(clients=2, seconds=0.2, prompt="stack")
    results = bench(targets, load, {})
    assert list(results) == targets
    asked = sum(row["requests"] for row in results.values())
    assert asked >= 4 and policy.prompts.count("stack") == asked + 4, "one more from each client to each target, to warm up"
    for row in results.values():
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["requests_per_s"] > 0 and row["client_cpu_ms"] > 0
    lines = render(results, load).splitlines()
    assert lines[0] == "2 clients, 0.2 s per target, in turns of 0.5 s"
    assert [line.split()[0] for line in lines[2:]] == targets and lines[2].split()[4] == "1.00"


@pytest.mark.parametrize(
    ("address", "load", "problem"),
    [
        ("unix:///nonexistent/x.sock", Load(1, 0.1), r"x\.sock.*; is the server running\?$"),
        (None, Load(1, 0.1, prompt="refuse me"), r"^ws://.*: prompt: is refused$"),
        (None, Load(2, 0.1, prompt="refuse me"), r"^ws://.*: prompt: is refused$"),
    ],
)
def test_a_target_that_cannot_be_measured_is_named(
    service: RunningService, address: str | None, load: Load, problem: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TestError, match=problem):
        bench([address or service.addresses["action"]], load, {})
    assert capfd.readouterr().err == "", "clients end without a word of their own"


def test_a_target_that_is_given_twice_would_share_its_row() -> None:
    with pytest.raises(TestError, match=r"^ws://a: is given twice; each target has one row$"):
        bench(["ws://a", "ws://b", "ws://a"], Load(1, 0.1), {})


def test_a_pin_is_for_the_targets_that_have_a_certificate(service: RunningService) -> None:
    assert bench([service.addresses["action"]], Load(1, 0.1), {"pin": "ab" * 32})
