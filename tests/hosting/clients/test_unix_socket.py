import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from hosting.clients.errors import ConnectError, ConnectionLostError, CrossedReplyError, ReplyTimeoutError
from hosting.clients.unix_socket import UnixLink
from hosting.protocol.messages import MessageType
from pi0.errors import MessageError
from tests.hosting.transports.unix_support import LIMIT, SECONDS, Script, framed, serving, socket_directory

INFER, REPLY, ERROR = MessageType.INFER, MessageType.REPLY, MessageType.ERROR
HELLO = framed(MessageType.METADATA_REPLY, b"\x80")


@pytest.fixture
def path():
    with socket_directory() as directory:
        yield directory / "s"


class Peer:
    """The server's end of one connection."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(SECONDS)
        self.socket = connected

    def read(self) -> tuple[int, bytes]:
        length, type = struct.unpack("!IB", self._exactly(5))
        return type, self._exactly(length - 1)

    def write(self, data: bytes) -> None:
        self.socket.sendall(data)

    def greet(self) -> None:
        assert self.read() == (MessageType.METADATA, b"")
        self.write(HELLO)

    def until_end(self) -> None:
        """Wait until the client has closed."""
        while self.socket.recv(1 << 20):
            pass

    def _exactly(self, count: int) -> bytes:
        data = self.socket.recv(count, socket.MSG_WAITALL)
        assert len(data) == count
        return data


@contextmanager
def scripted(path: Path, converse: Callable[[Peer], None]) -> Iterator[None]:
    """A server for one client; what fails in ``converse`` fails the test."""
    failed: list[BaseException] = []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        listening.settimeout(SECONDS)

        def run() -> None:
            try:
                connected, _ = listening.accept()
                with connected:
                    converse(Peer(connected))
            except BaseException as error:  # noqa: BLE001 - raised in the test's thread
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            thread.join(SECONDS)
            assert not thread.is_alive()
    if failed:
        raise failed[0]


# --- with the real server ------------------------------------------------------------------------------------------------------------


async def with_server(path: Path, client: Callable[[Path], None], **options) -> Script:
    """Run a blocking client against the real transport."""
    script = Script()
    async with serving(path, lambda: script, **options):
        await asyncio.to_thread(client, path)
    return script


async def test_exchanges(path):
    def client(path):
        link = UnixLink(path, connect_timeout_s=SECONDS)
        assert not any(link._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16)), "the time to connect is not that to send"
        assert link.hello == (MessageType.METADATA_REPLY, b"\x80") and not link.closed
        array = np.arange(200_000, dtype=np.float32).reshape(400, 500)
        for timeout_s in (None, SECONDS, None):
            assert link.exchange(INFER, [b"head", bytearray(b"er"), array.data, b"", np.empty((3, 0)).data, memoryview(b"end")], timeout_s) == (
                REPLY,
                b"header" + array.tobytes() + b"end",
            )
            assert link.exchange(INFER, (), timeout_s) == (REPLY, b"")
            assert (link._socket.gettimeout() is None) == (timeout_s is None), "the time of an exchange is not that of the next"
        link.close()
        link.close()
        assert link.closed
        with pytest.raises(ConnectionLostError, match=r"s: the connection is closed; connect again$"):
            link.exchange(INFER, (), None)

    await with_server(path, client)


async def test_more_parts_than_one_system_call_takes(path):
    def client(path):
        link = UnixLink(str(path))
        parts = [b"%05d" % index for index in range(5000)]
        assert link.exchange(INFER, parts, SECONDS).body == b"".join(parts)
        link.close()

    await with_server(path, client)


async def test_a_message_and_a_reply_larger_than_all_buffers(path):
    def client(path):
        link = UnixLink(path)
        body = np.random.default_rng(0).integers(0, 256, 20 << 20, np.uint8).data
        for timeout_s in (None, SECONDS):
            assert link.exchange(INFER, [body[:3], body[3:]], timeout_s).body == body
        link.close()

    await with_server(path, client, max_message_bytes=20 << 20)


async def test_a_message_that_goes_out_in_many_pieces(path):
    def client(path):
        link = UnixLink(path)
        link._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = np.random.default_rng(0).integers(0, 256, 500_000, np.uint8).data
        for timeout_s in (None, SECONDS):
            assert link.exchange(INFER, [body[:3], body[3:70_000], body[70_000:]], timeout_s).body == body
        link.close()

    await with_server(path, client)


async def test_a_message_over_the_servers_limit_is_answered_with_the_reason(path):
    def client(path):
        link = UnixLink(path)
        answer = link.exchange(INFER, [bytes(3 * LIMIT)], SECONDS)
        assert answer.type == ERROR and bytes(answer.body).startswith(b"the message has %d bytes, expected at most %d" % (3 * LIMIT, LIMIT))
        with pytest.raises(ConnectionLostError):
            link.exchange(INFER, [b"next"], SECONDS)
        assert link.closed

    await with_server(path, client)


# --- with servers that do as they are told -------------------------------------------------------------------------------------------


def test_an_answer_of_any_type_is_returned(path):
    def server(peer):
        peer.greet()
        for type in (ERROR, MessageType.FAILURE, MessageType.RESET_REPLY, 0x77):
            assert peer.read() == (INFER, b"a")
            peer.write(framed(type, b"text"))

    with scripted(path, server):
        link = UnixLink(path)
        for type in (ERROR, MessageType.FAILURE, MessageType.RESET_REPLY, 0x77):
            assert link.exchange(INFER, [b"a"], SECONDS) == (type, b"text")
            assert not link.closed
        link.close()


@pytest.mark.parametrize("timeout_s", [None, SECONDS])
def test_an_answer_byte_by_byte(path, timeout_s):
    def server(peer):
        peer.greet()
        peer.read()
        for byte in framed(REPLY, b"slow"):
            peer.write(bytes([byte]))
        peer.until_end()

    with scripted(path, server):
        link = UnixLink(path)
        assert link.exchange(INFER, [], timeout_s) == (REPLY, b"slow")
        link.close()


def test_an_answer_larger_than_the_clients_limit(path):
    def server(peer):
        peer.greet()
        peer.read()
        peer.write(struct.pack("!IB", 1002, REPLY))
        peer.until_end()

    with scripted(path, server):
        link = UnixLink(path, max_message_bytes=1000)
        with pytest.raises(ConnectionLostError, match="the message has 1001 bytes, expected at most 1000"):
            link.exchange(INFER, [], SECONDS)
        assert link.closed


def test_after_a_timeout_the_link_is_closed(path):
    def server(peer):
        peer.greet()
        peer.until_end()

    with scripted(path, server):
        link = UnixLink(path)
        with pytest.raises(ReplyTimeoutError, match=r"no reply within 0\.02 s; the connection is closed$"):
            link.exchange(INFER, [b"x"], 0.02)
        assert link.closed
        with pytest.raises(ConnectionLostError):
            link.exchange(INFER, [b"y"], SECONDS)


def test_a_timeout_while_sending(path):
    end = threading.Event()

    def server(peer):
        peer.greet()
        assert end.wait(SECONDS)

    with scripted(path, server):
        link = UnixLink(path)
        with pytest.raises(ReplyTimeoutError):
            link.exchange(INFER, [bytes(40 << 20)], 0.05)
        assert link.closed
        end.set()


def test_time_that_has_run_out_already(path):
    def server(peer):
        peer.greet()
        peer.until_end()

    with scripted(path, server):
        link = UnixLink(path)
        with pytest.raises(ReplyTimeoutError):
            link.exchange(INFER, [b"x"], 0.0)
        assert link.closed


@pytest.mark.parametrize("when", ["before the request", "instead of the answer", "in the answer"])
def test_a_server_that_closes(path, when):
    def server(peer):
        peer.greet()
        if when != "before the request":
            peer.read()
        if when == "in the answer":
            peer.write(framed(REPLY, b"answer")[:-1])

    with scripted(path, server):
        link = UnixLink(path)
        if when == "before the request":
            assert link._socket.recv(1, socket.MSG_PEEK) == b""
        with pytest.raises(ConnectionLostError, match="the connection broke: the server has closed it"):
            link.exchange(INFER, [b"x"], SECONDS)
        assert link.closed


def test_a_server_that_closes_with_the_request_unread(path):
    def server(peer):
        peer.greet()
        peer.socket.recv(1)

    with scripted(path, server):
        link = UnixLink(path)
        with pytest.raises(ConnectionLostError):
            link.exchange(INFER, [bytes(40 << 20)], SECONDS)
        assert link.closed


def test_what_a_server_said_before_it_closed_in_the_middle_of_a_request(path):
    def server(peer):
        peer.greet()
        peer.socket.recv(1)
        peer.write(framed(ERROR, b"too large"))

    with scripted(path, server):
        link = UnixLink(path)
        assert link.exchange(INFER, [bytes(40 << 20)], SECONDS) == (ERROR, b"too large")
        assert link.closed


def test_a_second_answer_is_never_taken_for_the_next_ones(path):
    def server(peer):
        peer.greet()
        peer.read()
        peer.write(framed(REPLY, b"one") + framed(REPLY, b"unasked"))
        peer.until_end()

    with scripted(path, server):
        link = UnixLink(path)
        assert link.exchange(INFER, [], SECONDS).body == b"one"
        with pytest.raises(CrossedReplyError, match="has sent more than the answer to the last request"):
            link.exchange(INFER, [], SECONDS)
        assert link.closed


def test_a_body_that_no_length_can_say_sends_nothing(path):
    def server(peer):
        peer.greet()
        assert peer.read() == (INFER, b"ok")
        peer.write(framed(REPLY))

    with scripted(path, server):
        link = UnixLink(path)
        with pytest.raises(MessageError, match=r"^the message has 4294967296 bytes, expected at most"):
            link.exchange(INFER, [bytes(64 << 20)] * 64, SECONDS)
        assert link.exchange(INFER, [b"ok"], SECONDS).type == REPLY
        link.close()


# --- no conversation -----------------------------------------------------------------------------------------------------------------


def test_no_server(path):
    with pytest.raises(ConnectError, match=f"^cannot connect to unix socket {path}: No such file or directory; is the server running\\?$"):
        UnixLink(path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(ConnectError, match="Connection refused; is the server running"):
        UnixLink(path)


@pytest.mark.parametrize(("name", "reason"), [("x" * 120, "AF_UNIX path too long"), ("a\0b", "has a null character")])
def test_names_that_no_socket_can_have(path, name, reason):
    with pytest.raises(ConnectError, match=reason):
        UnixLink(path.parent / name)


def test_a_server_that_does_not_accept(path):
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as queued:
        listening.bind(str(path))
        listening.listen(0)
        queued.connect(str(path))
        with pytest.raises(ConnectError, match=r"it did not accept within 0\.02 s"):
            UnixLink(path, connect_timeout_s=0.02)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (framed(ERROR, "the server is shutting down; é".encode()), "^the server is shutting down; é$"),
        (framed(REPLY, b"\x80"), "message type 0x15 came for the metadata, expected 0x11; is this a policy server"),
        (b"", "the server has closed it; is this the socket of a policy server"),
        (b"\0\0\0\0", "a message of length 0 came.*; is this the socket of a policy server"),
    ],
)
def test_servers_that_do_not_greet(path, answer, message):
    def server(peer):
        peer.read()
        peer.write(answer)

    with scripted(path, server), pytest.raises(ConnectError, match=message):
        UnixLink(path)


def test_a_server_that_is_not_ready_in_time(path):
    with scripted(path, Peer.until_end), pytest.raises(ConnectError, match=r"the server was not ready within 0\.02 s$"):
        UnixLink(path, ready_timeout_s=0.02)
