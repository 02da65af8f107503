"""The WebSocket link against servers that do as they are told."""

from __future__ import annotations

import logging
import socket
import threading
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection

from hosting.clients.errors import AuthenticationError, ConnectError, ConnectionLostError, ReplyTimeoutError
from hosting.clients.websocket import WebSocketLink, with_error_maps
from hosting.protocol import msgpack_numpy
from hosting.protocol.messages import Message, MessageType
from tests.hosting.clients.scripted import HELLO, echo, server


@pytest.fixture(autouse=True)
def tended_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hosting.clients.websocket._TEND_EVERY_S", 0.01)


def infer(link: WebSocketLink, value: Any, timeout_s: float | None = 30.0) -> Message:
    return link.exchange(MessageType.INFER, [msgpack_numpy.pack(value)], timeout_s)


def test_the_greeting_and_replies() -> None:
    with server(echo) as url:
        link = WebSocketLink(url)
        assert link.hello == (MessageType.METADATA_REPLY, HELLO)
        answer = infer(link, {"state": np.arange(3.0), "prompt": "x"})
        assert answer.type == MessageType.REPLY and msgpack_numpy.unpack(answer.body)["state"].tolist() == [0, 1, 2]
        link.close()
        link.close()
        assert link.closed


def test_an_error_is_text_and_the_connection_goes_on() -> None:
    with server(echo) as url:
        link = WebSocketLink(url)
        assert infer(link, {"error": "état: missing"}) == (MessageType.ERROR, "état: missing".encode())
        assert infer(link, {"n": 1}).type == MessageType.REPLY
        link.close()


def test_a_body_in_parts_is_one_frame() -> None:
    with server(echo) as url:
        link = WebSocketLink(url)
        packed = msgpack_numpy.pack({"image": np.zeros((3, 1500, 1500), np.uint8)})  # beyond the library's usual megabyte
        parts = [memoryview(packed)[:7], bytearray(packed[7:5000]), packed[5000:]]
        assert link.exchange(MessageType.INFER, parts, 30.0).body == packed
        link.close()


def test_a_reset_is_a_map_and_its_confirmation_text_or_a_map() -> None:
    asked: list[Any] = []
    answers: list[str | bytes] = ["reset successful", msgpack_numpy.pack({"status": "reset successful"}), "Traceback: no such endpoint"]

    def converse(connection: ServerConnection) -> None:
        connection.send(HELLO)
        for message, answer in zip(connection, answers, strict=False):
            asked.append(msgpack_numpy.unpack(message))
            connection.send(answer)

    with server(converse) as url:
        link = WebSocketLink(url)
        body = [msgpack_numpy.pack({"session_id": "robot 1"})]
        types = [link.exchange(MessageType.RESET, each, 30.0).type for each in ([], body, body)]
        link.close()
    assert types == [MessageType.RESET_REPLY, MessageType.REPLY, MessageType.ERROR]
    assert asked == [{"endpoint": "reset"}, *[{"endpoint": "reset", "session_id": "robot 1"}] * 2]


def test_the_handshake() -> None:
    seen: list[Any] = []

    def converse(connection: ServerConnection) -> None:
        seen.append(connection.request)
        connection.send(HELLO)

    with server(converse) as url:
        WebSocketLink(url, api_key="secret").close()
        WebSocketLink(url + "/any/path?profile=roboarena").close()
    assert [request.path for request in seen] == ["/?errors=map", "/any/path?profile=roboarena"]
    assert [request.headers.get("Authorization") for request in seen] == ["Api-Key secret", None]
    assert not any("Sec-WebSocket-Extensions" in request.headers for request in seen), "no compression"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ws://h", "ws://h?errors=map"),
        ("ws://h:1/p", "ws://h:1/p?errors=map"),
        ("ws://h/?token=a%2Fb+c", "ws://h/?token=a%2Fb+c&errors=map"),
        ("ws://h/?errors=text", "ws://h/?errors=text"),
        ("ws://h/?profile=vllm", "ws://h/?profile=vllm"),
    ],
)
def test_errors_are_asked_for_as_maps_where_nothing_was_chosen(url: str, expected: str) -> None:
    assert with_error_maps(url) == expected


