"""The command line as a user meets it: help, what ``config show`` shows, one line for each mistake, and what it imports."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from action.embodiments import Droid
from hosting import __version__, cli
from hosting.policy import ConfigError
from tests.e2e.process import ROOT, combined_config, environment, run
from tests.serving import EchoPolicy, RunningService, service_config, start, stubs

COMMANDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("serve",): ("--config", "--set"),
    ("demo",): ("--checkpoints", "--episodes", "--seed", "--headless", "--free-ports", "--refresh"),
    ("eval-demo",): ("--episodes", "--modes", "--checkpoints", "--flat", "--robots", "--planner-states", "--json"),
    ("train-demo",): ("--output", "--seed", "--effort"),
    ("config",): (),
    ("config", "show"): ("--config", "--set", "--json"),
    ("prepare-planner-checkpoint",): ("--hf-repo", "--tar-path-in-repo", "--output-dir", "--force-download"),
    ("prepare-checkpoint",): ("--model-id", "--openpi-assets-uri", "--output-dir", "--required-asset-id", "--force-download"),
    ("test",): (),
    ("test", "ws"): ("--mode", "--embodiment", "--prompt", "--iterations", "--api-key", "--pin", "--cafile", "--insecure", "--jpeg", "--json"),
    ("test", "quic"): (
        "--mode",
        "--embodiment",
        "--prompt",
        "--iterations",
        "--api-key",
        "--pin",
        "--cafile",
        "--insecure",
        "--jpeg",
        "--connections",
        "--json",
    ),
    ("test", "unix"): ("--mode", "--embodiment", "--prompt", "--iterations", "--jpeg", "--json"),
    ("bench",): (
        "--clients",
        "--seconds",
        "--mode",
        "--embodiment",
        "--prompt",
        "--api-key",
        "--pin",
        "--cafile",
        "--insecure",
        "--jpeg",
        "--connections",
        "--json",
    ),
}
ACTION = {"model_config_name": "pi05_aloha", "checkpoint_dir": "/ckpt"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("OPENPI_", "INFERENCE_CONFIG")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str) -> Result:
    """``main.py`` with ``arguments``, in this process; a TandemError comes out as ``result.exception``."""
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


class TestHelp:
    @pytest.mark.parametrize("command", list(COMMANDS), ids=" ".join)
    def test_every_command_explains_itself_and_its_options(self, command: tuple[str, ...]) -> None:
        result = invoke(*command, "--help")
        assert result.exit_code == 0 and f"Usage: root {' '.join(command)}" in result.output
        for option in COMMANDS[command]:
            assert option in result.output

    def test_all_commands_are_listed(self) -> None:
        output = invoke("--help").output
        names = re.findall(r"^│ ([a-z][a-z-]+) ", output, re.MULTILINE)
        assert sorted(names) == sorted({command[0] for command in COMMANDS})

    def test_defaults_of_the_prepare_commands_are_shown(self) -> None:
        planner, action = invoke("prepare-planner-checkpoint", "--help").output, invoke("prepare-checkpoint", "--help").output
        for default in ("Hebbian-Robotics/pi05_subtask", "jax/pi05_subtask.tar", "$OPENPI_DATA_HOME/pi05_subtask"):
            assert default in planner
        for default in ("lerobot/pi05_base", "gs://openpi-assets/checkpoints/pi05_base/assets", "trossen", "$OPENPI_DATA_HOME/pi05_base_openpi"):
            assert default in action

    def test_version(self) -> None:
        assert invoke("--version").output == f"tandem {__version__}\n"
        done = run("--version")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"tandem {__version__}\n", "")

    @pytest.mark.parametrize(
        "arguments", [["serve", "--bogus"], ["frobnicate"], ["test", "ws"], ["test", "ws", "ws://h", "--mode", "plan"]], ids=" ".join
    )
    def test_a_wrong_command_line_is_explained(self, arguments: list[str]) -> None:
        result = invoke(*arguments)
        assert result.exit_code == 2 and "Usage: " in result.output and "Traceback" not in result.output


class TestConfigShow:
    def test_values_and_where_each_came_from(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"action": ACTION, "host": "0.0.0.0", "admin": {"port": 9}}))
        monkeypatch.setenv("OPENPI_ADMIN__PORT", "9001")
        shown = json.loads(invoke("config", "show", "--json", "--set", "action.num_steps=5").output)
        assert shown["host"] == {"value": "0.0.0.0", "origin": "file config.json"}
        assert shown["admin.port"] == {"value": 9001, "origin": "environment OPENPI_ADMIN__PORT"}
        assert shown["action.num_steps"] == {"value": 5, "origin": "flag"}
        assert shown["action.dtype"] == {"value": None, "origin": "default"}
        assert shown["planner"] == {"value": None, "origin": "default"}

    def test_the_table_says_the_same(self, tmp_path: Path) -> None:
        (tmp_path / "robot.json").write_text(json.dumps({"action": ACTION}))
        arguments = ["--config", "robot.json", "--set", "host=::1"]
        lines = invoke("config", "show", *arguments).output.splitlines()
        assert lines[0].strip() == "mode: action_only"
        rows = {cells[0].strip(): [cell.strip() for cell in cells[1:3]] for line in lines if len(cells := re.split("[│┃]", line)[1:]) > 2}
        shown = json.loads(invoke("config", "show", "--json", *arguments).output)
        assert rows.pop("field") == ["value", "from"]
        assert rows == {field: [json.dumps(row["value"]), row["origin"]] for field, row in shown.items()}
        assert rows["host"] == ['"::1"', "flag"] and rows["action.checkpoint_dir"] == ['"/ckpt"', "file robot.json"]


class TestSet:
    def overrides(self, *assignments: str) -> dict[str, Any]:
        return cli._overrides(list(assignments))

    def test_nothing(self) -> None:
        assert cli._overrides(None) == cli._overrides([]) == {}

    @pytest.mark.parametrize(
        ("assignment", "value"),
        [
            ("action.default_prompt=123", "123"),  # a string field keeps text that looks like JSON
            ("action.default_prompt=null", None),
            ("action.default_prompt=", ""),
            ("action.default_prompt=a=b", "a=b"),
            ("action.dtype=float32", "float32"),
            ("action.num_steps=5", 5),
            ("action.num_steps=five", "five"),
            ("action.bogus=5", "5"),
        ],
    )
    def test_values_are_read_as_their_field_wants(self, assignment: str, value: object) -> None:
        name = assignment.partition("=")[0].removeprefix("action.")
        assert self.overrides(assignment) == {"action": {name: value}}

    def test_sections_and_fields_add_up_and_the_last_one_wins(self) -> None:
        assert self.overrides("drain_s=1.5", 'admin={"port": 1, "host": "h"}', "admin.port=2", "admin.port=3", "planner=null") == {
            "drain_s": 1.5,
            "admin": {"port": 3, "host": "h"},
            "planner": None,
        }
        assert self.overrides("admin.port=2", 'admin={"host": "h"}') == {"admin": {"port": 2, "host": "h"}}

    @pytest.mark.parametrize("assignment", ["host", "=1", "action.=1", ".host=1", ""])
    def test_no_assignment(self, assignment: str) -> None:
        with pytest.raises(ConfigError, match=rf"^--set {re.escape(assignment)}: expected FIELD=VALUE, e\.g\. action\.dtype=float32$"):
            self.overrides(assignment)


ONE_FAILS_ONE_WAITS = """
import sys, threading
import hosting.service
from hosting.cli import main
from hosting.policy import CheckpointError

