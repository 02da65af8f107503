"""The stream under the WebSocket link: silence, endings, deadlines. The rest is tested through the link."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from websockets.frames import Frame, Opcode
from websockets.server import ServerProtocol
from websockets.sync.server import ServerConnection

from hosting.clients.retry import Deadline
from hosting.clients.websocket_stream import StreamClosedError, WebSocketStream
from tests.hosting.clients.scripted import server


def within(seconds: float = 30.0) -> Deadline:
    return Deadline(seconds, time.monotonic)


def stream_to(url: str, deadline: Deadline | None = None) -> WebSocketStream:
    return WebSocketStream(url, {}, context=None, server_name=None, congestion_control=None, deadline=deadline or within())


@contextmanager
def raw(converse: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that shakes hands and then does what no library would."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def run() -> None:
            with listening.accept()[0] as connection:
                protocol = ServerProtocol()
                while not (events := protocol.events_received()):
                    protocol.receive_data(connection.recv(65536))
                protocol.send_response(protocol.accept(events[0]))  # type: ignore[arg-type]
                for data in protocol.data_to_send():
                    connection.sendall(data)
                converse(connection)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            thread.join(30)


def until_closed(connection: socket.socket) -> bytes:
    """Everything the client sends."""
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


def test_a_silent_server_is_pinged_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hosting.clients.websocket_stream._PING_AFTER_S", 0.01)
    monkeypatch.setattr("hosting.clients.websocket_stream._LOST_AFTER_S", 0.1)
    received: list[bytes] = []
    with raw(lambda connection: received.append(until_closed(connection))) as url:
        stream = stream_to(url)
        with pytest.raises(StreamClosedError, match=r"^nothing came for 0 s, not even the answer to a ping$"):
            stream.receive(Deadline(None, time.monotonic))
        assert not stream.open
    assert received[0][0] & 0x0F == Opcode.PING


def test_one_that_answers_pings_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hosting.clients.websocket_stream._PING_AFTER_S", 0.01)
    monkeypatch.setattr("hosting.clients.websocket_stream._LOST_AFTER_S", 0.5)

    def converse(connection: ServerConnection) -> None:
        with pytest.raises(TimeoutError):
            connection.recv(timeout=1.0)  # answers pings meanwhile
        connection.send(b"at last")

    with server(converse) as url:
        stream = stream_to(url)
        assert stream.receive(within()) == b"at last"
        stream.close(2.0)


def test_the_server_hangs_up_without_a_word() -> None:
    with raw(lambda connection: None) as url:
        stream = stream_to(url)
        with pytest.raises(StreamClosedError, match=r"^the server hung up$"):
            stream.receive(within())
        with pytest.raises(StreamClosedError, match=r"^the server hung up$"):
            stream.send([b"x"], within())
        stream.abort()


def test_the_server_breaks_the_protocol() -> None:
    with raw(lambda connection: connection.sendall(b"\xff\xff\xff\xff")) as url:
        stream = stream_to(url)
        with pytest.raises(StreamClosedError, match=r"^the server broke the protocol: "):
            stream.receive(within())
        stream.abort()


def test_the_closing_handshake() -> None:
    codes: list[int] = []

    def converse(connection: ServerConnection) -> None:
        list(connection)
        codes.append(connection.close_code or 0)

    with server(converse) as url:
        stream = stream_to(url)
        stream.close(30.0)
        stream.close(30.0)
        assert not stream.open
    assert codes == [1000]


def test_closing_a_server_that_does_not_answer() -> None:
    done = threading.Event()
    with raw(lambda connection: done.wait(30) and None) as url:
        stream = stream_to(url)
        stream.close(0.01)
        assert not stream.open
        done.set()


def test_many_messages_at_once_are_kept_in_order() -> None:
    frames = b"".join(Frame(Opcode.BINARY, str(n).encode()).serialize(mask=False) for n in range(100))
    with raw(lambda connection: connection.sendall(frames)) as url:
        stream = stream_to(url)
        assert [stream.receive(within()) for _ in range(100)] == [str(n).encode() for n in range(100)]
        stream.abort()


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 450_000, 6_000_000])
def test_a_message_in_parts_arrives_whole(size: int) -> None:
    def echo(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    with server(echo) as url:
        stream = stream_to(url)
        body = os.urandom(size)
        for parts in ([body], [body[: size // 3], body[size // 3 : size // 2], body[size // 2 :]]):
            stream.send(parts, within())
            assert stream.receive(within()) == body
        stream.close(2.0)


def test_a_large_message_that_the_server_does_not_read_is_given_up() -> None:
    done = threading.Event()
    with raw(lambda connection: done.wait(30) and None) as url:
        stream = stream_to(url)
        with pytest.raises(TimeoutError):
            stream.send([bytes(64 << 20)], within(0.05))
        stream.abort()
        done.set()


def test_a_host_with_several_addresses_is_tried_through(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(lambda connection: connection.send(b"hello")) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_server(("127.0.0.1", 0)) as free:
            dead = free.getsockname()
        answer = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in (dead, ("127.0.0.1", port))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
        stream = stream_to("ws://robot.test")
        assert stream.receive(within()) == b"hello"
        stream.close(2.0)


def test_no_time_to_connect() -> None:
    with server(lambda connection: None) as url, pytest.raises(TimeoutError):
        stream_to(url, within(0.0))