def test_a_reply_that_does_not_come_in_time_closes_the_link() -> None:
    done = threading.Event()

    def converse(connection: ServerConnection) -> None:
        connection.send(HELLO)
        connection.recv()
        done.wait(30)

    with server(converse) as url:
        link = WebSocketLink(url)
        with pytest.raises(ReplyTimeoutError, match=rf"^{url} did not answer within 0\.01 s; the connection is closed$"):
            infer(link, {}, 0.01)
        assert link.closed, "the late reply must not pass for that to another observation"
        done.set()
        link.close()


def test_a_server_that_does_not_read_does_not_hold_the_sender() -> None:
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

        def shake_hands_and_stop() -> None:
            from websockets.server import ServerProtocol

            with listening.accept()[0] as connection:
                protocol = ServerProtocol()
                while not (events := protocol.events_received()):
                    protocol.receive_data(connection.recv(65536))
                protocol.send_response(protocol.accept(events[0]))  # type: ignore[arg-type]
                protocol.send_binary(HELLO)
                for data in protocol.data_to_send():
                    connection.sendall(data)
                done.wait(30)

        thread = threading.Thread(target=shake_hands_and_stop)
        thread.start()
        link = WebSocketLink(f"ws://127.0.0.1:{listening.getsockname()[1]}")
        with pytest.raises(ReplyTimeoutError):
            link.exchange(MessageType.INFER, [bytes(64 << 20)], 0.2)
        assert link.closed
        done.set()
        thread.join(30)


def test_a_server_that_goes_away() -> None:
    def converse(connection: ServerConnection) -> None:
        connection.send(HELLO)
        connection.recv()
        connection.close(1001, "the server is shutting down")

    with server(converse) as url:
        link = WebSocketLink(url)
        with pytest.raises(ConnectionLostError, match=rf"^the connection to {url} broke: .*1001.*the server is shutting down"):
            infer(link, {})
        assert link.closed


def test_a_link_notices_that_the_server_has_left() -> None:
    left = threading.Event()

    def converse(connection: ServerConnection) -> None:
        connection.send(HELLO)
        connection.close(1001)
        left.set()

    with server(converse) as url:
        link = WebSocketLink(url)
        assert left.wait(30), "the closing handshake was finished by both ends"
        assert link.closed
        with pytest.raises(ConnectionLostError):
            infer(link, {})
        link.close()


def test_a_message_that_nobody_asked_for_answers_nothing() -> None:
    sent = threading.Event()

    def converse(connection: ServerConnection) -> None:
        connection.send(HELLO)
        connection.send(msgpack_numpy.pack({"stale": True}))
        sent.set()
        with pytest.raises(ConnectionClosed):
            connection.recv()

    with server(converse) as url:
        link = WebSocketLink(url)
        assert sent.wait(30)
        link.tend()
        with pytest.raises(ConnectionLostError, match="that nobody had asked for"):
            infer(link, {})
        assert link.closed


def test_pings_are_answered_between_requests() -> None:
    answered = threading.Event()

    def converse(connection: ServerConnection) -> None:
        connection.send(HELLO)
        assert connection.ping().wait(30)
        answered.set()

    with server(converse) as url:
        link = WebSocketLink(url)
        assert answered.wait(30)
        link.close()


def test_a_link_that_is_dropped_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    with server(echo) as url:
        link = WebSocketLink(url)
        (tending,) = [thread for thread in set(threading.enumerate()) - before if thread.name == "policy link"]
        link._stream.abort()
        del link
        tending.join(30)
        assert not tending.is_alive()


def test_a_message_in_fragments() -> None:
    def converse(connection: ServerConnection) -> None:
        connection.send(HELLO)
        connection.recv()
        connection.send([b"one ", b"two ", b"three"])
        connection.recv()
        connection.send(["état", ": ", "missing"])
        connection.recv()

    with server(converse) as url:
        link = WebSocketLink(url)
        assert infer(link, {}) == (MessageType.REPLY, b"one two three")
        assert infer(link, {}) == (MessageType.ERROR, "état: missing".encode())
        link.close()


