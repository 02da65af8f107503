"""The life of the process: early clients, readiness, request modes over real sockets, live templates, drain."""

import asyncio
import gc
import logging
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK
from websockets.sync.client import connect

from hosting.clients.broker import ActionChunkBroker
from hosting.clients.client import Client
from hosting.clients.errors import ClientError, ConnectionLostError, InferenceError, TaskDoneError
from hosting.config import (
    ActionConfig,
    ActionTransportConfig,
    AdminConfig,
    PlannerConfig,
    PlannerTransportConfig,
    SchedulerConfig,
    WatchdogConfig,
)
from hosting.policy import CheckpointError, ConfigError
from hosting.protocol import msgpack_numpy
from hosting.service import Loaders, Service
from tests.serving import EchoPlanner, EchoPolicy, service_config, start, stubs


@pytest.fixture(scope="module")
def combined():
    with start(service_config(), stubs()) as service:
        yield service


def test_ready_line_names_mode_slots_and_addresses(combined):
    line = combined.service.ready_line()
    assert line.startswith("Service ready (mode=combined, slots=['action', 'planner']): ")
    assert all(address in line for address in combined.addresses.values())


def test_metadata(combined):
    with Client(combined.addresses["action"]) as client:
        metadata = client.get_server_metadata()
    assert metadata["reset_pose"] == [0.0] * 6 and metadata["action_horizon"] == 10 and metadata["server_name"] == "tandem"
    with Client(combined.addresses["planner"]) as client:
        assert client.get_server_metadata()["image_specs"] == []


@pytest.mark.parametrize("mode", [None, "", "default"])
def test_default_mode(combined, mode):
    with Client(combined.addresses["action"]) as client:
        reply = client.infer({"prompt": "tidy", **({} if mode is None else {"mode": mode})})
    assert reply["actions"].shape == (10, 14)
    assert reply["asked"] == {"prompt": "tidy. Subtask: first step of tidy"}
    assert reply["subtask"]["text"] == "first step of tidy"
    assert set(reply) == {"actions", "policy_timing", "server_timing", "subtask", "asked"}


def test_other_modes(combined):
    with Client(combined.addresses["action"]) as client:
        only = client.infer({"prompt": "tidy", "mode": "subtask_only"})
        assert set(only) == {"subtask", "server_timing"}
        acted = client.infer({"prompt": "tidy", "mode": "action_only"})
        assert "subtask" not in acted and acted["asked"] == {"prompt": "tidy"}
    with Client(combined.addresses["planner"]) as client:
        assert set(client.infer({"prompt": "tidy"})) == {"subtask", "server_timing"}


def test_timing_excludes_the_clients_idle_time(combined):
    with Client(combined.addresses["action"]) as client:
        first = client.infer({"prompt": "a"})["server_timing"]
        second = client.infer({"prompt": "a"})["server_timing"]
    assert set(first) == {"infer_ms"} and set(second) == {"infer_ms", "prev_total_ms"}
    assert second["prev_total_ms"] >= first["infer_ms"] > 0


@pytest.mark.parametrize(
    ("endpoint", "obs", "text"),
    [
        ("action", {"prompt": "x", "mode": "both"}, "mode: got 'both', expected one of default, subtask_only, action_only"),
        ("action", {"prompt": "x", "mode": 3}, "mode: got int, expected one of default, subtask_only, action_only"),
        ("action", {"prompt": "x", "mode": np.zeros(3)}, "mode: got ndarray, expected one of default, subtask_only, action_only"),
        ("action", {}, "prompt: missing, and there is no default; send the task as text, or set action.default_prompt on the server"),
        ("action", {"prompt": 7}, "prompt: got int, expected text (str, 0-d string array or UTF-8 bytes)"),
        ("action", {"prompt": b"\xff"}, "prompt: 1 bytes that are not UTF-8 (at byte 0), expected text"),
        ("planner", {"prompt": "x", "mode": "action_only"}, "mode: action_only is not served on this endpoint, which has no action policy"),
    ],
)
def test_a_bad_request_hurts_only_itself(combined, endpoint, obs, text):
    with Client(combined.addresses[endpoint]) as client:
        with pytest.raises(InferenceError) as caught:
            client.infer(obs)
        assert str(caught.value) == text
        assert client.infer({"prompt": "fine"})["subtask"]["text"] == "first step of fine"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("hello", "the request came as a text frame, expected a binary frame with a msgpack map"),
        (b"\xc1", "the message is not msgpack as openpi clients send it"),
        (b"", "the message is not msgpack as openpi clients send it"),
        (msgpack_numpy.pack([1]), "the request is a list, expected a map of observation keys to values"),
        (msgpack_numpy.pack(None), "the request is a NoneType, expected a map of observation keys to values"),
    ],
)
def test_messages_that_are_no_requests(combined, message, text):
    with connect(combined.addresses["action"], compression=None) as websocket:
        websocket.recv()
        websocket.send(message)
        answer = websocket.recv()
        assert isinstance(answer, str) and answer.startswith(text) and "\n" not in answer
        websocket.send(msgpack_numpy.pack({"prompt": "fine"}))
        assert "actions" in msgpack_numpy.unpack(websocket.recv())


