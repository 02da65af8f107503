"""The clients of other projects against a real server: each of them gets its answers without a change (reference/peers.md §1.11, §6)."""

from __future__ import annotations

import datetime
import ipaddress
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from hosting.config import ActionTransportConfig, RoboArenaConfig, TLSConfig, WebSocketConfig
from hosting.policy import ObservationError
from pi0.prompt import prompt_text
from tests.e2e.peers import dreamzero, isaaclab_arena, lerobot, molmospaces, openpi_codec, roboarena, robolab, sim_evals, vllm_omni
from tests.e2e.peers.openpi import OpenPIClient
from tests.serving import RunningService, service_config, start, stubs

HORIZON, WIDTH = 24, 8
ARENA = RoboArenaConfig(
    image_resolution="180x320", n_external_cameras=2, needs_wrist_camera=True, needs_session_id=True, action_space="joint_position"
)
KEY = "correct horse battery staple"


class ArmPolicy:
    """As strict about task and state as a real one; its actions tell whose request they answer: seven joints, then the seed."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {
            "action_horizon": HORIZON,
            "image_specs": [{"path": ["observation/wrist_image_left"], "target_shape": [224, 224, 3], "dtype": "uint8"}],
        }
        self.default_prompt: str | None = None
        self.batches: list[int] = []
        self.seen: list[Mapping[str, Any]] = []
        self.hold: Callable[[], object] = lambda: None

    def infer(self, obs: Mapping[str, Any], *, seed: int | None = None) -> dict[str, Any]:
        return self.infer_batch([obs], seeds=[seed])[0]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], *, seeds: Sequence[int | None] | None = None) -> list[dict[str, Any]]:
        self.hold()
        self.batches.append(len(observations))
        self.seen = list(observations)
        return [self._reply(obs, seed) for obs, seed in zip(observations, seeds or [None] * len(observations), strict=True)]

    def _reply(self, obs: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
        actions = np.zeros((HORIZON, WIDTH))
        actions[:, :7] = _joints(obs)
        actions[:, 7] = seed or 0
        return {"actions": actions, "policy_timing": {"infer_ms": 1.0}, "asked": prompt_text(obs)}


def _joints(obs: Mapping[str, Any]) -> np.ndarray:
    if "observation/joint_position" in obs:
        return np.asarray(obs["observation/joint_position"])
    if isinstance(obs.get("state"), Mapping):
        return np.concatenate([obs["state"][name] for name in ("x", "y", "z", "roll", "pitch", "yaw")] + [obs["state"]["gripper"][:1]])
    raise ObservationError("observation/joint_position: missing, expected [7] numbers (joint angles)")


@pytest.fixture(scope="module")
def policy() -> ArmPolicy:
    return ArmPolicy()


@pytest.fixture(scope="module")
def server(policy: ArmPolicy) -> Iterator[RunningService]:
    """A combined service as it comes, told what its robot is."""
    with start(service_config(roboarena=ARENA), stubs(policy)) as service:
        yield service


@pytest.fixture(scope="module")
def arena_server(policy: ArmPolicy) -> Iterator[RunningService]:
    """The same for clients that know neither path nor query: RoboArena's dialect is the default."""
    config = service_config(roboarena=ARENA, websocket=WebSocketConfig(profile="roboarena"))
    with start(config, stubs(policy)) as service:
        yield service


@pytest.fixture
def joints() -> np.ndarray:
    return np.arange(1, 8, dtype=np.float32) / 8


def host_port(service: RunningService, slot: str = "action") -> tuple[str, int]:
    host, port = service.addresses[slot].removeprefix("ws://").split(":")
    return host, int(port)


def url(service: RunningService, rest: str = "", slot: str = "action") -> str:
    return service.addresses[slot] + rest


def asked(reply: Mapping[str, Any]) -> str:
    return reply["asked"]


# -- openpi ------------------------------------------------------------------------------------------------------------------------------