loading = threading.Event()

def wait(config):
    loading.set()
    sys.stdin.readline()

def fail(config):
    loading.wait()
    raise CheckpointError("no such checkpoint")

hosting.service.load_action, hosting.service.load_planner = fail, wait
main()
"""


class TestServe:
    def serve(self, config: dict[str, Any], tmp_path: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "robot.json"
        path.write_text(json.dumps(config))
        return run("serve", "--config", str(path), *arguments, **env)

    def test_a_wrong_configuration(self, tmp_path: Path) -> None:
        done = self.serve({"action": {**ACTION, "num_steps": 0}}, tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: action.num_steps: expected an integer 1…1000, got 0 (file {tmp_path}/robot.json)\n"

    def test_a_missing_checkpoint(self, tmp_path: Path) -> None:
        config = combined_config(planner=None)
        config["action"]["checkpoint_dir"] = str(tmp_path / "gone")
        done = self.serve(config, tmp_path)
        assert (done.returncode, done.stdout) == (1, "") and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1] == f"error: no such directory {tmp_path}/gone; check the path of the checkpoint"

    def test_a_slot_that_fails_does_not_wait_for_the_other_to_load(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(combined_config()))
        command = [sys.executable, "-c", ONE_FAILS_ONE_WAITS, "serve"]
        env = environment(PYTHONPATH=str(ROOT))
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path) as process:
            assert process.wait(60) == 1  # nobody has written to its standard input
            assert process.stderr is not None
            log = process.stderr.read().splitlines()
        assert log[-1] == "error: no such checkpoint" and not any("Traceback" in line for line in log)

    def test_a_compile_mode_that_is_none(self, tmp_path: Path) -> None:
        config = combined_config(planner=None)
        done = self.serve(config, tmp_path, OPENPI_PYTORCH_COMPILE_MODE="fast")
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == (
            "error: OPENPI_PYTORCH_COMPILE_MODE: expected one of default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs, eager, none; "
            "got 'fast'"
        )

    def test_a_port_in_use(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            done = self.serve(combined_config(), tmp_path, "--set", f"admin.port={port}")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            f"error: admin.port: cannot listen on 127.0.0.1 port {port} (Address already in use); stop what uses it, or choose another port or host\n"
        )


class AskingPolicy(EchoPolicy):
    """Asks for DROID's cameras."""

    def __init__(self) -> None:
        super().__init__()
        self.metadata = {**self.metadata, "image_specs": [spec.as_metadata() for spec in Droid().image_specs]}


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """Stub policies behind DROID's cameras."""
    with start(service_config(), stubs(AskingPolicy())) as running:
        yield running