def test_any_path_is_a_websocket_and_healthz_is_not(combined):
    with Client(combined.addresses["action"] + "/some/where?x=1") as client:
        assert "actions" in client.infer({"prompt": "x"})
    answer = httpx.get(combined.http("action") + "/healthz")
    assert (answer.status_code, answer.text) == (200, "OK\n") and answer.headers["content-type"].startswith("text/plain")
    other = httpx.get(combined.http("action") + "/other")
    assert other.status_code == 426 and "healthz" in other.text


def test_frames_are_not_compressed_even_if_offered(combined):
    with connect(combined.addresses["action"], compression="deflate") as websocket:
        assert "Sec-WebSocket-Extensions" not in websocket.response.headers


def test_large_messages(combined):
    with Client(combined.addresses["action"]) as client:
        assert "actions" in client.infer({"prompt": "x", "blob": np.zeros(64 << 20, np.uint8), "mode": "action_only"})


def test_live_templates(combined):
    with Client(combined.addresses["action"]) as client, httpx.Client(base_url=combined.http("admin")) as admin:
        before = admin.get("/config").json()
        try:
            changed = admin.patch(
                "/config",
                json={"action_prompt_template": "do {subtask} for {task}", "generation_prompt_format": "Q {task}", "max_generation_tokens": 5},
            )
            assert changed.status_code == 200
            reply = client.infer({"prompt": "tidy"})
            assert reply["asked"] == {"prompt": "do first step of tidy for tidy"}
            assert (reply["subtask"]["format"], reply["subtask"]["limit"]) == ("Q {task}", 5)
            refused = admin.patch("/config", json={"action_prompt_template": "do nothing"})
            assert refused.status_code == 422 and "{subtask}" in refused.json()["detail"]
            assert client.infer({"prompt": "tidy"})["asked"] == {"prompt": "do first step of tidy for tidy"}
        finally:
            admin.patch("/config", json={key: before[key] for key in ("action_prompt_template", "generation_prompt_format", "max_generation_tokens")})


def test_admin_health(combined):
    assert httpx.get(combined.http("admin") + "/health").json() == {"status": "ok", "mode": "combined", "slots": ["action", "planner"]}