def test_openpi_client_of_the_repository(server, joints):
    with closing(OpenPIClient(*host_port(server))) as client:
        assert client.get_server_metadata()["action_horizon"] == HORIZON
        reply = client.infer({"observation/joint_position": joints, "prompt": "tidy"})
        assert reply["actions"].dtype == np.float64 and reply["actions"].shape == (HORIZON, WIDTH)
        assert set(reply["server_timing"]) == {"infer_ms"} and reply["subtask"]["text"] == "first step of tidy"
        assert [key for key, value in reply.items() if isinstance(value, np.ndarray)] == ["actions"], "a chunk broker indexes every array"
        with pytest.raises(RuntimeError, match="observation/joint_position: missing"):
            client.infer({"prompt": "tidy"})
        again = client.infer({"observation/joint_position": joints, "prompt": "tidy"})
        np.testing.assert_array_equal(again["actions"], reply["actions"])


@pytest.mark.parametrize("rest", ["", "/", "/robots/7", "/?profile=openpi", "/any/path?profile=openpi"])
def test_full_url_without_a_port(server, joints, rest):
    with closing(OpenPIClient(url(server, rest), None)) as client:
        assert client.get_server_metadata()["server_name"] == "tandem"
        assert client.infer({"observation/joint_position": joints, "prompt": "tidy"})["actions"].shape == (HORIZON, WIDTH)


def test_compression_is_declined(server):
    """LeRobot's client offers it, as the library does unless told otherwise."""
    with connect(url(server)) as websocket:
        assert not websocket.protocol.extensions


@pytest.mark.parametrize("seeded", [{"seed": 5}, {"seed": np.int64(5)}, {"sampling_params": {"seed": 5}}])
def test_a_seed_in_both_places(server, joints, seeded):
    with closing(OpenPIClient(url(server))) as client:
        assert client.infer({"observation/joint_position": joints, "prompt": "x", **seeded})["actions"][0, 7] == 5


def test_a_handshake_that_says_nothing(server, joints):
    with connect(url(server, "/?profile=empty"), compression=None) as websocket:
        assert websocket.recv() == b"\x80"
        websocket.send(openpi_codec.pack({"observation/joint_position": joints, "prompt": "tidy"}))
        assert "actions" in openpi_codec.unpack(websocket.recv())


@pytest.mark.parametrize(
    ("headers", "welcome"),
    [
        ({"Authorization": f"Api-Key {KEY}"}, True),
        ({"Authorization": f"Bearer {KEY}"}, True),
        ({"X-API-Key": KEY}, True),
        ({"Authorization": "Api-Key wrong"}, False),
        ({"Authorization": "Bearer wrong"}, False),
        ({"Authorization": f"Basic {KEY}"}, False),
        ({}, False),
    ],
)
def test_both_schemes_of_keys(keyed_server, headers, welcome):
    if welcome:
        with connect(url(keyed_server), compression=None, additional_headers=headers) as websocket:
            assert openpi_codec.unpack(websocket.recv())["server_name"] == "tandem"
        return
    with pytest.raises(InvalidStatus) as caught:
        connect(url(keyed_server), compression=None, additional_headers=headers)
    assert caught.value.response.status_code == 401


@pytest.fixture(scope="module")
def keyed_server(policy: ArmPolicy) -> Iterator[RunningService]:
    with start(service_config("action", api_key=KEY, roboarena=ARENA), stubs(policy)) as service:
        yield service


# -- RoboArena and DreamZero -------------------------------------------------------------------------------------------------------------


def test_roboarena(arena_server):
    with closing(roboarena.RoboArenaClient(*host_port(arena_server))) as client:
        assert set(client.get_server_metadata()) == set(vllm_omni.REQUIRED)
        np.testing.assert_array_equal(
            roboarena.check_policy_server(client)[0, :7],
            roboarena.observation(roboarena.PolicyServerConfig(**client.get_server_metadata()), np.random.default_rng(0))[
                "observation/joint_position"
            ],
        )
        assert client.reset() == "reset successful"
        with pytest.raises(RuntimeError, match="observation/joint_position: missing"):
            client.infer({"prompt": "x"})