class TestTestWs:
    def test_times_for_people(self, service: RunningService) -> None:
        done = run("test", "ws", service.addresses["action"])
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert lines[:3] == [
            f"{service.addresses['action']}  mode default, droid observations",
            "subtask: 'first step of pick up the red cup'",
            "actions: float64 [10, 14]",
        ]
        assert lines[3].split() == ["ms", "mean", "min", "max"]
        assert [line.split()[0] for line in lines[4:]] == ["client", "network", "server", "overhead", "policy", "planner"]

    def test_times_for_machines_and_the_options(self, service: RunningService) -> None:
        arguments = ("--mode", "action_only", "--embodiment", "libero", "--prompt", "stack", "--iterations", "2", "--json")
        report = json.loads(invoke("test", "ws", service.addresses["action"], *arguments).output)
        assert (report["mode"], report["embodiment"], report["reply"]["asked"]) == ("action_only", "libero", {"prompt": "stack"})
        assert set(report["ms"]) == {"client", "network", "server", "overhead", "policy"}

    def test_nobody_there(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = f"ws://127.0.0.1:{free.getsockname()[1]}"
        done = run("test", "ws", url)
        assert (done.returncode, done.stdout) == (1, "")
        expected = rf"error: cannot connect to {url}: \[Errno \d+\] Connection refused; is the server running, and is this its WebSocket port\?\n"
        assert re.fullmatch(expected, done.stderr)

    def test_a_server_whose_cameras_are_unknown(self) -> None:
        with start(service_config("action"), stubs()) as running:
            url = running.addresses["action"]
            done = run("test", "ws", url)
        assert (done.returncode, done.stdout) == (1, "")
        message = f"the server at {url} names no known cameras; say which observation to send with --embodiment aloha|droid|libero|table"
        assert done.stderr == f"error: {message}\n"

    def test_an_embodiment_that_is_none(self) -> None:
        result = invoke("test", "ws", "ws://127.0.0.1:1", "--embodiment", "spot")
        assert result.exit_code == 2 and "'spot' is not one of 'aloha', 'droid', 'libero', 'table'" in result.output

    def test_what_the_server_refuses(self, service: RunningService) -> None:
        done = run("test", "ws", service.addresses["planner"], "--mode", "action_only")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "error: mode: action_only is not served on this endpoint, which has no action policy\n"


# What the base install does not bring.
SERVING = (
    "cryptography",
    "fastapi",
    "filelock",
    "fsspec",
    "gcsfs",
    "huggingface_hub",
    "ml_dtypes",
    "sentencepiece",
    "starlette",
    "tensorstore",
    "uvicorn",
)
EXTRAS = (*SERVING, "flax", "jax", "jaxlib", "orbax", "safetensors", "torch")
BASE_INSTALL = f"""
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def python(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=False, cwd=cwd, env=environment(PYTHONPATH=str(ROOT), COLUMNS="200")
    )


def base_install(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command line where only the base install is there."""
    return python(BASE_INSTALL + "from hosting.cli import main; main()", *arguments, cwd=cwd)


class TestBaseInstall:
    def test_what_a_robot_needs_imports(self) -> None:
        modules = ["hosting.clients.websocket", "hosting.clients.measure", "hosting.clients.examples", "hosting.config", "hosting.cli"]
        modules += ["hosting.policy", "hosting.protocol.connection", "hosting.templates", "pi0.errors"]
        code = "".join(f"import {module}\n" for module in modules)
        done = python(BASE_INSTALL + code + f"print([name for name in {EXTRAS!r} if name in sys.modules])")
        assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")

    @pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["demo", "--help"], ["--version"]], ids=" ".join)
    def test_help(self, arguments: list[str]) -> None:
        done = base_install(*arguments)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout

    def test_config_show(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"action": ACTION}))
        done = base_install("config", "show", "--json", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)["action.num_steps"]["value"] == 10

    def test_test_ws(self) -> None:
        with start(service_config("action"), stubs(AskingPolicy())) as running:
            done = base_install("test", "ws", running.addresses["action"], "--json")
        assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)["reply"]["actions"] == "float64 [10, 14]"

    @pytest.mark.parametrize("command", ["serve", "demo", "prepare-planner-checkpoint", "prepare-checkpoint"])
    def test_what_needs_more_says_what_to_install(self, command: str, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"action": ACTION}))
        done = base_install(command, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"error: this command needs packages that are not installed \([a-z_]+\); pip install 'tandem-vla\[all\]'\n", done.stderr)

    def test_so_does_a_slot_without_its_framework(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(combined_config(planner=None)))
        code = BASE_INSTALL.replace(repr(EXTRAS), "('torch',)") + "from hosting.cli import main; main()"
        done = python(code, "serve", cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1] == "error: this command needs packages that are not installed (torch); pip install 'tandem-vla[all]'"

    def test_another_missing_module_is_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise ModuleNotFoundError("No module named 'ours'", name="ours")

        monkeypatch.setattr(cli, "app", fail)
        with pytest.raises(ModuleNotFoundError, match="ours"):
            cli.main()


SERVE_ONCE = """
import asyncio, sys
from hosting.config import load_config
from hosting.service import Service

async def main():
    service = Service(load_config().config)
    serving = asyncio.create_task(service.serve())
    becoming_ready = asyncio.create_task(service.ready.wait())
    await asyncio.wait([serving, becoming_ready], return_when=asyncio.FIRST_COMPLETED)
    service.stop()
    assert await serving == 0 and service.ready.is_set()

asyncio.run(main())
print(*sorted({"jax", "flax", "torch", "safetensors"} & set(sys.modules)))
"""


@pytest.mark.parametrize(("slot", "frameworks"), [("action", {"safetensors", "torch"}), ("planner", {"flax", "jax"})])
def test_a_slot_that_is_not_configured_never_imports_its_framework(slot: str, frameworks: set[str], tmp_path: Path) -> None:
    config = combined_config(**{"planner" if slot == "action" else "action": None})
    if slot == "planner":
        config["planner"]["missing_cameras"] = "grey"  # two programs to compile instead of six
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = python(SERVE_ONCE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert loaded and loaded <= frameworks