def test_whoever_is_interrupted_closes_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(deadline: object) -> bytes:
        raise KeyboardInterrupt

    with server(echo) as url:
        link = WebSocketLink(url)
        monkeypatch.setattr(link._stream, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            infer(link, {})
        assert link.closed


class TestNoConversation:
    def test_the_server_does_not_greet_in_time(self) -> None:
        done = threading.Event()
        with server(lambda connection: done.wait(30) and None) as url:
            with pytest.raises(ConnectError, match=rf"^{url} took the connection but did not greet within 0\.01 s; it may still be loading$"):
                WebSocketLink(url, ready_timeout_s=0.01)
            done.set()

    def test_the_server_closes_before_it_greets(self) -> None:
        with (
            server(lambda connection: connection.close(1001, "the server is shutting down")) as url,
            pytest.raises(ConnectError, match=rf"^{url} ended the connection before it greeted: .*the server is shutting down"),
        ):
            WebSocketLink(url)

    def test_a_greeting_in_text_is_a_refusal(self) -> None:
        closed = threading.Event()

        def converse(connection: ServerConnection) -> None:
            connection.send("Robot policy\nnot available")
            with pytest.raises(ConnectionClosed):
                connection.recv()
            closed.set()

        with server(converse) as url:
            with pytest.raises(ConnectError, match=rf"^{url} refused the conversation: Robot policy not available$"):
                WebSocketLink(url)
            assert closed.wait(30)

    def test_the_handshake_does_not_come_in_time(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"ws://127.0.0.1:{silent.getsockname()[1]}"
            with pytest.raises(ConnectError, match=rf"^cannot connect to {url}: "):
                WebSocketLink(url, connect_timeout_s=0.05)

    def test_nobody_listens(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = f"ws://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConnectError, match=rf"^cannot connect to {url}: \[Errno \d+\] Connection refused$") as error:
            WebSocketLink(url)
        assert isinstance(error.value.__cause__, ConnectionRefusedError)

    def test_a_host_that_is_none(self) -> None:
        with pytest.raises(ConnectError, match=r"^cannot connect to ws://no-such-host\.invalid: "):
            WebSocketLink("ws://no-such-host.invalid")

    def test_a_url_that_is_none(self) -> None:
        with pytest.raises(ConnectError, match=r"^cannot connect to localhost:8000: .*isn't a valid URI"):
            WebSocketLink("localhost:8000")

    @pytest.mark.parametrize(
        ("status", "error", "text"),
        [
            (401, AuthenticationError, r"unauthorized \(HTTP 401\); give the server's api_key$"),
            (403, ConnectError, r"the server answered HTTP 403"),
            (426, ConnectError, r"the server answered HTTP 426, not as a WebSocket$"),
            (503, ConnectError, r"the server answered HTTP 503"),
        ],
    )
    def test_the_server_refuses_the_handshake(self, status: int, error: type[Exception], text: str) -> None:
        def refuse(connection: ServerConnection, request: Any) -> Any:
            return connection.respond(status, "no\n")

        with server(echo, process_request=refuse) as url, pytest.raises(error, match=text) as raised:
            WebSocketLink(url)
        assert type(raised.value) is error

    def test_no_http_either(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def shout() -> None:
                with listening.accept()[0] as connection:
                    connection.sendall(b"SSH-2.0-OpenSSH\r\n")

            thread = threading.Thread(target=shout)
            thread.start()
            with pytest.raises(ConnectError, match=r"^cannot connect to ws://"):
                WebSocketLink(f"ws://127.0.0.1:{listening.getsockname()[1]}")
            thread.join(30)


class TestSocketOptions:
    def test_delay_and_congestion_control(self) -> None:
        with server(echo) as url:
            link = WebSocketLink(url, congestion_control="reno")  # built into every kernel, and open to every user
            connected = link._stream.socket
            assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
            link.close()

    def test_one_that_the_kernel_does_not_have(self, caplog: pytest.LogCaptureFixture) -> None:
        with server(echo) as url, caplog.at_level(logging.DEBUG, "hosting.clients.websocket_stream"):
            link = WebSocketLink(url, congestion_control="nonesuch")
            assert infer(link, {"n": 1}).type == MessageType.REPLY
            link.close()
        assert [record.getMessage().partition(", ")[2].partition(":")[0] for record in caplog.records] == ["nonesuch is not to be had"]