def test_roboarena_counts_its_only_camera_from_zero(policy, joints):
    config = service_config("action", roboarena=RoboArenaConfig(action_space="joint_position", n_external_cameras=1))
    with start(config, stubs(policy)) as service, connect(url(service, "/?profile=roboarena"), compression=None) as websocket:
        websocket.recv()
        image = np.full((2, 2, 3), 7, np.uint8)
        websocket.send(
            openpi_codec.pack({"observation/exterior_image_0_left": image, "observation/joint_position": joints, "prompt": "x", "endpoint": "infer"})
        )
        assert "actions" in openpi_codec.unpack(websocket.recv())
    np.testing.assert_array_equal(policy.seen[0]["observation/exterior_image_1_left"], image)


@pytest.mark.parametrize("rest", ["/?profile=roboarena", vllm_omni.PATH])
def test_the_first_of_two_cameras_is_the_one_that_openpi_counts_from_one(server, policy, joints, rest):
    with connect(url(server, rest), compression=None) as websocket:
        websocket.recv()
        obs = dreamzero.observation(joints, frames=1, session_id="a")
        websocket.send(openpi_codec.pack({**obs, "endpoint": "infer"}))
        websocket.recv()
    np.testing.assert_array_equal(policy.seen[0]["observation/exterior_image_1_left"], obs["observation/exterior_image_0_left"])


def test_a_profile_that_cannot_be_served_says_what_to_set(policy):
    with start(service_config("action"), stubs(policy)) as service, connect(url(service, "/?profile=roboarena"), compression=None) as websocket:
        text = websocket.recv()
        assert isinstance(text, str) and "action_space" in text and "roboarena" in text
        with pytest.raises(ConnectionClosedError) as caught:
            websocket.recv()
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1011


def test_dreamzero_run_sim_eval(arena_server, joints):
    with closing(dreamzero.DreamZeroClient(*host_port(arena_server))) as client:
        chunks = dreamzero.run_sim_eval(client, joints)
    assert len(chunks) == 4
    assert all((chunk[:, :7] == joints).all() and chunk.shape == (HORIZON, WIDTH) for chunk in chunks)


def test_dreamzero_test_client_ar(server, joints):
    """It takes a host and a port and no path, so the query travels in the host, and the port that the client appends in the last value."""
    host, port = host_port(server)
    with closing(dreamzero.DreamZeroClient(f"{host}:{port}/?profile=roboarena&reply=array&response_key=any", port)) as client:
        chunks = dreamzero.run_ar_check(client, joints)
    assert all((chunk[:, :7] == joints).all() and chunk.dtype == np.float32 for chunk in chunks)


def test_dreamzero_finds_a_server_with_tls(policy, joints, tmp_path, monkeypatch):
    certificate, key = _certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    config = service_config(
        "action", roboarena=ARENA, websocket=WebSocketConfig(profile="roboarena"), tls=TLSConfig(certificate=str(certificate), private_key=str(key))
    )
    with start(config, stubs(policy)) as service:
        assert service.addresses["action"].startswith("wss://")
        host, port = service.addresses["action"].removeprefix("wss://").split(":")
        with closing(dreamzero.DreamZeroClient(host, int(port))) as client:
            assert len(dreamzero.run_sim_eval(client, joints, episodes=1)) == 2


