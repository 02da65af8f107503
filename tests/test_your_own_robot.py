"""docs/your-own-robot.md says what runs: its code, files and configuration as printed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from action.configs import get_config
from action.policy import ActionPolicy
from demo.robot import PI05_TABLE
from hosting.clients.examples import example_observation
from hosting.clients.measure import measure
from hosting.config import PlannerConfig, load_config
from pi0.errors import ObservationError
from tests.action.policy_cases import processor
from tests.e2e.process import ROOT, ServerProcess, combined_config, environment
from tests.golden_data import CHECKPOINTS, TOKENIZER
from tests.serving import EchoPlanner, EchoPolicy, service_config, start, stubs

PAGE = (ROOT / "docs" / "your-own-robot.md").read_text()
URL = "ws://localhost:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


MODULE, LOOP, TRIAL, IN_PYTHON, UR5 = blocks("python")
DIMS, NORM_STATS, CONFIG = blocks("json")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A pi0.5 model with the page's norm stats."""
    shutil.copytree(CHECKPOINTS / "pi05_pytorch", tmp_path / "checkpoint")
    norm_stats = tmp_path / "checkpoint" / "assets" / PI05_TABLE.asset_id / "norm_stats.json"
    norm_stats.parent.mkdir(parents=True)
    norm_stats.write_text(NORM_STATS)
    return tmp_path / "checkpoint"


def run(block: str) -> None:
    # dont_inherit: the page must work without this file's own future imports.
    exec(compile(block, "docs/your-own-robot.md", "exec", dont_inherit=True), {})


def test_the_module_is_the_demos() -> None:
    assert (ROOT / "demo" / "robot.py").read_text() == MODULE


def test_the_configuration_loads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    config = load_config(tmp_path / "config.json", environ={}).config
    assert config.action is not None and get_config(config.action.model_config_name) is PI05_TABLE
    assert config.planner is not None and config.planner.done_subtasks == ("all done",)
    assert config.action.checkpoint_dir == "demo/checkpoints/action" and config.planner.checkpoint_dir == "demo/checkpoints/planner"
    assert json.loads(DIMS).keys() == {"vlm", "siglip"}


class Expert(EchoPlanner):
    """Says that it is done after three steps."""

    said = 0

    def infer(self, obs: Any, **settings: Any) -> dict[str, Any]:
        PI05_TABLE.embodiment.inputs(obs)
        self.said += 1
        return {"subtask": {"text": "All done." if self.said > 3 else "pick up the red block", "ms": 1.0}}


class Still(EchoPolicy):
    def infer(self, obs: Any) -> dict[str, Any]:
        assert obs["prompt"] == "pick up the red block"
        return {"actions": np.zeros((PI05_TABLE.action_horizon, 3)), "policy_timing": {"infer_ms": 1.0}}


def test_the_loop_stops_when_all_is_done_and_the_trial_call_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    planner = PlannerConfig(checkpoint_dir="unused", action_prompt_template="{subtask}", done_subtasks=["all done"])
    with start(service_config(planner=planner), stubs(Still(), Expert())) as service:
        for block in (LOOP, TRIAL):
            assert block.count(URL) == 1
            run(block.replace(URL, service.addresses["action"]))
    printed = capsys.readouterr().out.splitlines()
    assert printed[:5] == [*["pick up the red block"] * 3, "All done.", "0 of 2"] and "'done': True" in printed[5]


def test_in_python(checkpoint: Path) -> None:
    assert "demo/checkpoints/action" in IN_PYTHON
    run(IN_PYTHON.replace('"demo/checkpoints/action"', f"{str(checkpoint)!r}, tokenizer={str(TOKENIZER)!r}"))
    for robot in (PI05_TABLE, "demo.robot:PI05_TABLE"):
        policy = ActionPolicy.load(robot, checkpoint, tokenizer=TOKENIZER, num_steps=1)
        actions = policy.infer(example_observation("table", np.random.default_rng(0)), seed=0)["actions"]
        assert actions.shape == (12, 3) and np.isfinite(actions).all()


def test_the_ur5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_robot.py").write_text(UR5)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_robot", raising=False)
    config = get_config("my_robot:PI0_UR5")
    entry = {"mean": [0.0] * 7, "std": [1.0] * 7}
    stats = tmp_path / "assets" / "ur5e" / "norm_stats.json"
    stats.parent.mkdir(parents=True)
    stats.write_text(json.dumps({"norm_stats": {"state": entry, "actions": entry}}))
    transforms = processor(config, tmp_path)
    example = config.embodiment.example(np.random.default_rng(0))
    prepared = transforms.prepare(example)
    assert prepared.image_masks.tolist() == [True, True, False]
    actions = transforms.robot_actions(np.zeros((50, 32), np.float32), prepared.state)
    np.testing.assert_allclose(actions[0], [*example["joints"], 0.0])
    with pytest.raises(ObservationError, match=r"^joints: missing, expected \[6\] numbers"):
        transforms.prepare({key: value for key, value in example.items() if key != "joints"})


TANDEM = [sys.executable, "-P", "-c", "from hosting.cli import main; main()"]
"""The ``tandem`` command: unlike ``python main.py``, without the working directory on its path."""


def test_a_module_in_the_working_directory_is_served_by_the_command(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "my_table.py").write_text(MODULE)
    action = {"model_config_name": "my_table:PI05_TABLE", "checkpoint_dir": "checkpoint", "tokenizer": str(TOKENIZER), "num_steps": 1}
    config = {**combined_config(), "action": action, "planner": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    env = environment(PYTHONPATH=str(ROOT))
    with subprocess.Popen([*TANDEM, "serve"], stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path) as process:
        server = ServerProcess(process)
        try:
            server.wait_ready()
            report = measure(server.addresses["action"], mode=None, embodiment=None, prompt="tidy", iterations=1)
        finally:
            server.signal()
            assert server.wait() == 0
    assert report["embodiment"] == "table" and report["reply"]["actions"] == "float64 [12, 3]"


def test_a_module_that_is_not_there_ends_the_command_with_2_before_the_checkpoint_is_looked_for(tmp_path: Path) -> None:
    arguments = ["serve", "--set", "action.model_config_name=my_table:PI05_TABLE", "--set", "action.checkpoint_dir=nowhere"]
    free = [
        argument for name in ("websocket_port=0", "quic_port=null", "unix_socket_path=null") for argument in ("--set", f"action_transport.{name}")
    ]
    command = [*TANDEM, *arguments, *free, "--set", "admin.port=null"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(PYTHONPATH=str(ROOT)), cwd=tmp_path, timeout=100, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: action.model_config_name: there is no module 'my_table' for 'my_table:PI05_TABLE'; start the server in the directory that it lies "
        "in, install it, or name its directory in PYTHONPATH"
    )
