"""Ctrl-C and SIGTERM, on a process whose policy waits to be told: nothing here depends on how long anything takes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from hosting.clients.client import Client
from hosting.clients.errors import ConnectionLostError
from tests.e2e.process import ROOT, ServerProcess, environment

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


class StubServer(ServerProcess):
    """``tests.e2e.stub_server`` and the line that lets its policy go on."""

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go on\n")
        self.process.stdin.flush()

    def messages(self) -> list[str]:
        """The log without times, levels and loggers."""
        return [line.split(": ", 1)[1] for line in self.log]


@contextmanager
def stub(waits: str, *arguments: str) -> Iterator[StubServer]:
    command = [sys.executable, "-m", "tests.e2e.stub_server", waits, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT) as process:
        server = StubServer(process)
        try:
            if waits == "load":
                server.wait_for("waiting in load")
            else:
                server.wait_ready()
            yield server
        finally:
            if process.poll() is None:
                process.kill()
            server.wait()
    assert not any("Traceback" in line for line in server.log), "\n".join(server.log)


class Robot:
    """One request in another thread, and what came of it."""

    def __init__(self, url: str) -> None:
        self.outcome: Any = None
        self._client = Client(url, retry_lost=False)
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        try:
            self.outcome = self._client.infer({"prompt": "x", "mode": "action_only"})
        except ConnectionLostError as lost:
            self.outcome = lost

    def wait(self) -> Any:
        self._thread.join(30)
        self._client.close()
        return self.outcome


@BOTH
def test_idle(number: signal.Signals) -> None:
    with stub("nothing") as server, connect(server.addresses["action"], compression=None) as client:
        client.recv()
        server.signal(number)
        assert server.wait() == 0
        assert server.messages()[-2:] == ["stopping: no new requests, what is in flight is finished (again to force)", "stopped"]
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=30)
        assert closed.value.rcvd is not None and (closed.value.rcvd.code, closed.value.rcvd.reason) == (1001, "the server is shutting down")


@BOTH
def test_what_is_in_flight_gets_its_reply(number: signal.Signals) -> None:
    with stub("infer") as server:
        robot = Robot(server.addresses["action"])
        server.wait_for("waiting in infer")
        server.signal(number)
        server.wait_for("stopping")
        assert server.process.poll() is None
        server.go_on()
        assert robot.wait()["asked"] == {"prompt": "x"}
        assert server.wait() == 0 and server.messages()[-1] == "stopped"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_second_signal_forces(second: signal.Signals) -> None:
    with stub("infer") as server:
        robot = Robot(server.addresses["action"])
        server.wait_for("waiting in infer")
        server.signal()
        server.wait_for("stopping")
        server.signal(second)
        # The policy is never told to go on, so it was not waited for.
        assert server.wait() == 1 and server.messages()[-1] == "stopped a second time: leaving at once"
        assert isinstance(robot.wait(), ConnectionLostError)


def test_what_takes_longer_than_drain_s_is_given_up() -> None:
    with stub("infer", "0") as server:
        robot = Robot(server.addresses["action"])
        server.wait_for("waiting in infer")
        server.signal()
        assert server.wait() == 1
        assert server.messages()[-1] == "requests were still running after drain_s=0 s; leaving without their answers"
        assert isinstance(robot.wait(), ConnectionLostError)


@BOTH
def test_while_loading(number: signal.Signals) -> None:
    with stub("load") as server:
        server.signal(number)
        assert server.wait() == 0 and server.messages()[-1] == "stopped while loading"
        assert not any("Service ready" in line for line in server.log)
