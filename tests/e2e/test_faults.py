"""What goes wrong hurts whoever did it, and ends as ``docs/behaviour.md`` says. How little others notice: ``benchmarks/faults.py``."""

from __future__ import annotations

import logging
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from typing import Any

import pytest
from websockets.frames import Frame, Opcode

from hosting.clients import InferenceError, ReplyTimeoutError, connect
from hosting.config import WatchdogConfig, WebSocketConfig
from hosting.protocol import msgpack_numpy
from hosting.protocol.messages import MessageType
from tests.e2e.crowd import SECONDS, TRANSPORTS, Crowd, crowd, observation
from tests.e2e.hostile import UPGRADE
from tests.e2e.process import ROOT, ServerProcess, environment
from tests.hosting.transports.unix_support import framed

EVERY = pytest.mark.parametrize("transport", TRANSPORTS)
ACTION_ONLY = {"mode": "action_only"}
INTERNAL = r"internal error [0-9a-f]{8}: the action failed on this request; the server's log has the details under this id"


@pytest.fixture
def fleet() -> Iterator[Crowd]:
    with crowd() as fleet:
        yield fleet


def raw(fleet: Crowd, transport: str) -> socket.socket:
    """A connection that does nothing by itself, greeted."""
    if transport == "unix":
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(SECONDS)
        client.connect(fleet.service.addresses["action unix"].removeprefix("unix://"))
        client.sendall(framed(MessageType.METADATA))
        assert client.recv(1 << 16)
        return client
    host, port = fleet.service.addresses["action"].removeprefix("ws://").split(":")
    client = socket.create_connection((host, int(port)), timeout=SECONDS)
    client.sendall(UPGRADE)
    received = b""
    while b"server_version" not in received:
        piece = client.recv(1 << 16)
        assert piece
        received += piece
    return client


def request(transport: str, obs: dict[str, Any]) -> bytes:
    body = msgpack_numpy.pack(obs)
    return framed(MessageType.INFER, body) if transport == "unix" else Frame(Opcode.BINARY, body).serialize(mask=True)


def failure(future: Future[dict[str, Any]]) -> tuple[str | None, str]:
    with pytest.raises(InferenceError) as caught:
        future.result(SECONDS)
    return caught.value.code, str(caught.value)


# --- clients that go -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["websocket", "unix"])
def test_a_client_that_vanishes_takes_what_waits_with_it(fleet: Crowd, transport: str) -> None:
    """One request of it runs and one waits when its connection is reset."""
    gate = fleet.action.gate
    gate.shut()
    client = raw(fleet, transport)
    client.sendall(request(transport, observation(1, session_id="a", **ACTION_ONLY)))
    gate.wait_begun()
    client.sendall(request(transport, observation(2, session_id="b", **ACTION_ONLY)))
    fleet.until_queued(1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    fleet.until_queued(0)
    fleet.until(lambda: fleet.metric("tandem_requests_total", slot="action", outcome="cancelled") == 2)
    other = fleet.ask(fleet.client(), observation(3, **ACTION_ONLY))
    fleet.until_queued(1)
    gate.open()
    assert other.result(SECONDS)["robot"] == 3
    assert gate.asked() == [[1], [3]]


def test_what_a_quic_client_gives_up_is_not_computed(fleet: Crowd) -> None:
    """Another request of its connection is."""
    gate = fleet.action.gate
    gate.shut()
    client = fleet.client("quic")
    held = fleet.ask(fleet.client(), observation(1, **ACTION_ONLY))
    gate.wait_begun()
    with pytest.raises(ReplyTimeoutError):
        client.infer(observation(2, **ACTION_ONLY), timeout_s=0.05)
    fleet.until_queued(0)
    kept = fleet.ask(client, observation(3, **ACTION_ONLY))
    fleet.until_queued(1)
    gate.open()
    assert [held.result(SECONDS)["robot"], kept.result(SECONDS)["robot"]] == [1, 3]
    assert gate.asked() == [[1], [3]]


def test_a_client_process_that_is_killed_in_the_middle_of_an_inference(fleet: Crowd) -> None:
    gate = fleet.action.gate
    gate.shut()
    url = fleet.service.addresses["action"]
    script = f"from hosting.clients import connect; connect({url!r}, session_id='killed').infer({{'robot': 1, 'prompt': 'x', 'mode': 'action_only'}})"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment()) as process:
        gate.wait_begun()
        process.send_signal(signal.SIGKILL)
        assert process.wait(SECONDS) == -signal.SIGKILL
    fleet.until(lambda: fleet.metric("tandem_requests_total", slot="action", outcome="cancelled") == 1)
    gate.open()
    client = fleet.client(session_id="killed")
    assert client.infer(observation(2, **ACTION_ONLY))["robot"] == 2, "the robot comes back, and its session is still there"
    assert [session["requests"] for session in fleet.json("/sessions")["sessions"] if session["id"] == "killed"] == [2]


