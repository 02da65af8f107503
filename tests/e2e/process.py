"""``python main.py serve`` as a user runs it: a process of its own, its log, its signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.golden_data import CHECKPOINTS, TOKENIZER

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 100


def environment(**more: str) -> dict[str, str]:
    """This process's environment without OPENPI_ variables, one compute thread, plus ``more``."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OPENPI_", "INFERENCE_CONFIG"))}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def combined_config(**fields: Any) -> dict[str, Any]:
    """Golden pi05 checkpoints in both slots, free ports."""
    return {
        "action": {"model_config_name": "pi05_aloha", "checkpoint_dir": str(CHECKPOINTS / "pi05_pytorch"), "tokenizer": str(TOKENIZER)},
        "planner": {"checkpoint_dir": str(CHECKPOINTS / "pi05_orbax"), "tokenizer": str(TOKENIZER), "scheduler": {"max_batch": 1}},
        "action_transport": {"websocket_port": 0, "quic_port": None, "unix_socket_path": None},
        "planner_transport": {"websocket_port": 0, "quic_port": None, "unix_socket_path": None},
        "admin": {"port": 0},
        **fields,
    }


class ServerProcess:
    """A running ``serve``; ``addresses`` are those of its ready line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self.addresses: dict[str, str] = {}
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, name="server log")
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.log.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(self, text: str) -> str:
        """The first log line with ``text``."""
        with self._changed:
            found = self._changed.wait_for(lambda: self._ended or any(text in line for line in self.log), START_TIMEOUT_S)
            lines = [line for line in self.log if text in line]
            assert found and lines, f"no line with {text!r} in:\n" + "\n".join(self.log)
            return lines[0]

    def wait_ready(self) -> None:
        line = self.wait_for("Service ready")
        self.addresses = dict(re.findall(r"(action|planner|admin) ((?:ws|http)://[^\s,]+)", line))

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit code; the log is complete afterwards."""
        code = self.process.wait(60)
        self._reader.join(10)
        return code


@contextmanager
def serve(config: dict[str, Any], directory: Path, *, wait_ready: bool = True, **env: str) -> Iterator[ServerProcess]:
    """``main.py serve --config`` on ``config``; killed at the end if the test has not ended it."""
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, str(ROOT / "main.py"), "serve", "--config", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(**env), cwd=ROOT) as process:
        server = ServerProcess(process)
        try:
            if wait_ready:
                server.wait_ready()
            yield server
        finally:
            if process.poll() is None:
                process.kill()
            server.wait()


def run(*arguments: str, timeout_s: float = 100, **env: str) -> subprocess.CompletedProcess[str]:
    """``main.py`` with ``arguments``, to its end."""
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**env), cwd=ROOT, timeout=timeout_s, check=False)