def _certificate(directory: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = directory / "cert.pem", directory / "key.pem"
    paths[0].write_bytes(built.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    return paths


# -- vllm-omni, SGLang, LeRobot ----------------------------------------------------------------------------------------------------------


def test_vllm_omni_example(server, joints):
    host, port = host_port(server)
    with closing(vllm_omni.ExampleClient(host=host, port=port)) as client:
        chunks = vllm_omni.run_policy_session(client, joints, session_id="a")
        assert all((chunk[:, :7] == joints).all() for chunk in chunks)
        with pytest.raises(RuntimeError, match="Inference failed: observation/joint_position: missing"):
            client.infer({"prompt": "x"})
        assert client.infer(dreamzero.observation(joints, frames=1, session_id="a")).shape == (HORIZON, WIDTH), "the socket is still good"


def test_vllm_omni_example_takes_a_reset_in_text_as_well(server, joints):
    host, port = host_port(server)
    with closing(vllm_omni.ExampleClient(host=host, port=port, path=f"{vllm_omni.PATH}?profile=roboarena&reply=array")) as client:
        assert len(vllm_omni.run_policy_session(client, joints, session_id="a")) == 3


def test_vllm_omni_droid_sim_eval(server, joints):
    host, port = host_port(server)
    with closing(vllm_omni.DroidSimEvalClient(host=host, port=port, path=f"{vllm_omni.PATH}?profile=roboarena&reply=array")) as client:
        assert len(vllm_omni.run_policy_session(client, joints, session_id="a")) == 3


def test_vllm_errors_name_the_kind(server):
    with connect(url(server, vllm_omni.PATH), compression=None) as websocket:
        websocket.recv()
        websocket.send(openpi_codec.pack({"prompt": "x", "request_id": "r-7"}))
        assert openpi_codec.unpack(websocket.recv()) == {
            "type": "error",
            "code": "observation",
            "message": "observation/joint_position: missing, expected [7] numbers (joint angles)",
            "request_id": "r-7",
        }
        websocket.send(b"\xc1")
        broken = openpi_codec.unpack(websocket.recv())
        assert broken["type"] == "error" and broken["code"] == "message"


def test_sglang_alias_path(server, joints):
    with closing(vllm_omni.ExampleClient(host=host_port(server)[0], port=host_port(server)[1], path="/openpi/policy")) as client:
        chunk = client.infer({"observation/joint_position": joints, "prompt": "x"})
    assert chunk.shape == (HORIZON, WIDTH) and (chunk[:, :7] == joints).all()


def test_lerobot_wants_named_arrays(server, joints):
    state = np.concatenate([joints[:6], [0.5, -0.5]])
    remote = lerobot.VllmPolicy(url(server), ws_path=f"{vllm_omni.PATH}?reply=arrays")
    assert remote.handshake()["image_resolution"] == [180, 320]
    for call in range(3):
        actions = remote.infer(state, "tidy", session_id="s", seed=call)
        assert set(actions) == {"actions"} and actions["actions"].shape == (HORIZON, WIDTH)
        np.testing.assert_allclose(actions["actions"][0], [*state[:7], call], rtol=1e-6)
    with pytest.raises(RuntimeError, match=r"vLLM server error: prompt: got int"):
        remote.infer(state, 7, session_id="s")  # type: ignore[arg-type]


def test_lerobot_at_the_bare_path_says_what_it_got(server, joints):
    """Its own complaint, not ours: the address above is the one for it."""
    with pytest.raises(RuntimeError, match="must return a dict of ndarrays; got ndarray"):
        lerobot.VllmPolicy(url(server)).infer(np.concatenate([joints, [0.0]]), "tidy", session_id="s")


# -- simulators --------------------------------------------------------------------------------------------------------------------------


def test_sim_evals(server, joints, policy):
    with closing(sim_evals.DroidJointPosClient(*host_port(server))) as client:
        before = len(policy.batches)
        actions = [client.infer(joints + step, "pick") for step in range(2 * sim_evals.OPEN_LOOP_HORIZON)]
    assert len(policy.batches) - before == 2
    np.testing.assert_array_equal(np.stack(actions)[:8, :7], np.tile(joints, (8, 1)))
    np.testing.assert_array_equal(np.stack(actions)[8:, :7], np.tile(joints + 8, (8, 1)))


def test_molmospaces_pi_policy(server, joints):
    with closing(molmospaces.PiPolicy(*host_port(server))) as client:
        for step in range(10):
            action = client.action(joints, "Pick Up")
            np.testing.assert_array_equal(action["arm"], joints)
            assert action["gripper"] == 0.0, step


@pytest.mark.parametrize("service", ["server", "arena_server"])
def test_molmospaces_dreamzero_policy(service, joints, request):
    with closing(molmospaces.DreamZeroPolicy(*host_port(request.getfixturevalue(service)))) as client:
        for offset in range(3):
            actions = client.infer(joints + offset, "stack")
            assert isinstance(actions, np.ndarray) and actions.shape == (HORIZON, WIDTH) and actions.dtype == np.float64
            np.testing.assert_array_equal(actions[0, :7], joints + offset)
            assert client.reset() == "reset successful"


def test_molmospaces_websocket_policy(server, joints):
    with closing(molmospaces.WebsocketPolicy(url(server))) as client:
        assert isinstance(client.metadata, dict)
        for _ in range(2):
            reply = client.infer(joints, "open the drawer")
            np.testing.assert_array_equal(reply["actions"][0, :7], joints)
            assert asked(reply) == "open the drawer. Subtask: first step of open the drawer"
            client.reset()


def test_pypi_scalars_and_arrays_in_one_message(server, joints):
    """What only the package writes: no kind, and scalars as their bytes."""
    with connect(url(server), compression=None) as websocket:
        websocket.recv()
        obs = {"observation/joint_position": joints, "observation/gripper": np.float32(0.25), "seed": np.int64(5), "prompt": "x"}
        websocket.send(molmospaces.pack(obs))
        reply = molmospaces.unpack(websocket.recv())
        np.testing.assert_array_equal(reply["actions"][0], [*joints, 5])
        websocket.send(molmospaces.pack({"observation/joint_position": np.array([None] * 7), "prompt": "x"}))
        refused = websocket.recv()
        assert isinstance(refused, str) and refused.startswith("Unsupported dtype")


def test_two_dialects_side_by_side(server, joints):
    """The dialect is the connection's, not the server's."""
    with connect(url(server), compression=None) as pypi, connect(url(server), compression=None) as openpi:
        for websocket, codec in ((pypi, molmospaces), (openpi, openpi_codec)):
            websocket.recv()
            websocket.send(codec.pack({"observation/joint_position": joints, "prompt": "x"}))
        for websocket, codec in ((openpi, openpi_codec), (pypi, molmospaces)):
            np.testing.assert_array_equal(codec.unpack(websocket.recv())["actions"][0, :7], joints)


def test_robolab_pi0_with_several_environments(server, joints):
    with closing(robolab.Pi0Client(url(server))) as client:
        for _ in range(9):
            for env in range(3):
                np.testing.assert_array_equal(client.infer(joints + env, "sort", env_id=env)[:7], joints + env)


@pytest.mark.parametrize("rest", ["/?response_key=action", "/?profile=empty&response_key=action", f"{vllm_omni.PATH}?reply=map&response_key=action"])
def test_robolab_cosmos3(server, joints, rest):
    with closing(robolab.Cosmos3Client(url(server, rest))) as client:
        actions = client.infer(joints, "sort")
    assert actions.shape == (HORIZON, WIDTH) and (actions[:, :7] == joints).all()


@pytest.mark.parametrize("rest", ["", "/?profile=roboarena", "/?profile=roboarena&reply=array", "/?reply=array"])
def test_robolab_dreamzero_keeps_many_sessions_on_one_socket(keyed_server, joints, rest):
    with closing(robolab.DreamZeroClient(url(keyed_server, rest), KEY)) as client:
        sessions = [f"env-{index}" for index in range(4)]
        for round_ in range(3):
            for index, session in enumerate(sessions):
                chunk = client.infer(joints + 10 * index + round_, "sort", session_id=session)
                np.testing.assert_array_equal(chunk[0, :7], joints + 10 * index + round_)
        assert client.reset(sessions[:2]) == "reset successful"
        assert client.reset() == "reset successful"
        assert client.infer(joints, "sort", session_id=sessions[0]).shape == (HORIZON, WIDTH)


@pytest.mark.parametrize("ping", [{}, {"ping_interval": None, "ping_timeout": None}, {"ping_interval": 60.0, "ping_timeout": 300.0}])
def test_isaaclab_arena(server, joints, ping):
    environments = np.stack([joints + index for index in range(3)])
    remote = isaaclab_arena.RemoteChunkReplayPolicy(*host_port(server), open_loop_horizon=10, action_dim=WIDTH, **ping)
    with closing(remote):
        for _ in range(12):
            np.testing.assert_array_equal(remote.get_action(environments, "push")[:, :7], environments)


# -- one client after another, at once, cut off ------------------------------------------------------------------------------------------


def _next_action(client: Any, joints: np.ndarray) -> np.ndarray:
    match client:
        case molmospaces.PiPolicy():
            client.reset()
            return client.action(joints, "x")["arm"]
        case molmospaces.DreamZeroPolicy():
            return client.infer(joints, "x")[0, :7]
        case robolab.Cosmos3Client():
            return client.infer(joints, "x")[0, :7]
        case _:
            return client.get_action(joints[None], "x")[0, :7]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda host, port: robolab.Cosmos3Client(f"ws://{host}:{port}/?response_key=action"), id="robolab cosmos3"),
        pytest.param(
            lambda host, port: isaaclab_arena.RemoteChunkReplayPolicy(host, port, open_loop_horizon=1, action_dim=WIDTH), id="isaaclab arena"
        ),
    ],
)
def test_clients_that_reconnect_outlive_a_restart(make, policy, joints):
    def serve(port: int) -> Any:
        return start(
            service_config("action", action_transport=ActionTransportConfig(websocket_port=port, quic_port=None, unix_socket_path=None)),
            stubs(policy),
        )

    with serve(0) as first:
        host, port = host_port(first)
        with closing(make(host, port)) as client:
            np.testing.assert_array_equal(_next_action(client, joints), joints)
            first.stop()
            assert first.wait_stopped() == 0
            with serve(port):
                np.testing.assert_array_equal(_next_action(client, joints + 1), joints + 1)