def test_many_clients_get_their_own_answers(combined):
    answers: dict[str, str] = {}

    def robot(name):
        with Client(combined.addresses["action"]) as client:
            for i in range(20):
                answers[f"{name}{i}"] = client.infer({"prompt": f"{name}{i}", "mode": "action_only"})["asked"]["prompt"]

    threads = [threading.Thread(target=robot, args=(name,)) for name in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 120 and all(asked == got for asked, got in answers.items())


def test_internal_error_has_an_id_that_the_log_has(caplog):
    def fail(obs):
        if obs["prompt"] == "bad":
            raise ZeroDivisionError("secret detail")

    with start(service_config("action"), stubs(EchoPolicy(fail))) as service, Client(service.addresses["action"]) as client:
        with pytest.raises(InferenceError, match=r"internal error ([0-9a-f]{8}): ") as caught:
            client.infer({"prompt": "bad"})
        assert "secret" not in str(caught.value) and "Traceback" not in str(caught.value)
        assert "actions" in client.infer({"prompt": "good"})
    error_id = str(caught.value).split()[2].rstrip(":")
    logged = [record for record in caplog.records if record.levelno == logging.ERROR and error_id in record.getMessage()]
    assert len(logged) == 1 and logged[0].exc_info is not None and logged[0].exc_info[0] is ZeroDivisionError


def test_a_planner_that_fails(caplog):
    def fail(obs):
        raise RuntimeError("secret")

    with start(service_config(), stubs(planner=EchoPlanner(fail))) as service, Client(service.addresses["action"]) as client:
        reply = client.infer({"prompt": "tidy"})
        assert reply["asked"] == {"prompt": "tidy"} and reply["subtask"]["text"] == ""
        assert "internal error" in reply["subtask"]["error"] and "secret" not in reply["subtask"]["error"]
        with pytest.raises(InferenceError, match="internal error"):
            client.infer({"prompt": "tidy", "mode": "subtask_only"})
        assert "actions" in client.infer({"prompt": "tidy", "mode": "action_only"})


def test_nothing_left_to_do_over_every_transport(tmp_path: Path) -> None:
    acted: list[Any] = []

    def transport(kind: type, name: str) -> Any:
        return kind(websocket_port=0, quic_port=0, unix_socket_path=str(tmp_path / name))

    config = service_config(
        planner=PlannerConfig(checkpoint_dir="unused", done_subtasks=["First step of rest."]),
        action_transport=transport(ActionTransportConfig, "a.sock"),
        planner_transport=transport(PlannerTransportConfig, "p.sock"),
        quic_certificate_dir=str(tmp_path),
    )
    done, going = {"prompt": "rest"}, {"prompt": "tidy"}
    with start(config, stubs(EchoPolicy(lambda obs: acted.append(obs["prompt"])))) as service:
        for transport_name in ("", " quic", " unix"):
            with Client(service.addresses[f"action{transport_name}"], verify=not transport_name) as client:
                reply = client.infer(done)
                assert set(reply) == {"subtask", "server_timing"} and reply["subtask"]["text"] == "first step of rest"
                assert reply["subtask"]["done"] is True and client.infer({**done, "mode": "subtask_only"})["subtask"]["done"] is True
                reply = client.infer(going)
                assert reply["subtask"]["done"] is False and reply["actions"].shape == (10, 14)
                reply = client.infer_batch([going, done])
                assert reply["actions"][0].shape == (10, 14) and reply["actions"][1] is None
                with pytest.raises(TaskDoneError, match="nothing is left to do"):
                    ActionChunkBroker(client, 10).infer(done)
                assert "subtask" not in client.infer({**done, "mode": "action_only"})
            with Client(service.addresses[f"planner{transport_name}"], verify=not transport_name) as client:
                assert [client.infer(obs)["subtask"]["done"] for obs in (done, going)] == [True, False]
        with Client(service.addresses["action"] + "/openpi/policy") as client:
            assert client.infer(going)["actions"].dtype == np.float32
            with pytest.raises(TaskDoneError, match="nothing is left to do"):
                client.infer(done)
        with connect(service.addresses["action"] + "/?reply=array") as stock:
            stock.recv()
            stock.send(msgpack_numpy.pack(done))
            assert stock.recv() == "nothing is left to do, the planner says 'first step of rest', so there are no actions; stop"
        metrics = httpx.get(service.http("admin") + "/metrics").text
    assert not any("first step of rest" in prompt for prompt in acted) and acted.count("rest") == 3
    assert "tandem_subtask_done_total 17.0" in metrics.splitlines()
    assert 'tandem_requests_total{mode="default",outcome="done",slot="action"} 2.0' in metrics.splitlines()


@pytest.mark.parametrize(
    ("slots", "refused"),
    [
        (("action",), "mode: subtask_only is not served on this endpoint, which has no planner"),
        (("planner",), "mode: action_only is not served on this endpoint"),
    ],
)
def test_single_slots(slots, refused):
    with start(service_config(*slots), stubs()) as service:
        assert service.service.config.mode == f"{slots[0]}_only"
        assert "admin" in service.addresses
        with Client(service.addresses[slots[0]]) as client:
            assert slots[0] in ("action", "planner") and client.infer({"prompt": "x"})
            with pytest.raises(InferenceError, match=refused):
                client.infer({"prompt": "x", "mode": "subtask_only" if slots == ("action",) else "action_only"})


def test_early_clients_are_held_until_ready():
    load = threading.Event()

    def slow(config):
        assert load.wait(30)
        return EchoPolicy()

    with start(service_config("action"), Loaders(slow, slow), wait_ready=False) as service:
        answers = []
        with connect(service.addresses["action"], compression=None) as early:
            health = httpx.get(service.http("action") + "/healthz")
            assert (health.status_code, health.text) == (503, "starting\n")
            early.ping().wait(10)
            with pytest.raises(TimeoutError):
                early.recv(timeout=0)
            load.set()
            answers.append(msgpack_numpy.unpack(early.recv(timeout=30))["action_horizon"])
        assert answers == [10]


def test_a_slot_that_cannot_load_ends_the_service_and_lets_early_clients_go(caplog):
    load = threading.Event()

    def broken(config):
        assert load.wait(30)
        raise CheckpointError("no such checkpoint")

    with start(service_config("action"), Loaders(broken, broken), wait_ready=False) as service:
        with connect(service.addresses["action"], compression=None) as early:
            load.set()
            with pytest.raises((ConnectionClosedError, ConnectionClosedOK)) as closed:
                early.recv(timeout=30)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            service.wait_stopped()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_stopping_while_it_loads_lets_early_clients_go(caplog):
    load = threading.Event()

    def slow(config):
        assert load.wait(30)
        return EchoPolicy()

    with start(service_config("action"), Loaders(slow, slow), wait_ready=False) as service:
        with connect(service.addresses["action"], compression=None) as early:
            service.stop()
            with pytest.raises((ConnectionClosedError, ConnectionClosedOK)) as closed:
                early.recv(timeout=30)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
        assert service.wait_stopped() == 0
        load.set()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("host", "reason"), [("no-such-host.invalid", r"\w[\w ]+"), ("é" * 80, "encoding of hostname failed")], ids=["unknown", "impossible"]
)
def test_a_host_that_is_none_is_one_readable_error(host, reason):
    message = rf"^action_transport.websocket_port: cannot listen on {host} port 0 \({reason}\); stop what uses it, or choose another port or host$"
    with pytest.raises(ConfigError, match=message) as caught, start(service_config("action", host=host), stubs()):
        pass
    assert "Unknown error" not in str(caught.value)


