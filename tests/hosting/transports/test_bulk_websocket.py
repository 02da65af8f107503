"""The short way in for large messages: beside its parent in memory, then over real sockets."""

import asyncio
import contextlib
import itertools
import os
import random
import socket
import struct
import threading

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.exceptions import ConnectionClosedError
from websockets.frames import Frame, Opcode
from websockets.sync.client import connect

from hosting.config import WebSocketConfig
from hosting.listeners import server_config
from hosting.transports.bulk_websocket import BulkWebSocketProtocol

MAX_SIZE = 400_000
NOISE = random.Random(0).randbytes(8 * 1024 * 1024)
UPGRADE = (
    b"GET /some/path HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, mask: bool = True) -> bytes:
    return Frame(Opcode(opcode), payload, fin).serialize(mask=mask)


def long_form(payload: bytes, first: int = 0x82) -> bytes:
    """A masked frame with a 64-bit length, however short it is."""
    key = b"\x01\x80\xfe\x37"
    return struct.pack("!BBQ", first, 0xFF, len(payload)) + key + bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))


class MemoryTransport(asyncio.Transport):
    """Keeps what is written; data is handed to the protocol as asyncio's socket transport does."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closing = self.paused = self.aborted = False
        self.pauses = self.unsent = 0

    def write(self, data) -> None:
        self.sent += bytes(data)

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.paused = True
        self.pauses += 1

    def resume_reading(self) -> None:
        self.paused = False


class InMemory:
    """One connection of ``kind`` whose app notes every event; ``go`` lets the app take events."""

    def __init__(self, kind, max_size: int = MAX_SIZE) -> None:
        self.events: list[dict] = []
        self.go = asyncio.Event()
        self.go.set()
        config = uvicorn.Config(self.app, ws_max_size=max_size, ws_per_message_deflate=False, interface="asgi3", lifespan="off", log_config=None)
        config.load()
        self.protocol = kind(config, ServerState(), {})
        self.transport = MemoryTransport()
        self.protocol.connection_made(self.transport)
        self.protocol.data_received(UPGRADE)

    async def app(self, scope, receive, send) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        while True:
            await self.go.wait()
            event = await receive()
            self.events.append({**event, "bytes": bytes(event["bytes"])} if "bytes" in event else event)
            if event["type"] == "websocket.disconnect":
                return

    async def ready(self) -> None:
        while b"\r\n\r\n" not in self.transport.sent:
            await asyncio.sleep(0)
        assert self.transport.sent.startswith(b"HTTP/1.1 101 ")
        await self.settle()
        self.transport.sent = b""

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def feed(self, data: bytes) -> None:
        """All of ``data`` as one read may bring it, as long as the protocol reads."""
        while data and not self.transport.closing:
            if self.transport.paused:
                await self.settle()
                continue
            if isinstance(self.protocol, asyncio.BufferedProtocol):
                buffer = self.protocol.get_buffer(-1)
                count = min(len(buffer), len(data))
                assert count
                buffer[:count] = data[:count]
                self.protocol.buffer_updated(count)
                data = data[count:]
            else:
                self.protocol.data_received(data)
                return

    async def end(self) -> None:
        await self.settle()
        self.protocol.connection_lost(None)
        await self.settle()


async def conversation(kind, pieces: list[bytes]) -> tuple[list[dict], bytes]:
    """What the app sees and the client gets when the client sends ``pieces`` and then leaves."""
    connection = InMemory(kind)
    await connection.ready()
    for piece in pieces:
        await connection.feed(piece)
        await connection.settle()
    await connection.end()
    return connection.events, connection.transport.sent


SIZES = st.sampled_from([0, 1, 7, 125, 126, 1000, 4095, 4096, 40_003, 65535, 65536, 65537, 65543, 200_003, MAX_SIZE])
PAYLOADS = SIZES.map(lambda size: NOISE[:size])
CONTROL = st.sampled_from([frame(Opcode.PING, b"are you there"), frame(Opcode.PONG, b"unasked"), frame(Opcode.PING)])


@st.composite
def messages(draw) -> list[bytes]:
    """One message as its frames, control frames between the fragments."""
    kind = draw(st.sampled_from(["binary", "binary", "long form", "text", "fragments", "control"]))
    if kind == "control":
        return [draw(CONTROL)]
    if kind == "long form":
        return [long_form(draw(st.binary(max_size=300)))]
    if kind == "text":
        return [frame(Opcode.TEXT, b"x" * draw(SIZES))]
    if kind == "binary":
        return [frame(Opcode.BINARY, draw(PAYLOADS))]
    parts = [NOISE[:size] for size in draw(st.lists(st.sampled_from([0, 1, 130, 65536, 70_000]), min_size=2, max_size=4))]
    frames = [frame(Opcode.CONT if i else Opcode.BINARY, part, fin=i == len(parts) - 1) for i, part in enumerate(parts)]
    return [piece for one in frames for piece in (*draw(st.lists(CONTROL, max_size=1)), one)]


ENDINGS = {
    "none": [],
    "close": [frame(Opcode.CLOSE, struct.pack("!H", 1000) + b"bye"), frame(Opcode.BINARY, NOISE[:70_000])],
    "unmasked": [frame(Opcode.BINARY, NOISE[:70_000], mask=False)],
    "reserved bit": [long_form(NOISE[:500], first=0xC2)],
    "unknown opcode": [long_form(b"", first=0x83)],
    "too big": [frame(Opcode.BINARY, NOISE[: MAX_SIZE + 1])],
    "far too big": [struct.pack("!BBQ", 0x82, 0xFF, 2**63) + b"mask"],
    "continuation of nothing": [frame(Opcode.CONT, NOISE[:70_000])],
    "message inside a message": [frame(Opcode.BINARY, b"a", fin=False), frame(Opcode.BINARY, NOISE[:70_000])],
    "fragments too big": [frame(Opcode.BINARY, NOISE[:MAX_SIZE], fin=False), frame(Opcode.CONT, b"x")],
    "fragmented ping": [long_form(b"", first=0x09)],
    "long ping": [long_form(NOISE[:126], first=0x89)],
    "text that is none": [frame(Opcode.TEXT, b"ab\xff"), frame(Opcode.TEXT, b"x")],
    "text whose end is missing": [frame(Opcode.TEXT, b"\xc3", fin=False), frame(Opcode.CONT)],
    "half a header": [frame(Opcode.BINARY, NOISE[:70_000])[:9]],
    "half a frame": [frame(Opcode.BINARY, NOISE[:70_000])[:-1]],
}


def cut(data: bytes, source: random.Random) -> list[bytes]:
    """``data`` in pieces as TCP may bring them: some tiny, some large."""
    places = {0, len(data)}
    for _ in range(source.randrange(8)):
        places.add(source.randrange(len(data) + 1))
    near = source.randrange(len(data) + 1)
    places.update(place for place in range(near, near + source.randrange(20)) if place <= len(data))
    return [data[a:b] for a, b in itertools.pairwise(sorted(places))]


@settings(max_examples=60, deadline=None)
@given(sent=st.lists(messages(), max_size=4), ending=st.sampled_from(sorted(ENDINGS)), source=st.randoms(use_true_random=False))
def test_same_events_and_answers_as_the_parent(sent, ending, source):
    frames = [*itertools.chain(*sent), *ENDINGS[ending]]
    expected = asyncio.run(conversation(WebSocketsSansIOProtocol, frames))
    assert asyncio.run(conversation(BulkWebSocketProtocol, cut(b"".join(frames), source))) == expected


@pytest.mark.parametrize("ending", ENDINGS)
def test_endings_byte_by_byte_and_at_once(ending):
    frames = [frame(Opcode.BINARY, NOISE[:70_000]), *ENDINGS[ending]]
    expected = asyncio.run(conversation(WebSocketsSansIOProtocol, frames))
    whole = b"".join(frames)
    assert asyncio.run(conversation(BulkWebSocketProtocol, [whole])) == expected
    dribble = [whole[:70_000], *(whole[i : i + 1] for i in range(70_000, 70_100)), whole[70_100:]]
    assert asyncio.run(conversation(BulkWebSocketProtocol, [piece for piece in dribble if piece])) == expected


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("unmasked", 1002),
        ("reserved bit", 1002),
        ("unknown opcode", 1002),
        ("too big", 1009),
        ("far too big", 1009),
        ("message inside a message", 1002),
    ],
)
def test_violations_close_the_connection(ending, code):
    events, sent = asyncio.run(conversation(BulkWebSocketProtocol, ENDINGS[ending]))
    assert events[-1]["type"] == "websocket.disconnect" and events[-1]["code"] == code
    assert sent[0] == 0x88 and struct.unpack("!H", sent[2:4]) == (code,)


@pytest.mark.parametrize("ending", ["text that is none", "text whose end is missing"])
def test_text_that_is_none_leaves_no_traceback_in_the_log(caplog, ending):
    events, _ = asyncio.run(conversation(BulkWebSocketProtocol, ENDINGS[ending]))
    assert events[-1]["code"] == 1007 and not caplog.records


async def test_all_data_may_also_come_through_data_received():
    connection = InMemory(BulkWebSocketProtocol)
    await connection.ready()
    data = frame(Opcode.BINARY, NOISE[:300_000]) + frame(Opcode.PING, b"x") + frame(Opcode.BINARY, NOISE[:65536])
    for piece in cut(data, random.Random(1)):
        connection.protocol.data_received(piece)
        await connection.settle()
    assert [event["bytes"] for event in connection.events] == [NOISE[:300_000], NOISE[:65536]]
    assert connection.transport.sent == frame(Opcode.PONG, b"x", mask=False)
    await connection.end()


@pytest.mark.parametrize("size", [100, 200_000])
async def test_reading_pauses_behind_a_message_that_the_app_does_not_wait_for(size):
    connection = InMemory(BulkWebSocketProtocol)
    await connection.ready()
    connection.go.clear()
    await connection.feed(frame(Opcode.BINARY, NOISE[:size]))  # taken at once: the app was waiting
    await connection.settle()
    assert len(connection.events) == 1 and not connection.transport.paused
    await connection.feed(frame(Opcode.PING, b"x"))
    assert connection.transport.sent == frame(Opcode.PONG, b"x", mask=False)
    await connection.feed(frame(Opcode.BINARY, NOISE[:size]))
    await connection.settle()
    assert len(connection.events) == 1 and connection.transport.paused
    connection.go.set()
    await connection.settle()
    assert len(connection.events) == 2 and not connection.transport.paused
    await connection.end()


async def test_a_client_whose_pong_is_not_read_is_not_dropped_for_it():
    connection = InMemory(BulkWebSocketProtocol)
    await connection.ready()
    connection.go.clear()
    for _ in range(2):
        await connection.feed(frame(Opcode.BINARY, NOISE[:100]))
        await connection.settle()
    assert connection.transport.paused
    connection.protocol.send_keepalive_ping()
    connection.protocol.pong_timer._run()
    assert not connection.transport.closing and connection.protocol.ping_timer is not None
    connection.go.set()
    await connection.settle()
    connection.protocol.send_keepalive_ping()
    connection.protocol.pong_timer._run()
    assert connection.transport.closing, "now it could have been read"
    await connection.end()


def ping_unanswered(connection: InMemory) -> bool:
    """A ping goes out, and its time passes; whether the client keeps its connection."""
    connection.protocol.send_keepalive_ping()
    connection.protocol.pong_timer._run()
    return not connection.transport.closing


@pytest.mark.parametrize("size", [70_000, 300_000])
@pytest.mark.parametrize("fragmented", [False, True])
async def test_a_client_in_the_middle_of_a_long_message_keeps_its_connection_while_it_goes_on(size, fragmented):
    connection = InMemory(BulkWebSocketProtocol)
    await connection.ready()
    message = frame(Opcode.BINARY, NOISE[:size], fin=not fragmented)
    connection.protocol.send_keepalive_ping()
    while len(message) > 20_000:
        await connection.feed(message[:20_000])
        message = message[20_000:]
        connection.protocol.pong_timer._run()
        assert not connection.transport.closing
        connection.protocol.send_keepalive_ping()
    await connection.feed(message)
    if fragmented:
        await connection.feed(frame(Opcode.CONT))
    await connection.settle()
    assert [event["bytes"] for event in connection.events] == [NOISE[:size]]
    await connection.end()


@pytest.mark.parametrize("dribble", [0, 1, 16_000])
async def test_a_client_that_stalls_or_dribbles_in_the_middle_of_a_message_is_dropped(dribble):
    connection = InMemory(BulkWebSocketProtocol)
    await connection.ready()
    await connection.feed(frame(Opcode.BINARY, NOISE[:300_000])[:100_000])
    connection.protocol.send_keepalive_ping()
    await connection.feed(NOISE[:dribble])
    connection.protocol.pong_timer._run()
    assert connection.transport.closing
    assert connection.transport.sent.endswith(frame(Opcode.CLOSE, struct.pack("!H", 1011) + b"keepalive ping timeout", mask=False))
    await connection.end()


async def test_a_client_that_takes_a_long_reply_slowly_keeps_its_connection_while_it_goes_on():
    connection = InMemory(BulkWebSocketProtocol)
    await connection.ready()
    for unsent in (500_000, 300_000, 1):
        connection.transport.unsent = unsent + 1
        connection.protocol.send_keepalive_ping()
        connection.transport.unsent = unsent
        connection.protocol.pong_timer._run()
        assert not connection.transport.closing
    connection.transport.unsent = 0
    assert not ping_unanswered(connection)
    await connection.end()


async def test_a_client_that_reads_nothing_is_dropped_though_its_messages_wait_and_at_last_without_a_farewell():
    connection = InMemory(BulkWebSocketProtocol)
    await connection.ready()
    connection.go.clear()
    for _ in range(2):
        await connection.feed(frame(Opcode.BINARY, NOISE[:100]))
        await connection.settle()
    connection.transport.unsent = 200_000
    assert connection.transport.paused and not ping_unanswered(connection)
    assert not connection.transport.aborted, "what was sent before may still reach it"
    connection.transport.unsent = 100_000
    connection.protocol.ping_timer._run()
    assert not connection.transport.aborted, "it does"
    connection.protocol.ping_timer._run()
    assert connection.transport.aborted
    await connection.end()
    assert connection.protocol.ping_timer is None


@pytest.mark.parametrize("how", ["client", "server"])
async def test_a_connection_that_is_closed_but_never_emptied_is_dropped(how):
    connection = InMemory(BulkWebSocketProtocol)
    await connection.ready()
    connection.protocol.start_keepalive()
    connection.transport.unsent = 200_000
    if how == "client":
        await connection.feed(frame(Opcode.CLOSE, struct.pack("!H", 1000)))
    else:
        await connection.protocol.send({"type": "websocket.close", "code": 1001})
        connection.protocol.close_timer._run()
    assert connection.transport.closing and not connection.transport.aborted
    connection.protocol.ping_timer._run()
    connection.protocol.ping_timer._run()
    assert connection.transport.aborted
    await connection.end()


@pytest.mark.parametrize("size", [100, 65536])
async def test_reading_goes_on_without_a_pause_while_the_app_waits(size):
    connection = InMemory(BulkWebSocketProtocol)
    await connection.ready()
    for _ in range(3):
        await connection.feed(frame(Opcode.BINARY, NOISE[:size]))
        await connection.settle()
    assert len(connection.events) == 3 and connection.transport.pauses == 0
    await connection.feed(2 * frame(Opcode.BINARY, NOISE[:size]))
    assert connection.transport.paused, "the second came before the app could take the first"
    await connection.settle()
    assert len(connection.events) == 5 and not connection.transport.paused
    await connection.end()


@pytest.mark.parametrize("kind", [BulkWebSocketProtocol, WebSocketsSansIOProtocol])
async def test_what_comes_after_the_servers_close_is_dropped(kind):
    connection = InMemory(kind)
    await connection.ready()
    await connection.protocol.send({"type": "websocket.close", "code": 1001})
    await connection.feed(frame(Opcode.BINARY, NOISE[:100_000]))
    await connection.feed(frame(Opcode.BINARY, NOISE[:100_000]))
    assert not connection.transport.paused and not connection.transport.closing
    await connection.feed(frame(Opcode.CLOSE, struct.pack("!H", 1001)))
    await connection.settle()
    assert (connection.transport.closing or connection.protocol.close_timer is not None) and connection.protocol.queue.empty()
    assert [event["type"] for event in connection.events] == ["websocket.disconnect"]
    await connection.end()


@pytest.mark.parametrize("ending", ["close", "unmasked", "too big", "continuation of nothing"])
async def test_what_comes_after_the_end_is_dropped(ending):
    connection = InMemory(BulkWebSocketProtocol)
    await connection.ready()
    connection.protocol.data_received(b"".join(ENDINGS[ending]) + frame(Opcode.BINARY, NOISE[:100_000]))
    await connection.settle()
    assert (connection.transport.closing or connection.protocol.close_timer is not None) and connection.protocol.queue.empty()
    assert [event["type"] for event in connection.events] == ["websocket.disconnect"]
    await connection.end()


async def test_a_header_alone_reserves_little_and_more_only_as_data_comes():
    connection = InMemory(BulkWebSocketProtocol, max_size=64 * 1024 * 1024)
    await connection.ready()
    length, arrived = 48 * 1024 * 1024, 0
    await connection.feed(struct.pack("!BBQ", 0x82, 0xFF, length) + b"mask")
    while arrived < length:
        free = connection.protocol.get_buffer(-1)
        assert len(free) <= length - arrived
        assert arrived + len(free) <= max(1024 * 1024, 4 * arrived)
        count = min(len(free), 300_000)
        connection.protocol.buffer_updated(count)
        arrived += count
    await connection.settle()
    assert [len(event["bytes"]) for event in connection.events] == [length]
    assert len(connection.protocol.get_buffer(-1)) <= 1024 * 1024 + 14  # a frame as large is not expected on its word either
    await connection.feed(frame(Opcode.PING))
    assert len(connection.protocol.get_buffer(-1)) <= 16 * 1024 + 14
    await connection.end()


# Over real sockets


@contextlib.contextmanager
def serving(app, max_size: int = 16 * 1024 * 1024):
    """``app`` as the service serves it, in a thread; yields the address."""
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(server_config(app, max_message_bytes=max_size, kept=WebSocketConfig()))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
    thread.start()
    try:
        yield bound.getsockname()
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


async def echo(scope, receive, send) -> None:
    """Sends every message back; for the binary message ``b"type"`` the type of the binary message before it."""
    await receive()
    await send({"type": "websocket.accept"})
    kind = ""
    while (event := await receive())["type"] == "websocket.receive":
        if event.get("bytes") == b"type":
            await send({"type": "websocket.send", "text": kind})
        elif event.get("bytes") is not None:
            kind = type(event["bytes"]).__name__
            await send({"type": "websocket.send", "bytes": bytes(event["bytes"])})
        else:
            await send({"type": "websocket.send", "text": event["text"]})


@pytest.fixture(scope="module")
def echoing():
    with serving(echo) as address:
        yield address


def client(address):
    return connect(f"ws://{address[0]}:{address[1]}", compression=None, max_size=None)


def test_sizes_around_every_header_boundary(echoing):
    with client(echoing) as websocket:
        for size in [0, 1, 125, 126, 4095, 4096, 45_001, 45_001, 65535, 65536, 65537, 1024 * 1024, 5 * 1024 * 1024 + 3, 65536, 2, 70_001]:
            websocket.send(NOISE[:size])
            assert websocket.recv() == NOISE[:size]
            websocket.send("text " + "x" * min(size, 100_000))
            assert websocket.recv() == "text " + "x" * min(size, 100_000)
            assert websocket.ping().wait(10)


def test_a_large_message_takes_the_short_way(echoing):
    """Notices when uvicorn no longer drives the protocol as this one expects."""
    with client(echoing) as websocket:
        for size, kind in [(4095, "bytes"), (4096, "memoryview"), (65535, "memoryview"), (65536, "memoryview"), (500_000, "memoryview")]:
            websocket.send(NOISE[:size])
            websocket.recv()
            websocket.send(b"type")
            assert websocket.recv() == kind


def test_fragmented_messages(echoing):
    with client(echoing) as websocket:
        for sizes in [(0, 1), (70_000, 70_000), (1, 65536, 0, 300_000), (126, 125)]:
            parts = [NOISE[:size] for size in sizes]
            websocket.send(iter(parts))
            assert websocket.recv() == b"".join(parts)


def test_more_than_the_maximum(echoing):
    with serving(echo, max_size=100_000) as address, client(address) as websocket:
        websocket.send(NOISE[:100_000])
        assert websocket.recv() == NOISE[:100_000]
        websocket.send(NOISE[:100_001])
        with pytest.raises(ConnectionClosedError) as caught:
            websocket.recv()
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009


def raw(address) -> socket.socket:
    """A connection after its handshake."""
    connection = socket.create_connection(address, timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(UPGRADE)
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += connection.recv(1)
    assert answer.startswith(b"HTTP/1.1 101 ")
    return connection


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (b"".join(b"X-%d: y\r\n" % number for number in range(200)), "128 headers"),
        (b"X: " + b"y" * 9000 + b"\r\n", "8192 bytes"),
        (b"Content-Length: 5\r\n", "unsupported request body"),
        (b"Transfer-Encoding: chunked\r\n", "transfer codings aren't supported"),
    ],
)
def test_an_upgrade_that_the_parser_refuses_is_answered_and_closed(echoing, caplog, more, reason):
    with socket.create_connection(echoing, timeout=10) as connection:
        connection.sendall(UPGRADE.replace(b"\r\n\r\n", b"\r\n" + more + b"\r\n"))
        received = b""
        while piece := connection.recv(1 << 16):
            received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 ")) and b"Content-Length: %d" % len(body) in head
    assert reason in body.decode().lower()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_an_app_that_answers_a_client_which_broke_the_rules_hears_that_it_has_gone():
    connection = InMemory(BulkWebSocketProtocol)
    await connection.ready()
    connection.go.clear()
    await connection.feed(frame(Opcode.BINARY, NOISE[:100]) + frame(Opcode.BINARY, b"x", mask=False))
    with pytest.raises(ClientDisconnected):
        await connection.protocol.send({"type": "websocket.send", "bytes": b"an answer"})
    connection.go.set()
    await connection.settle()
    assert [event["type"] for event in connection.events] == ["websocket.receive", "websocket.disconnect"]
    await connection.end()


def receive_exactly(connection: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        piece = connection.recv(min(count - len(received), 1 << 20))
        assert piece, "the server closed the connection"
        received += piece
    return bytes(received)


@settings(max_examples=10, deadline=None)
@given(source=st.randoms(use_true_random=False))
def test_random_segments_of_pipelined_messages(echoing, source):
    sizes = [source.choice([0, 125, 126, 65535, 65536, 65537, 150_001]) for _ in range(4)]
    sent = b"".join(frame(Opcode.BINARY, NOISE[:size]) for size in sizes)
    expected = b"".join(frame(Opcode.BINARY, NOISE[:size], mask=False) for size in sizes)
    with raw(echoing) as connection:
        for piece in cut(sent, source):
            connection.sendall(piece)
        assert receive_exactly(connection, len(expected)) == expected


def test_a_client_that_leaves_in_the_middle_of_a_frame_hurts_nobody(echoing):
    for kept in (5, 14, 1000, 69_999):
        with raw(echoing) as connection:
            connection.sendall(frame(Opcode.BINARY, NOISE[:70_000])[:kept])
    with client(echoing) as websocket:
        websocket.send(NOISE[:70_000])
        assert websocket.recv() == NOISE[:70_000]


def test_many_connections_at_once(echoing):
    payloads = [os.urandom(65536 + 1000 * i) for i in range(32)]
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(client(echoing)) for _ in payloads]
        for _ in range(3):
            for websocket, payload in zip(sockets, payloads, strict=True):
                websocket.send(payload)
            for websocket, payload in zip(sockets, payloads, strict=True):
                assert websocket.recv() == payload


def test_a_client_in_the_middle_of_a_message_that_is_too_large_is_told_so(echoing):
    """More than the socket buffers hold, so that the client is still sending when the server has seen enough."""
    with serving(echo, max_size=100_000) as address, client(address) as websocket:
        websocket.send(bytes(20_000_000))
        with pytest.raises(ConnectionClosedError) as caught:
            websocket.recv(timeout=30)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009


async def test_after_a_violation_what_still_comes_is_dropped_and_the_end_is_bounded():
    connection = InMemory(BulkWebSocketProtocol, max_size=1000)
    await connection.ready()
    await connection.feed(frame(Opcode.BINARY, NOISE[:70_000]))
    await connection.feed(frame(Opcode.BINARY, NOISE[:100]) + frame(Opcode.PING, b"x"))
    await connection.settle()
    assert [event["type"] for event in connection.events] == ["websocket.disconnect"]
    assert connection.events[0]["code"] == 1009
    assert not connection.transport.closing, "the client may still be sending"
    timer = connection.protocol.close_timer
    assert timer is not None
    timer._run()
    assert connection.transport.closing, "but not for ever"
    await connection.end()