@pytest.mark.parametrize("make", [molmospaces.PiPolicy, molmospaces.DreamZeroPolicy])
def test_clients_that_take_going_away_for_a_good_bye_do_so_with_any_websockets_server(make, policy, joints, monkeypatch):
    """They reconnect after every other end, but a server that drains says 1001, as the one that openpi is built on does."""
    monkeypatch.setattr(molmospaces.PiPolicy, "reconnect_pause_s", 0.0)
    with start(service_config("action"), stubs(policy)) as service, closing(make(*host_port(service))) as client:
        _next_action(client, joints)
        service.stop()
        assert service.wait_stopped() == 0
        with pytest.raises(ConnectionClosedOK) as closed:
            _next_action(client, joints)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001


def test_two_sessions_alternate_on_one_socket(server, joints):
    with closing(OpenPIClient(url(server))) as client:
        for turn in range(20):
            session = "ab"[turn % 2]
            reply = client.infer({"observation/joint_position": joints + turn, "prompt": session, "session_id": session, "obs_index": turn})
            np.testing.assert_array_equal(reply["actions"][0, :7], joints + turn)
            assert reply["obs_index"] == turn and asked(reply).startswith(session)


def test_a_session_goes_on_over_another_connection(server, joints):
    for turn in range(5):
        with ExitStack() as stack:
            client = stack.enter_context(closing(OpenPIClient(url(server))))
            reply = client.infer({"observation/joint_position": joints + turn, "prompt": "go on", "session_id": "robot-1"})
            np.testing.assert_array_equal(reply["actions"][0, :7], joints + turn)
            if turn % 2:
                client._ws.socket.close()  # as when the cable is pulled; no farewell