def test_a_port_in_use_is_one_readable_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = service_config("action", action_transport=ActionTransportConfig(websocket_port=port, quic_port=None, unix_socket_path=None))
        message = rf"action_transport.websocket_port: cannot listen on 127.0.0.1 port {port} \(Address already in use\); stop what uses it"
        with pytest.raises(ConfigError, match=message), start(config, stubs()):
            pass


def test_drain_finishes_what_is_in_flight_and_takes_nothing_new():
    working, finish = threading.Event(), threading.Event()

    def hook(obs):
        working.set()
        assert finish.wait(30)

    with start(service_config("action"), stubs(EchoPolicy(hook))) as service:
        idle = connect(service.addresses["action"], compression=None, legacy=True)
        idle.recv()
        busy = Client(service.addresses["action"])
        replies = []
        thread = threading.Thread(target=lambda: replies.append(busy.infer({"prompt": "x"})))
        thread.start()
        assert working.wait(30)
        service.stop()
        with pytest.raises((ConnectionClosedError, ConnectionClosedOK)) as closed:  # the idle one is closed at once
            idle.recv(timeout=30)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
        finish.set()
        thread.join(30)
        assert replies[0]["actions"].shape == (10, 14), "the accepted request was answered"
        with pytest.raises(ClientError):
            busy.infer({"prompt": "z"})
        assert service.wait_stopped() == 0


