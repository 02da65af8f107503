"""The demo's robot loop against stub policies, and the whole of it once as a user runs it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from demo import run as demo
from hosting.clients.errors import InferenceError
from hosting.service import Service
from tests.e2e.process import run
from tests.serving import EchoPlanner, EchoPolicy, service_config, stubs

EXCHANGE = "'tidy the table' → subtask 'first step of tidy the table', actions 10 × 14, planner 1 ms, policy 1 ms, server "


class Stage:
    """The demo with stub policies; ``hook`` sees each request to the action policy and may stop the service."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hook: Callable[[Stage, Mapping[str, Any]], None], planner: EchoPlanner | None = None) -> None:
        self.services: list[Service] = []
        self.requests = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self.console = Console(file=io.StringIO(), width=160)
        loaders = stubs(EchoPolicy(partial(self._count, hook)), planner)
        monkeypatch.setattr(demo, "Service", lambda config: self._build(Service(config, loaders=loaders, handle_signals=False)))

    def _build(self, service: Service) -> Service:
        self.services.append(service)
        self.loop = asyncio.get_running_loop()
        return service

    def _count(self, hook: Callable[[Stage, Mapping[str, Any]], None], obs: Mapping[str, Any]) -> None:
        self.requests += 1
        hook(self, obs)

    def stop(self) -> None:
        """What Ctrl-C does."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.services[0].stop)

    def run(self, *, steps: int, stay: bool = False, headless: bool = True) -> int:
        return asyncio.run(demo._run(service_config(), self.console, steps=steps, stay=stay, headless=headless))

    @property
    def output(self) -> str:
        assert isinstance(self.console.file, io.StringIO)
        return self.console.file.getvalue()


def test_a_line_per_request_and_then_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, lambda stage, obs: None)
    assert stage.run(steps=3) == 0
    lines = stage.output.splitlines()
    assert len(lines) == stage.requests == 3 and all(line.startswith(EXCHANGE) and line.endswith(" ms") for line in lines)


def test_a_live_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, lambda stage, obs: None)
    assert stage.run(steps=12, headless=False) == 0
    assert "a random planner's words" in stage.output and stage.output.count("10 × 14") == 8, "the most recent ones"


def test_ctrl_c_in_the_middle_of_the_stream_ends_it_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, lambda stage, obs: stage.stop() if stage.requests == 2 else None)
    assert stage.run(steps=10_000) == 0
    assert stage.requests == 2 and len(stage.output.splitlines()) == 2, "what was in flight was answered"


def test_the_server_stays_up_with_the_commands_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, lambda stage, obs: None)
    shown: list[str] = []

    def what_next(addresses: dict[str, str]) -> Any:
        shown.append(str(addresses))
        stage.stop()  # Ctrl-C after the stream
        return panel(addresses)

    panel = demo._what_next
    monkeypatch.setattr(demo, "_what_next", what_next)
    assert stage.run(steps=1, stay=True) == 0
    service = stage.services[0]
    assert len(shown) == 1
    for command in (
        f"python main.py test ws {service.addresses['action']}",
        f"python main.py test ws {service.addresses['action']} --mode action_only",
        f"python main.py test ws {service.addresses['planner']} --embodiment aloha",
        f"curl -X PATCH {service.addresses['admin']}/config -H 'content-type: application/json' -d '{{\"action_prompt_template\": \"{{subtask}}\"}}'",
        f"curl {service.addresses['action'].replace('ws://', 'http://')}/healthz",
        f"{service.addresses['admin']}/docs",
    ):
        assert command in stage.output


def test_a_request_that_fails_ends_the_demo_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stage: Stage, obs: Mapping[str, Any]) -> None:
        raise ZeroDivisionError

    stage = Stage(monkeypatch, fail)
    with pytest.raises(InferenceError, match=r"^internal error [0-9a-f]{8}: "):
        stage.run(steps=3)


def test_a_slot_that_cannot_load_ends_the_demo_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*, max_batch: int = 1) -> None:
        raise ZeroDivisionError("while loading")

    planner = EchoPlanner()
    planner.warmup = fail  # type: ignore[attr-defined]
    stage = Stage(monkeypatch, lambda stage, obs: None, planner)
    with pytest.raises(ZeroDivisionError, match="while loading"):
        stage.run(steps=3)
    assert stage.requests == 0


def test_ports(tmp_path: Path) -> None:
    usual, free = (demo._config(tmp_path, tmp_path, free_ports=free) for free in (False, True))
    assert (usual.action_transport.websocket_port, usual.admin.port, usual.planner_transport.websocket_port) == (8000, 8001, 8002)
    assert free.action_transport.websocket_port == free.admin.port == free.planner_transport.websocket_port == 0
    assert usual.mode == "combined" and usual.host == "127.0.0.1"


def test_the_whole_demo(tmp_path: Path) -> None:
    done = run("demo", "--exit", "--headless", "--steps", "3", "--free-ports", "--directory", str(tmp_path / "demo"))
    assert done.returncode == 0, done.stderr
    assert len(lines := done.stdout.splitlines()) == 3
    assert all(line.startswith("'tidy the table' → subtask '") and ", actions 50 × 14, planner " in line for line in lines)
    log = [line.split(": ", 1)[1] for line in done.stderr.splitlines()]
    assert log[0] == f"writing the demo's checkpoints to {tmp_path / 'demo'}"
    assert any(line.startswith("Service ready (mode=combined, slots=['action', 'planner']): action ws://127.0.0.1:") for line in log)
    assert log[-1] == "stopped" and "Traceback" not in done.stderr


def test_a_directory_that_is_not_the_demos(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    done = run("demo", "--exit", "--directory", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (f"error: {tmp_path} exists but holds no demo checkpoints of this version; remove it, or choose another with --directory\n")