def test_a_half_open_client_is_forgotten_after_the_ping_timeout() -> None:
    """It has been asked about, and is owed an answer, when it stops: it reads nothing, answers no ping, and its connection stays."""
    with crowd(websocket=WebSocketConfig(ping_interval_s=0.05, ping_timeout_s=0.1)) as fleet, closing(raw(fleet, "websocket")) as client:
        gate = fleet.action.gate
        gate.shut()
        client.sendall(request("websocket", observation(1, **ACTION_ONLY)))
        gate.wait_begun()
        assert fleet.metric("tandem_sessions") == 1
        fleet.until(lambda: fleet.metric("tandem_sessions") == 0)
        fleet.until(lambda: fleet.metric("tandem_requests_total", slot="action", outcome="cancelled") == 1)
        gate.open()
        assert fleet.client().infer(observation(2, **ACTION_ONLY))["robot"] == 2


@pytest.mark.parametrize("transport", ["websocket", "unix"])
def test_a_client_that_does_not_read_delays_nobody_and_loses_nothing(fleet: Crowd, transport: str) -> None:
    slow = raw(fleet, transport)
    asked = [observation(robot, session_id=f"slow {robot}", padding=400_000, **ACTION_ONLY) for robot in range(1, 4)]
    for obs in asked:
        slow.sendall(request(transport, obs))
    fleet.action.gate.wait_begun()
    for other in TRANSPORTS:
        assert fleet.client(other).infer(observation(9, **ACTION_ONLY))["robot"] == 9
    received = bytearray()
    while received.count(b"server_timing") < len(asked):
        piece = slow.recv(1 << 20)
        assert piece
        received += piece
    robots = [int(number[0]) for number in re.findall(rb"\xa5robot([\x01-\x09])", bytes(received))]
    assert robots == [1, 2, 3]
    slow.close()


# --- requests that fail ----------------------------------------------------------------------------------------------------------------------


@EVERY
def test_a_policy_that_raises_fails_that_request_alone(fleet: Crowd, transport: str, caplog: pytest.LogCaptureFixture) -> None:
    client = fleet.client(transport)
    for robot in range(6):
        obs = observation(robot, **ACTION_ONLY, **({"wrong": "bug"} if robot % 3 == 2 else {}))
        if "wrong" not in obs:
            assert client.infer(obs)["robot"] == robot
            continue
        with pytest.raises(InferenceError) as caught:
            client.infer(obs)
        assert caught.value.code == "internal" and re.fullmatch(INTERNAL, str(caught.value))
        error_id = str(caught.value).split()[2].rstrip(":")
        logged = [record for record in caplog.records if error_id in record.getMessage() and record.exc_info]
        assert len(logged) == 1 and "StartledError" in str(logged[0].exc_info)
    assert fleet.metric("tandem_requests_total", slot="action", outcome="internal") == 2
    assert fleet.get("/ready")[0] == 200


@pytest.mark.parametrize(
    ("wrong", "code", "text"), [("request", "observation", r"state: missing, expected an array of numbers"), ("bug", "internal", INTERNAL)]
)
def test_a_poisoned_request_of_a_batch_is_found_and_the_others_succeed(fleet: Crowd, wrong: str, code: str, text: str) -> None:
    gate = fleet.action.gate
    gate.shut()
    asked = [fleet.ask(fleet.client(), observation(0, **ACTION_ONLY))]
    gate.wait_begun()
    for robot in range(1, 6):
        own = {"wrong": wrong} if robot == 3 else {}
        asked.append(fleet.ask(fleet.client(TRANSPORTS[robot % 3]), observation(robot, **ACTION_ONLY, **own)))
    fleet.until_queued(5)
    gate.open()
    refused = failure(asked.pop(3))
    assert refused[0] == code and re.fullmatch(text, refused[1])
    assert [future.result(SECONDS)["robot"] for future in asked] == [0, 1, 2, 4, 5]
    assert len(gate.calls[1]) == 5, "it was in their batch"
    assert sorted(robots[0] for robots in gate.asked()[2:]) == [1, 2, 3, 4, 5]


# --- the planner is down ---------------------------------------------------------------------------------------------------------------------


def test_without_a_planner_that_works_a_robot_acts_on_its_task_and_is_told(fleet: Crowd) -> None:
    fleet.planner.down = True
    reply = fleet.client().infer(observation(1))
    assert reply["asked"] == {"prompt": "fold the towel"}
    assert (reply["subtask"]["text"], reply["subtask"]["revision"]) == ("", 0) and "internal error" in reply["subtask"]["error"]
    fleet.planner.down = False
    again = fleet.client().infer(observation(1))["subtask"]
    assert again["text"] == "begin to fold the towel" and "error" not in again


def test_with_on_failure_fail_its_request_fails() -> None:
    with crowd(planner={"on_failure": "fail"}) as fleet:
        fleet.planner.down = True
        with pytest.raises(InferenceError, match=r"^internal error [0-9a-f]{8}: "):
            fleet.client().infer(observation(1))
        assert fleet.client().infer(observation(2, **ACTION_ONLY))["robot"] == 2