async def test_a_refresh_that_nobody_waits_for_does_not_hold_up_the_end_nor_meet_an_interpreter_that_ends(monkeypatch):
    entered, released, exits = threading.Event(), threading.Event(), []

    def plan(obs):
        if obs["prompt"] == "refresh":
            entered.set()
            assert released.wait(60)

    monkeypatch.setattr("hosting.service._exit_now", exits.append)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    config = service_config(planner=PlannerConfig(checkpoint_dir="unused", refresh="async", interval_s=1e-6, on_task_change="keep"))
    service = Service(config, loaders=stubs(planner=EchoPlanner(plan)))
    serving = asyncio.create_task(service.serve())
    await service.ready.wait()

    def robot():
        with Client(service.addresses["action"]) as client:
            assert client.infer({"prompt": "tidy"})["subtask"]["waited"]
            assert not client.infer({"prompt": "refresh"})["subtask"]["waited"]

    await asyncio.to_thread(robot)
    assert await asyncio.to_thread(entered.wait, 30)
    service.stop()
    assert await asyncio.wait_for(serving, 30) == 0 and exits == [0]
    released.set()


def test_drain_gives_up_after_drain_s():
    working, finish = threading.Event(), threading.Event()

    def hook(obs):
        working.set()
        assert finish.wait(30)

    with start(service_config("action", drain_s=0.0), stubs(EchoPolicy(hook))) as service:
        client = Client(service.addresses["action"], retry_lost=False)
        outcomes = []

        def robot():
            try:
                outcomes.append(client.infer({"prompt": "x"}))
            except ConnectionLostError as lost:
                outcomes.append(lost)

        thread = threading.Thread(target=robot)
        thread.start()
        assert working.wait(30)
        service.stop()
        assert service.wait_stopped() == 1
        finish.set()
        thread.join(30)
        assert isinstance(outcomes[0], ConnectionLostError)


def test_a_client_that_connects_while_the_server_drains_is_told_to_go():
    working, finish = threading.Event(), threading.Event()

    def hook(obs):
        working.set()
        assert finish.wait(30)

    with start(service_config("action"), stubs(EchoPolicy(hook))) as service, Client(service.addresses["action"]) as busy:
        replies = []
        thread = threading.Thread(target=lambda: replies.append(busy.infer({"prompt": "x"})))
        thread.start()
        assert working.wait(30)
        with connect(service.addresses["action"], compression=None) as idle:
            idle.recv()
            service.stop()
            with pytest.raises((ConnectionClosedError, ConnectionClosedOK)):  # now the server drains
                idle.recv(timeout=30)
        with connect(service.addresses["action"], compression=None) as late, pytest.raises((ConnectionClosedError, ConnectionClosedOK)) as closed:
            late.recv(timeout=30)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
        assert httpx.get(service.http("action") + "/healthz").text == "shutting down\n"
        finish.set()
        thread.join(30)
        assert "actions" in replies[0]
        assert service.wait_stopped() == 0


