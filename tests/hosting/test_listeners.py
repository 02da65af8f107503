"""Addresses, the API key at the upgrade, TLS, congestion control and time limits, through real sockets."""

from __future__ import annotations

import logging
import socket
import ssl
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from hosting.certificates import CERTIFICATE_FILE, KEY_FILE, local_certificate
from hosting.config import RoboArenaConfig, TLSConfig, WebSocketConfig
from hosting.policy import ConfigError
from hosting.protocol import msgpack_numpy
from hosting.transports.prompt_http import PromptHTTPProtocol
from tests.serving import service_config, start, stubs


def hello(connection: Any) -> Any:
    return msgpack_numpy.unpack(connection.recv(timeout=30))


class TestKey:
    @pytest.mark.parametrize(
        "headers",
        [{"Authorization": "Api-Key sesame"}, {"Authorization": "Bearer sesame"}, {"authorization": "bearer  sesame"}, {"X-API-Key": "sesame"}],
    )
    def test_the_right_one_in_any_form(self, headers: dict[str, str]) -> None:
        with (
            start(service_config("action", api_key="sesame"), stubs()) as service,
            connect(service.addresses["action"], additional_headers=headers) as connection,
        ):
            assert hello(connection)["slot"] == "action"

    @pytest.mark.parametrize(
        "headers",
        [{}, {"Authorization": "Api-Key Sesame"}, {"Authorization": "Basic sesame"}, {"Authorization": "sesame"}, {"Authorization": "Bearer größer"}],
    )
    def test_any_other_is_refused_during_the_upgrade(self, headers: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
        with start(service_config("action", api_key="sesame"), stubs()) as service, caplog.at_level(logging.INFO):
            with pytest.raises(InvalidStatus) as refused, connect(service.addresses["action"], additional_headers=headers):
                pass
            response = refused.value.response
            assert response.status_code == 401 and response.headers["WWW-Authenticate"] == "Api-Key, Bearer"
            assert response.body is not None and response.body.startswith(b"unauthorized: send the server's API key")
            assert httpx.get(service.http("action") + "/healthz").status_code == 200, "probes need no key"
        brought = "no" if not headers or "asic" in str(headers) or headers == {"Authorization": "sesame"} else "a wrong"
        assert f"action: refused a connection: it brought {brought} API key" in caplog.messages
        assert "esame" not in caplog.text and not [record for record in caplog.records if record.levelno > logging.INFO]


def test_an_address_that_asks_for_what_there_is_not_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with start(service_config("action"), stubs()) as service, caplog.at_level(logging.INFO):
        with pytest.raises(InvalidStatus) as refused, connect(service.addresses["action"] + "/?profile=x"):
            pass
        assert refused.value.response.status_code == 400
        assert refused.value.response.body == b"profile: got 'x', expected one of openpi, roboarena, empty, vllm\n"
    assert "action: refused: profile: got 'x', expected one of openpi, roboarena, empty, vllm" in caplog.messages


def test_profiles_have_their_own_hello() -> None:
    config = service_config(
        "action", roboarena=RoboArenaConfig(action_space="joint_velocity", image_resolution="180x320", n_external_cameras=1, needs_wrist_camera=True)
    )
    with start(config, stubs()) as service:
        url = service.addresses["action"]
        with connect(url + "?profile=roboarena") as connection:
            assert hello(connection) == {
                "image_resolution": [180, 320],
                "needs_wrist_camera": True,
                "n_external_cameras": 1,
                "needs_stereo_camera": False,
                "needs_session_id": False,
                "action_space": "joint_velocity",
            }
        with connect(url + "?profile=empty") as connection:
            assert hello(connection) == {}
        with connect(url) as connection:
            assert "roboarena" not in hello(connection)


def test_a_profile_that_lacks_facts_says_so_and_closes() -> None:
    with start(service_config("action"), stubs()) as service, connect(service.addresses["action"] + "?profile=roboarena") as connection:
        text = connection.recv(timeout=30)
        assert isinstance(text, str) and text.startswith("profile roboarena: the server does not know")
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=30)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1011


def test_the_configured_profile_is_the_default() -> None:
    with (
        start(service_config("action", websocket=WebSocketConfig(profile="empty")), stubs()) as service,
        connect(service.addresses["action"]) as connection,
    ):
        assert hello(connection) == {}