def test_beside_the_control_loop_the_last_subtask_is_kept_and_grows_old() -> None:
    with crowd(planner={"refresh": "async", "interval_s": 1e-6}) as fleet:
        client = fleet.client()
        first = client.infer(observation(1))["subtask"]
        fleet.planner.down = True
        client.infer(observation(1))
        fleet.until(lambda: fleet.metric("tandem_planner_refreshes_total", outcome="failed") == 1)
        kept = client.infer(observation(1))["subtask"]
        assert (kept["text"], kept["revision"], kept["waited"]) == (first["text"], first["revision"], False)
        assert "internal error" in kept["error"] and kept["age_ms"] > first["age_ms"]
        fleet.planner.down = False
        fleet.until(lambda: "error" not in client.infer(observation(1))["subtask"])


def test_a_planner_that_hangs_is_waited_for_timeout_s() -> None:
    with crowd(planner={"timeout_s": 0.05}) as fleet:
        fleet.planner.gate.shut()
        reply = fleet.client().infer(observation(1))
        assert reply["asked"] == {"prompt": "fold the towel"}
        assert "the planner" in reply["subtask"]["error"] and reply["subtask"]["text"] == ""
        fleet.planner.gate.open()


# --- too much --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["websocket", "unix"])
def test_who_sends_without_waiting_is_answered_in_order_and_only_its_newest_is_computed(fleet: Crowd, transport: str) -> None:
    gate = fleet.action.gate
    gate.shut()
    flood = raw(fleet, transport)
    for robot in range(10, 13):
        flood.sendall(request(transport, observation(robot, request_id=f"r{robot}", **ACTION_ONLY)))
        if robot == 10:
            gate.wait_begun()
    fleet.until(lambda: fleet.metric("tandem_superseded_total", slot="action") == 1)
    other = fleet.ask(fleet.client(), observation(1, **ACTION_ONLY))
    fleet.until_queued(2)
    gate.open()
    assert other.result(SECONDS)["robot"] == 1
    received = bytearray()
    while received.count(b"server_timing") < 2:
        piece = flood.recv(1 << 16)
        assert piece
        received += piece
    assert received.index(b"r10") < received.index(b"superseded") < received.index(b"r12")
    assert gate.asked()[0] == [10] and all(11 not in robots for robots in gate.asked())
    flood.close()


# --- a model that does not return ------------------------------------------------------------------------------------------------------------


def test_a_stuck_slot_is_not_ready_until_it_comes_back_and_the_other_slot_serves() -> None:
    with crowd(watchdog=WatchdogConfig(stuck_after_s=0.05, fatal_after_s=3600.0)) as fleet:
        gate = fleet.action.gate
        assert fleet.get("/ready")[0] == 200 and fleet.get("/v2/health/ready")[0] == 200
        gate.shut()
        stuck = fleet.ask(fleet.client(), observation(1, **ACTION_ONLY))
        fleet.until(lambda: fleet.get("/ready")[0] == 503)
        status = fleet.json("/ready")
        assert (status["ready"], status["slots"]) == (False, {"action": "stuck", "planner": "ready"})
        assert fleet.get("/v2/health/ready")[0] == 503 and fleet.get("/health")[0] == fleet.get("/v2/health/live")[0] == 200
        assert fleet.metric("tandem_slot_ready", slot="action") == 0
        assert fleet.client(slot="planner").infer(observation(2))["subtask"]["text"] == "begin to fold the towel"
        gate.open()
        assert stuck.result(SECONDS)["robot"] == 1
        fleet.until(lambda: fleet.get("/ready")[0] == 200)


def test_a_model_that_never_returns_ends_the_process_with_1() -> None:
    """Its requests are answered before that."""
    command = [sys.executable, "-m", "tests.e2e.hanging_server"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT) as process:
        server = ServerProcess(process)
        try:
            server.wait_ready()
            with connect(server.addresses["action"], retry_lost=False) as client, pytest.raises(InferenceError, match=INTERNAL) as caught:
                client.infer({"prompt": "x", "mode": "action_only"})
            assert caught.value.code == "internal"
            assert server.wait() == 1
        finally:
            process.kill()
            server.wait()
    order = ["stub: hanging", "the slot counts as stuck", "its requests fail", "the action is stuck; stopping", "hosting.service: stopped"]
    places = [next(index for index, line in enumerate(server.log) if text in line) for text in order]
    assert places == sorted(places), "\n".join(server.log)


def test_nothing_of_all_this_is_silent(fleet: Crowd, caplog: pytest.LogCaptureFixture) -> None:
    """Each failure has its outcome in the metrics and its line in the log."""
    client = fleet.client(session_id="watched")
    with caplog.at_level(logging.INFO, logger="hosting.requests"):
        for wrong in ("request", "bug"):
            with pytest.raises(InferenceError):
                client.infer(observation(1, wrong=wrong, **ACTION_ONLY))
    assert fleet.metric("tandem_requests_total", slot="action", outcome="observation") == 1
    assert fleet.metric("tandem_requests_total", slot="action", outcome="internal") == 1
    lines = [record.getMessage() for record in caplog.records if record.name == "hosting.requests"]
    assert [re.search(r"(refused|failed): \w+", line)[0] for line in lines] == ["refused: observation", "failed: internal"]  # type: ignore[index]