def test_every_kind_of_client_at_once(server, arena_server, joints):
    def openpi(index: int) -> None:
        with closing(OpenPIClient(url(server))) as client:
            for turn in range(10):
                reply = client.infer({"observation/joint_position": joints + 100 * index + turn, "prompt": "x"})
                np.testing.assert_array_equal(reply["actions"][0, :7], joints + 100 * index + turn)

    def pypi(index: int) -> None:
        with closing(molmospaces.DreamZeroPolicy(*host_port(server))) as client:
            for turn in range(10):
                np.testing.assert_array_equal(client.infer(joints + 100 * index + turn, "x")[0, :7], joints + 100 * index + turn)

    def vllm(index: int) -> None:
        host, port = host_port(server)
        with closing(vllm_omni.ExampleClient(host=host, port=port)) as client:
            for turn in range(10):
                chunk = client.infer({"observation/joint_position": joints + 100 * index + turn, "prompt": "x"})
                np.testing.assert_array_equal(chunk[0, :7], joints + 100 * index + turn)

    with ThreadPoolExecutor(6) as threads:
        for done in [threads.submit(client, index) for index, client in enumerate([openpi, pypi, vllm, openpi, pypi, vllm])]:
            done.result(60)


def test_a_long_inference_drops_nobody(policy, joints):
    """Server and client ping all the time while the model is busy; ``benchmarks/keepalive.py`` takes the real minute."""
    working, finish = threading.Event(), threading.Event()

    def hold() -> None:
        working.set()
        assert finish.wait(60)

    slow = ArmPolicy()
    slow.hold = hold
    config = service_config("action", websocket=WebSocketConfig(ping_interval_s=0.02, ping_timeout_s=20.0))
    with start(config, stubs(slow)) as service, connect(url(service), compression=None, ping_interval=0.02) as websocket:
        websocket.recv()
        websocket.send(openpi_codec.pack({"observation/joint_position": joints, "prompt": "x"}))
        try:
            assert working.wait(30)
            for _ in range(20):
                assert websocket.ping().wait(20), "a ping was not answered while the model ran"
            assert httpx.get(service.http("action") + "/healthz").text == "OK\n"
        finally:
            finish.set()
        np.testing.assert_array_equal(openpi_codec.unpack(websocket.recv(timeout=30))["actions"][0, :7], joints)


