"""The real HUD robot harness against a server of ours: its own ``RemoteModel``, and ours that its rollouts may share (reference/peers.md §2.5)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hosting.config import ActionTransportConfig
from hosting.policy import ObservationError
from pi0.prompt import prompt_text
from tests.e2e.process import ROOT, environment
from tests.serving import RunningService, service_config, start, stubs

HUD_PYTHON = ROOT / ".venv-hud" / "bin" / "python"
DRIVER = Path(__file__).with_name("hud_driver.py")
HORIZON, WIDTH = 4, 2
TIMEOUT_S = 110

pytestmark = pytest.mark.skipif(
    not HUD_PYTHON.exists(), reason="the HUD harness (450 MB) is not installed; `make .venv-hud/.ok` does that, as CI does"
)


class StatePolicy:
    """Its actions are the state it was sent, so an answer tells whose it is."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {"action_horizon": HORIZON, "image_specs": []}
        self.seen: list[dict[str, Any]] = []

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        return self.infer_batch([obs])[0]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], *, seeds: Sequence[int | None] | None = None) -> list[dict[str, Any]]:
        replies = []
        for obs in observations:
            if "observation/state" not in obs:
                raise ObservationError("observation/state: missing, expected [2] numbers")
            self.seen.append({key: (value.shape, str(value.dtype)) if isinstance(value, np.ndarray) else value for key, value in obs.items()})
            prompt_text(obs)
            replies.append({"actions": np.tile(np.asarray(obs["observation/state"], np.float64), (HORIZON, 1)), "policy_timing": {"infer_ms": 1.0}})
        return replies


@contextmanager
def driver(checks: str, url: str) -> Iterator[subprocess.Popen[str]]:
    command = [str(HUD_PYTHON), str(DRIVER), checks, url]
    env = environment(PYTHONPATH=os.fspath(ROOT))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[str], tell: str | None = None) -> dict[str, Any]:
    stdout, stderr = process.communicate(tell, timeout=TIMEOUT_S)
    assert process.returncode == 0, stderr
    report = json.loads(stdout)
    assert report["numpy"].startswith("1."), "openpi-client's own numpy"
    return report


@pytest.fixture(scope="module")
def policy() -> StatePolicy:
    return StatePolicy()


@pytest.fixture(scope="module")
def report(policy: StatePolicy) -> dict[str, Any]:
    """One process for all checks: importing the harness alone takes seconds."""
    with start(service_config("action"), stubs(policy)) as service, driver("all", service.addresses["action"]) as process:
        return finish(process)


@pytest.mark.parametrize("model", ["remote", "remote_action", "pooled", "pooled_action"])
def test_models_give_float32_chunks(report, model):
    assert report["unit"][model] == {
        "infer": {"dtype": "float32", "shape": [1, HORIZON, WIDTH], "first": [5.0, 6.0]},
        "ainfer": {"dtype": "float32", "shape": [HORIZON, WIDTH], "first": [7.0, 8.0]},
    }


@pytest.mark.parametrize("batch", ["pooled_list", "pooled_stacked"])
def test_a_batch_is_one_request_with_a_row_for_each(report, batch):
    assert report["unit"][batch] == {"shape": [3, HORIZON, WIDTH], "dtype": "float32", "states": [0.0, 1.0, 2.0]}


def test_concurrent_callers_get_their_own_answers(report):
    assert report["concurrency"] == {"remote_wrong": 0, "pooled_wrong": 0, "pooled_gathered_wrong": 0}


@pytest.mark.parametrize(("model", "error"), [("remote", "RuntimeError"), ("pooled", "InferenceError")])
def test_errors_name_the_missing_key_and_leave_the_model_usable(report, model, error):
    got = report["errors"][model]
    assert got["type"] == error and "observation/state: missing, expected [2] numbers" in got["text"]
    assert got["after"]["first"] == [3.0, 4.0]


def test_full_rollout(report, policy):
    """Chunks of 2 over 3 ticks: asked at ticks 0 and 2. The first component of state and action is 1 at every tick."""
    assert report["rollout"] == {"reward": 3.0, "error": False}
    image = ((16, 16, 3), "uint8")
    sent = {"observation/image": image, "observation/wrist_image": image, "observation/state": ((2,), "float32"), "prompt": "rollout"}
    assert [seen for seen in policy.seen if seen["prompt"] == "rollout"] == [sent, sent]


@pytest.mark.parametrize("agent", ["a RemoteModel per run", "one agent", "batched agent"])
def test_concurrent_rollouts_are_graded_by_their_own_actions(report, policy, agent):
    """HUD runs a task set with one agent: with its own model answers cross, with ours they do not."""
    assert report[agent] == {"rewards": [3.0, 6.0, 9.0], "errors": 0}
    assert sum(seen["prompt"] == agent for seen in policy.seen) == 9


def test_a_restarted_server(policy):
    """HUD's own model is lost for good, as its client is; ours goes on."""

    def serve(port: int) -> Any:
        transport = ActionTransportConfig(websocket_port=port, quic_port=None, unix_socket_path=None)
        return start(service_config("action", action_transport=transport), stubs(policy))

    with serve(0) as first:
        url = first.addresses["action"]
        with driver("restart", url) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            first.stop()
            assert first.wait_stopped() == 0
            with serve(_port(first)) as second:
                assert second.addresses["action"] == url
                got = finish(process, "restarted\n")
    assert got["before"]["remote"]["first"] == got["before"]["pooled"]["first"] == [1.0, 2.0]
    assert got["remote_failures"] == ["ConnectionClosedOK"] * 2
    assert got["pooled_after"] == {"dtype": "float32", "shape": [1, HORIZON, WIDTH], "first": [3.0, 4.0]}


def _port(service: RunningService) -> int:
    return int(service.addresses["action"].rpartition(":")[2])