class TestTLS:
    def test_websockets_are_wss(self, tmp_path: Path) -> None:
        local_certificate(tmp_path)
        tls = TLSConfig(certificate=str(tmp_path / CERTIFICATE_FILE), private_key=str(tmp_path / KEY_FILE))
        trusted = ssl.create_default_context(cafile=tls.certificate)
        with start(service_config("action", "planner", tls=tls), stubs()) as service:
            assert service.addresses["action"].startswith("wss://127.0.0.1:") and service.addresses["admin"].startswith("http://")
            with connect(service.addresses["action"], ssl=trusted) as connection:
                hello(connection)
                obs = {"prompt": "x", "image": np.zeros((400, 400, 3), np.uint8)}
                for _ in range(3):
                    connection.send(msgpack_numpy.pack(obs))
                    assert msgpack_numpy.unpack(connection.recv(timeout=30))["asked"] == {"prompt": "x. Subtask: first step of x"}

    def test_files_that_do_not_fit_name_the_fields(self, tmp_path: Path) -> None:
        (tmp_path / "empty.pem").write_text("")
        tls = TLSConfig(certificate=str(tmp_path / "empty.pem"), private_key=str(tmp_path / "missing.pem"))
        with (
            pytest.raises(
                ConfigError, match=r"^tls: cannot use certificate .*empty\.pem with private_key .*missing\.pem \(.+\); both are PEM files$"
            ),
            start(service_config("action", tls=tls), stubs()),
        ):
            pass

    def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password(self, tmp_path: Path) -> None:
        local_certificate(tmp_path)
        key = serialization.load_pem_private_key((tmp_path / KEY_FILE).read_bytes(), None)
        encryption = serialization.BestAvailableEncryption(b"secret")
        (tmp_path / "locked.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
        tls = TLSConfig(certificate=str(tmp_path / CERTIFICATE_FILE), private_key=str(tmp_path / "locked.pem"))
        with (
            pytest.raises(ConfigError, match=r"^tls: cannot use certificate .* \(the key is encrypted, .*; decrypt it with: openssl pkey .*\); both"),
            start(service_config("action", tls=tls), stubs()),
        ):
            pass


class TestCongestionControl:
    @pytest.mark.skipif(not hasattr(socket, "TCP_CONGESTION"), reason="this system has no choice of congestion control")
    def test_is_set_and_told(self) -> None:
        with (
            start(service_config("action", websocket=WebSocketConfig(congestion_control="reno")), stubs()) as service,
            connect(service.addresses["action"]) as connection,
        ):
            assert hello(connection)["tcp_congestion_control"] == "reno"

    def test_one_that_the_kernel_lacks_is_logged_and_the_truth_told(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        with (
            start(service_config("action", websocket=WebSocketConfig(congestion_control="nosuch")), stubs()) as service,
            connect(service.addresses["action"]) as connection,
        ):
            assert hello(connection).get("tcp_congestion_control") != "nosuch"
        assert any("websocket.congestion_control" in record.message and "nosuch" in record.message for record in caplog.records)


def test_ready_says_what_is_served_where() -> None:
    with start(service_config("action", "planner"), stubs()) as service:
        for port in ("action", "planner", "admin"):
            answer = httpx.get(service.http(port) + "/ready")
            assert answer.status_code == 200
            assert answer.json() == {
                "ready": True,
                "mode": "combined",
                "slots": {"action": "ready", "planner": "ready"},
                "addresses": dict(service.addresses),
                "quic_certificate_sha256": None,
            }
        service.stop()
        service.wait_stopped()
    with start(service_config("action"), stubs(), wait_ready=False) as service:
        answer = httpx.get(service.http("action") + "/ready")
        assert answer.status_code in (200, 503) and answer.json()["ready"] is (answer.status_code == 200)


class TestTimeLimits:
    def test_an_idle_connection_is_kept_unless_told_otherwise(self) -> None:
        with (
            start(service_config("action", websocket=WebSocketConfig(idle_timeout_s=0.05)), stubs()) as service,
            connect(service.addresses["action"]) as connection,
        ):
            hello(connection)
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv(timeout=30)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
            assert closed.value.rcvd.reason == "no request came for 0.05 s"

    @pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET / HT"])
    def test_headers_that_do_not_come_end_the_connection(self, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(PromptHTTPProtocol, "header_timeout_s", 0.05)
        with start(service_config("action"), stubs()) as service:
            port = int(service.addresses["action"].rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
                slow.sendall(sent)
                received = b""
                while data := slow.recv(4096):
                    received += data
            assert received.count(b"HTTP/1.1 200 OK") == sent.count(b"\r\n\r\n")
            with connect(service.addresses["action"]) as connection:
                hello(connection)
                connection.send(msgpack_numpy.pack({"prompt": "the upgraded connection is none of its business"}))
                assert isinstance(connection.recv(timeout=30), bytes)