# -- size --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def limited_server(policy: ArmPolicy) -> Iterator[RunningService]:
    with start(service_config("action", max_message_bytes=64 << 20), stubs(policy)) as service:
        yield service


@pytest.mark.parametrize("mib", [20, 60])
def test_large_observations_are_accepted(limited_server, policy, joints, mib):
    with closing(OpenPIClient(url(limited_server))) as client:
        reply = client.infer({"observation/joint_position": joints, "prompt": "x", "observation/image": np.full((mib, 1024, 1024), 3, np.uint8)})
        np.testing.assert_array_equal(reply["actions"][0, :7], joints)
    assert policy.seen[0]["observation/image"].shape == (mib, 1024, 1024)
    policy.seen = []


def test_beyond_the_limit_the_client_is_told_so(limited_server, joints):
    with connect(url(limited_server), compression=None, max_size=None) as websocket:
        websocket.recv()
        with pytest.raises(ConnectionClosedError) as caught:
            _send_and_read(websocket, openpi_codec.pack({"image": np.zeros((65, 1024, 1024), np.uint8)}))
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009
        assert "67108864" in caught.value.rcvd.reason
    with closing(OpenPIClient(url(limited_server))) as client:
        assert "actions" in client.infer({"observation/joint_position": joints, "prompt": "x"}), "nobody else is hurt"