def test_an_endpoint_that_breaks_down_ends_the_service_with_1(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transport = ActionTransportConfig(websocket_port=0, quic_port=0, unix_socket_path=None)
    with start(service_config("action", action_transport=transport, quic_certificate_dir=str(tmp_path)), stubs()) as service:
        quic = service.service._listeners["action quic"]

        def break_down(received: Any, now: float) -> None:
            raise RuntimeError("a bug of ours")

        quic._router.receive = break_down  # type: ignore[attr-defined]
        host, port = service.addresses["action quic"].removeprefix("quic://").split(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", (host, int(port)))
        assert service.wait_stopped() == 1
    assert any("an endpoint broke down (a bug of ours); stopping" in record.message for record in caplog.records)


def test_the_admin_port_is_served_in_every_mode_and_tells_what_each_slot_does():
    for slots in (("action",), ("planner",), ("action", "planner")):
        with start(service_config(*slots), stubs()) as service:
            with Client(service.addresses[slots[0]]) as client:
                client.infer({"prompt": "tidy", "session_id": "robot"})
            admin = service.addresses["admin"]
            assert httpx.get(f"{admin}/ready").json()["slots"] == dict.fromkeys(slots, "ready")
            details = httpx.get(f"{admin}/slots").json()
            assert sorted(details.get("slots", details)) == sorted(slots)
            assert f'tandem_requests_total{{mode="default",outcome="ok",slot="{slots[0]}"}} 1.0' in httpx.get(f"{admin}/metrics").text
            assert "robot" in httpx.get(f"{admin}/sessions").text
            assert httpx.get(f"{admin}/config").status_code == (200 if "planner" in slots else 404)


def test_no_admin_port_where_none_is_wanted():
    with start(service_config("action", admin=AdminConfig(port=None)), stubs()) as service:
        assert "admin" not in service.addresses


def test_a_stuck_model_ends_readiness_and_then_the_service_with_1():
    entered, released = threading.Event(), threading.Event()

    def hang(obs):
        entered.set()
        assert released.wait(60)

    config = service_config(watchdog=WatchdogConfig(stuck_after_s=0.01, fatal_after_s=1.5), drain_s=30.0)
    with start(config, stubs(EchoPolicy(hang))) as service, Client(service.addresses["action"]) as client:
        asking = threading.Thread(target=lambda: errors.append(refused(client)))
        errors: list[str] = []
        asking.start()
        assert entered.wait(30)
        while (status := httpx.get(f"{service.addresses['admin']}/ready")).status_code == 200:
            pass
        assert status.json()["slots"] == {"action": "stuck", "planner": "ready"}
        assert httpx.get(f"{service.addresses['admin']}/health").status_code == 200
        with Client(service.addresses["planner"]) as other:
            assert other.infer({"prompt": "sweep"})["subtask"]["text"] == "first step of sweep"
        assert service.wait_stopped() == 1
        asking.join(30)
        assert errors[0].startswith("internal error ")
        released.set()


def refused(client):
    with pytest.raises(InferenceError) as error:
        client.infer({"prompt": "x", "mode": "action_only"})
    return str(error.value)


def test_a_stuck_model_that_returns_is_ready_again():
    entered, released = threading.Event(), threading.Event()

    def hang(obs):
        entered.set()
        assert released.wait(60)

    config = service_config("action", watchdog=WatchdogConfig(stuck_after_s=0.01, fatal_after_s=None))
    with start(config, stubs(EchoPolicy(hang))) as service, Client(service.addresses["action"]) as client:
        replies = []
        asking = threading.Thread(target=lambda: replies.append(client.infer({"prompt": "x"})))
        asking.start()
        assert entered.wait(30)
        while httpx.get(f"{service.addresses['admin']}/ready").status_code == 200:
            pass
        released.set()
        asking.join(30)
        assert replies and httpx.get(f"{service.addresses['admin']}/ready").status_code == 200


def test_changes_that_were_kept_are_in_force_after_a_restart(tmp_path):
    config = service_config(admin=AdminConfig(port=0, settings_file=str(tmp_path / "settings.json")))
    with start(config, stubs()) as service:
        httpx.patch(f"{service.addresses['admin']}/config", json={"action_prompt_template": "now {subtask}"}).raise_for_status()
    with start(config, stubs()) as service, Client(service.addresses["action"]) as client:
        reply = client.infer({"prompt": "tidy"})
        assert reply["asked"] == {"prompt": "now first step of tidy"} and reply["subtask"]["template_revision"] == 2


def test_a_settings_file_that_cannot_be_used_is_one_readable_error(tmp_path):
    (tmp_path / "settings.json").write_text("{")
    with (
        pytest.raises(ConfigError, match=r"^admin\.settings_file: "),
        start(service_config(admin=AdminConfig(port=0, settings_file=str(tmp_path / "settings.json"))), stubs()),
    ):
        pass


def test_the_slots_own_deadline_is_that_of_requests_that_bring_none():
    entered, released = threading.Event(), threading.Event()

    def hold(obs):
        entered.set()
        assert released.wait(60)

    action = ActionConfig(model_config_name="unused", checkpoint_dir="unused", scheduler=SchedulerConfig(deadline_ms=1.0))
    with (
        start(service_config("action", action=action), stubs(EchoPolicy(hold))) as service,
        Client(service.addresses["action"]) as first,
        Client(service.addresses["action"]) as second,
    ):
        asking = threading.Thread(target=lambda: first.infer({"prompt": "x", "deadline_ms": 60_000}))
        asking.start()
        assert entered.wait(30)
        with pytest.raises(InferenceError, match=r"^deadline_ms: passed \d+ ms before the action's turn came; nothing was computed$"):
            second.infer({"prompt": "y"})
        released.set()
        asking.join(30)
