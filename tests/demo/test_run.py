"""`tandem demo` with policies that follow the scripted rules, and the whole of it once as a user runs it."""

from __future__ import annotations

import asyncio
import io
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from demo import run as demo
from demo.episodes import Call, Episode, new_table
from demo.instructions import ALL_DONE, DONE, SUBTASKS, goal_table, next_subtask, parse
from demo.serving import demo_config
from demo.table import TableEnv
from hosting.clients.errors import InferenceError
from hosting.config import AdminConfig, PlannerConfig
from hosting.service import Service
from tests.e2e.process import ROOT, environment, run
from tests.serving import EchoPlanner, EchoPolicy, service_config, stubs


class Stage:
    """The demo with policies that see the table; ``hook`` sees each request to the action policy and may stop the service."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hook: Callable[[Stage], None] = lambda stage: None) -> None:
        self.table: TableEnv = new_table()
        self.requests = 0
        self.services: list[Service] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        self.console = Console(file=io.StringIO(), width=160)
        self._hook = hook
        monkeypatch.setattr("demo.episodes.new_table", lambda: self.table)
        monkeypatch.setattr(demo, "RATE_HZ", 500.0)
        monkeypatch.setattr(demo, "Service", self._build)

    def _build(self, config: Any) -> Service:
        planner, policy = EchoPlanner(), EchoPolicy()
        planner.infer = self._plan  # type: ignore[method-assign]
        policy.infer = self._act  # type: ignore[method-assign]
        self.loop = asyncio.get_running_loop()
        self.services.append(Service(config, loaders=stubs(policy, planner), handle_signals=False))
        return self.services[0]

    def _subtask(self, prompt: str) -> Any:
        scenes = self.table.scenes
        return next_subtask(scenes.place, goal_table([parse(prompt).goals(scenes.rims[0], scenes.present[0])]))

    def _plan(self, obs: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
        return {"subtask": {"text": SUBTASKS[self._subtask(obs["prompt"])[0]], "ms": 1.0}}

    def _act(self, obs: Mapping[str, Any], *, seed: int | None = None) -> dict[str, Any]:
        from demo.expert import plan

        self.requests += 1
        self._hook(self)
        subtask = SUBTASKS.index(obs["prompt"].rpartition(". Subtask: ")[2])
        assert subtask != DONE
        return {"actions": plan(self.table.scenes, np.array([subtask]))[0], "policy_timing": {"infer_ms": 2.0}}

    def stop(self) -> None:
        """What Ctrl-C does."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.services[0].stop)

    def run(self, *, episodes: int | None, headless: bool = True) -> int:
        config = service_config(planner=PlannerConfig(checkpoint_dir="unused", done_subtasks=(ALL_DONE,)))
        return asyncio.run(demo._run(config, self.console, episodes=episodes, headless=headless, first_seed=3))

    @property
    def output(self) -> str:
        assert isinstance(self.console.file, io.StringIO)
        return self.console.file.getvalue()


def test_plain_lines_and_then_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    assert stage.run(episodes=2) == 0
    lines = stage.output.splitlines()
    outcomes = [line for line in lines if line.startswith("  done")]
    assert outcomes == ["  done; 1 of 1 episodes succeeded", "  done; 2 of 2 episodes succeeded"]
    said = [line for line in lines if line.startswith("  step ")]
    assert len(said) >= 8 and re.fullmatch(
        r"  step +\d+  'pick up the \w+ block'  \(planner 1 ms, policy 2 ms, server \d+ ms, round trip \d+ ms\)", said[0]
    )
    assert [line for line in lines if "'all done'" in line and "policy" not in line], "the policy is not asked what to do when nothing is left"


def test_a_live_screen_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    monkeypatch.setattr(demo, "_LINGER", 0)
    assert stage.run(episodes=2, headless=False) == 0
    for text in ("asked", "subtask", "12 × 3, ends at x", "goals", "1 of 1 episodes succeeded", "Page: http://127.0.0.1:"):
        assert text in stage.output, text


def test_ctrl_c_in_the_middle_of_an_episode_ends_it_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, lambda stage: stage.stop() if stage.requests == 2 else None)
    assert stage.run(episodes=None) == 0
    assert stage.requests == 2 and "succeeded" not in stage.output


def test_a_request_that_fails_ends_the_demo_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stage: Stage) -> None:
        raise ZeroDivisionError

    stage = Stage(monkeypatch, fail)
    with pytest.raises(InferenceError, match=r"^internal error [0-9a-f]{8}: "):
        stage.run(episodes=1)


def test_a_slot_that_cannot_load_ends_the_demo_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(config: Any) -> Service:
        def load(config: Any) -> Any:
            raise ZeroDivisionError("while loading")

        loaders = stubs()
        return Service(config, loaders=type(loaders)(load, loaders.planner), handle_signals=False)

    stage = Stage(monkeypatch)
    monkeypatch.setattr(demo, "Service", build)
    with pytest.raises(ZeroDivisionError, match="while loading"):
        stage.run(episodes=1)
    assert stage.requests == 0


def test_the_configuration_is_one_that_a_file_could_hold() -> None:
    usual, free = demo_config(page=True), demo_config(free_ports=True)
    assert (usual.action_transport.websocket_port, usual.admin.port, usual.planner_transport.websocket_port) == (8000, 8001, 8002)
    assert free.action_transport.websocket_port == free.admin.port == free.planner_transport.websocket_port == 0
    assert usual.mode == "combined" and usual.host == "127.0.0.1" and usual.admin.page and not free.admin.page
    assert usual.planner is not None and usual.planner.done_subtasks == (ALL_DONE,)
    assert type(usual).model_validate_json(usual.model_dump_json()) == usual
    assert isinstance(usual.admin, AdminConfig)


@pytest.mark.parametrize(
    ("success", "done", "text"),
    [(True, True, "done"), (True, False, "done, but nobody said so"), (False, True, "said to be done, but is not"), (False, False, "not done")],
)
def test_outcomes(success: bool, done: bool, text: str) -> None:
    assert demo.outcome(Episode(0, "…", "seq", success=success, done=done)) == text
    assert text in demo.outcome(Episode(0, "…", "seq", success=success, done=done), markup=True)


def test_timings_of_an_answer_without_a_chunk() -> None:
    call = Call("all done", {"subtask": {"ms": 7.2}, "server_timing": {"infer_ms": 8.0}}, 9.0)
    assert demo.timings(call) == "planner 7 ms, server 8 ms, round trip 9 ms"


@pytest.mark.timeout(200)
def test_the_whole_demo() -> None:
    done = run("demo", "--headless", "--episodes", "1", "--free-ports", timeout_s=180)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].endswith("of 1 episodes succeeded") and sum(line.startswith("  step ") for line in lines) >= 3
    log = [line.split(": ", 1)[1] for line in done.stderr.splitlines()]
    assert any(line.startswith("Service ready (mode=combined, slots=['action', 'planner']): action ws://127.0.0.1:") for line in log)
    assert log[-1] == "stopped" and "Traceback" not in done.stderr


def test_ctrl_c_ends_it_with_no_traceback() -> None:
    command = [sys.executable, str(ROOT / "main.py"), "demo", "--headless", "--free-ports"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("  step "):
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors and errors.rstrip().endswith("stopped"), errors


def test_checkpoints_that_are_not_there(tmp_path: Path) -> None:
    done = run("demo", "--episodes", "1", "--free-ports", "--checkpoints", str(tmp_path / "nothing"))
    assert done.returncode == 1 and "error: " in done.stderr and str(tmp_path / "nothing") in done.stderr and "Traceback" not in done.stderr