def _send_and_read(websocket: ClientConnection, message: bytes) -> None:
    websocket.send(message)
    websocket.recv(timeout=30)


# -- openpi-flash ------------------------------------------------------------------------------------------------------------------------


def test_openpi_flash_modes(server, joints):
    obs = {"observation/joint_position": joints, "prompt": "tidy"}
    with closing(OpenPIClient(url(server))) as client:
        default, explicit = client.infer(obs), client.infer({**obs, "mode": "default"})
        assert asked(default) == asked(explicit) == "tidy. Subtask: first step of tidy"
        assert default["subtask"]["ms"] == 1.0
        assert set(client.infer({**obs, "mode": "subtask_only"})) == {"subtask", "server_timing"}
        acted = client.infer({**obs, "mode": "action_only"})
        assert asked(acted) == "tidy" and "subtask" not in acted
        with pytest.raises(RuntimeError, match="mode: got 'dream', expected one of default, subtask_only, action_only"):
            client.infer({**obs, "mode": "dream"})


def test_openpi_flash_planner_socket_and_template(server, joints):
    obs = {"observation/joint_position": joints, "prompt": "tidy"}
    with closing(OpenPIClient(url(server, slot="planner"))) as planner:
        assert planner.get_server_metadata()["image_specs"], "a combined service advertises the action slot's cameras"
        assert set(planner.infer(obs)) == {"subtask", "server_timing"}
    admin = server.addresses["admin"]
    before = httpx.get(f"{admin}/config").json()["generation_prompt_format"]
    assert httpx.patch(f"{admin}/config", json={"generation_prompt_format": "Do {task}: "}).status_code == 200
    try:
        with closing(OpenPIClient(url(server))) as client:
            assert client.infer(obs)["subtask"]["format"] == "Do {task}: "
        assert httpx.patch(f"{admin}/config", json={"generation_prompt_format": "no task"}).status_code == 422
    finally:
        assert httpx.patch(f"{admin}/config", json={"generation_prompt_format": before}).status_code == 200


@pytest.mark.parametrize("slot", ["action", "planner"])
def test_planner_replies_have_no_actions_in_any_dialect(server, joints, slot):
    """A reply without actions cannot be a bare array; it stays the map that it is."""
    obs = {"observation/joint_position": joints, "prompt": "tidy", "mode": "subtask_only"}
    with connect(url(server, vllm_omni.PATH, slot), compression=None) as websocket:
        websocket.recv()
        websocket.send(openpi_codec.pack(obs))
        assert openpi_codec.unpack(websocket.recv())["subtask"]["text"] == "first step of tidy"


# -- one request for several robots ------------------------------------------------------------------------------------------------------


def test_batch_as_the_only_key(keyed_server, policy, joints):
    rows = [{"observation/joint_position": joints + index, "prompt": f"task {index}", "seed": index} for index in range(3)]
    with closing(OpenPIClient(url(keyed_server), api_key=KEY)) as client:
        reply = client.infer({"batch": rows})
        assert reply["actions"].shape == (3, HORIZON, WIDTH) and policy.batches[-1] == 3, "one model call"
        for index in range(3):
            np.testing.assert_array_equal(reply["actions"][index, 0], [*(joints + index), index])
        assert reply["asked"] == ["task 0", "task 1", "task 2"]
        with pytest.raises(RuntimeError, match=r"batch\[1\]: observation/joint_position: missing"):
            client.infer({"batch": [rows[0], {"prompt": "x"}]})


def test_batch_beside_other_keys_is_an_ordinary_field(keyed_server, policy, joints):
    with closing(OpenPIClient(url(keyed_server), api_key=KEY)) as client:
        reply = client.infer({"observation/joint_position": joints, "prompt": "x", "batch": [1, 2]})
    assert reply["actions"].shape == (HORIZON, WIDTH)
    assert policy.seen[0]["batch"] == [1, 2]
