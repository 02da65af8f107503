"""The blocking client against a server that does as it is told, and against our own."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI
from websockets.sync.server import ServerConnection, serve

from hosting.clients.websocket import InferenceError, WebSocketClient
from hosting.policy import MessageError
from hosting.protocol import msgpack_numpy

HELLO = msgpack_numpy.pack({"action_horizon": 2})


@contextmanager
def server(converse: Callable[[ServerConnection], None]) -> Iterator[str]:
    """A WebSocket server on a free port, one thread per connection."""
    with serve(converse, "127.0.0.1", 0, compression=None, max_size=None) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{running.socket.getsockname()[1]}"
        finally:
            running.shutdown()
            thread.join(30)


def echo(connection: ServerConnection) -> None:
    """Answers ``{"error": text}`` with that error and anything else with itself."""
    connection.send(HELLO)
    for message in connection:
        obs = msgpack_numpy.unpack(message)
        connection.send(obs.get("error", message))


def test_metadata_and_replies() -> None:
    with server(echo) as url, WebSocketClient(url) as client:
        assert client.get_server_metadata() == {"action_horizon": 2}
        reply = client.infer({"state": np.arange(3.0), "prompt": "x"})
        assert reply["prompt"] == "x" and reply["state"].tolist() == [0, 1, 2]
        client.reset()
        assert client.infer({"n": 1}) == {"n": 1}


def test_an_error_is_raised_with_the_servers_words_and_the_connection_goes_on() -> None:
    with server(echo) as url, WebSocketClient(url) as client:
        with pytest.raises(InferenceError, match=r"^state: missing$"):
            client.infer({"error": "state: missing"})
        assert client.infer({"n": 1}) == {"n": 1}


def test_messages_beyond_the_librarys_usual_megabyte() -> None:
    with server(echo) as url, WebSocketClient(url) as client:
        image = np.zeros((3, 1500, 1500), np.uint8)
        assert client.infer({"image": image})["image"].shape == image.shape


def test_the_key_is_sent_and_no_compression_is_asked_for() -> None:
    seen: list[Any] = []

    def converse(connection: ServerConnection) -> None:
        assert connection.request is not None
        seen.append(connection.request.headers)
        connection.send(HELLO)

    with server(converse) as url:
        WebSocketClient(url, api_key="secret").close()
        WebSocketClient(url + "/any/path").close()
    assert seen[0]["Authorization"] == "Api-Key secret"
    assert "Authorization" not in seen[1] and not any("Sec-WebSocket-Extensions" in headers for headers in seen)


def test_a_server_that_does_not_greet_in_time() -> None:
    done = threading.Event()
    with server(lambda connection: done.wait(30) and None) as url:
        with pytest.raises(TimeoutError):
            WebSocketClient(url, ready_timeout_s=0.01)
        done.set()


def test_a_reply_that_does_not_come_in_time() -> None:
    done = threading.Event()

    def converse(connection: ServerConnection) -> None:
        connection.send(HELLO)
        connection.recv()
        done.wait(30)
        with contextlib.suppress(ConnectionClosed):
            connection.send(msgpack_numpy.pack({"late": True}))
            connection.recv()

    with server(converse) as url, WebSocketClient(url, timeout_s=0.01) as client:
        with pytest.raises(TimeoutError):
            client.infer({})
        done.set()
        # The late reply must not pass for that to another observation.
        with pytest.raises(ConnectionClosed):
            client.infer({})


def test_a_handshake_that_does_not_come_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError):
        WebSocketClient(f"ws://127.0.0.1:{silent.getsockname()[1]}", connect_timeout_s=0.05)


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        WebSocketClient(f"ws://127.0.0.1:{port}")


def test_a_url_that_is_none() -> None:
    with pytest.raises(InvalidURI):
        WebSocketClient("localhost:8000")


def test_a_server_that_refuses_the_handshake() -> None:
    def refuse(connection: ServerConnection, request: Any) -> Any:
        return connection.respond(403, "no\n")

    with serve(echo, "127.0.0.1", 0, process_request=refuse) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        with pytest.raises(InvalidStatus, match="HTTP 403"):
            WebSocketClient(f"ws://127.0.0.1:{running.socket.getsockname()[1]}")
        running.shutdown()
        thread.join(30)


@pytest.mark.parametrize(("hello", "error"), [("not ready", InferenceError), (b"\xc1", MessageError)])
def test_a_greeting_that_is_none_closes_the_connection(hello: bytes | str, error: type[Exception]) -> None:
    closed = threading.Event()

    def converse(connection: ServerConnection) -> None:
        connection.send(hello)
        with pytest.raises(ConnectionClosed):
            connection.recv()
        closed.set()

    with server(converse) as url:
        with pytest.raises(error):
            WebSocketClient(url)
        assert closed.wait(30)


def test_a_closed_client_cannot_infer_and_may_be_closed_again() -> None:
    with server(echo) as url:
        client = WebSocketClient(url)
        client.close()
        client.close()
        with pytest.raises(ConnectionClosed):
            client.infer({})


def test_leaving_the_context_closes_also_on_an_error() -> None:
    closed = threading.Event()

    def converse(connection: ServerConnection) -> None:
        echo(connection)
        closed.set()

    with server(converse) as url:
        with pytest.raises(ZeroDivisionError), WebSocketClient(url):
            raise ZeroDivisionError
        assert closed.wait(30)


def test_a_server_that_goes_away() -> None:
    def converse(connection: ServerConnection) -> None:
        connection.send(HELLO)
        connection.recv()

    with server(converse) as url, WebSocketClient(url) as client, pytest.raises(ConnectionClosed):
        client.infer({})
