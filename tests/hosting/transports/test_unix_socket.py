import asyncio
import gc
import logging
import random
import socket
import stat
import struct
import weakref

import numpy as np
import pytest

from hosting.answers import MAX_UNFINISHED
from hosting.conversation import Conversation
from hosting.endpoint import Endpoint
from hosting.policy import ConfigError, MessageError
from hosting.protocol import local_frame, msgpack_numpy
from hosting.protocol.connection import Connection
from hosting.protocol.messages import Message, MessageType
from hosting.routing import action_route
from hosting.scheduler import SlotWorker
from hosting.transports import unix_socket
from hosting.transports.unix_socket import UnixSocketTransport, _Client, _Shared
from tests.hosting.gated import Gated, turns, until
from tests.hosting.protocol.fuzz import mutations
from tests.hosting.transports.unix_support import LIMIT, SECONDS, RawClient, Script, framed, serving, socket_directory
from tests.serving import EchoPolicy

INFER, REPLY, ERROR = MessageType.INFER, MessageType.REPLY, MessageType.ERROR


@pytest.fixture
def path():
    with socket_directory() as directory:
        yield directory / "s"


@pytest.fixture
async def script():
    return Script()


@pytest.fixture
async def action(path):
    """A whole action endpoint behind the socket."""
    worker = SlotWorker("action")
    endpoint = Endpoint("action", {"action": worker})
    policy = EchoPolicy()
    endpoint.open(action_route(policy), policy.metadata)
    async with serving(path, lambda: Conversation(endpoint, Connection(), transport="unix")) as transport:
        yield transport
    worker.close()


# --- conversations -------------------------------------------------------------------------------------------------------------------


async def test_a_client_of_openpi_flash(action, path):
    """Metadata, inferences and resets in its framing, byte by byte as its documentation has them."""
    async with RawClient(path) as client:
        await client.send(bytes.fromhex("00000001 01"))
        type, body = await client.read()
        assert type == 0x11 and msgpack_numpy.unpack(body)["action_horizon"] == 10
        obs = {"state": np.ones(14, np.float32), "images": {"cam_high": np.zeros((3, 224, 224), np.uint8)}, "prompt": "fold it"}
        for _ in range(2):
            type, body = await client.ask(local_frame.encode(obs, "aloha"), type=0x02)
            reply = local_frame.decode(body)
            assert type == 0x12 and reply.schema_id == "aloha"
            assert reply.value["actions"].shape == (10, 14) and reply.value["asked"] == {"prompt": "fold it"}
        assert reply.value["server_timing"]["prev_total_ms"] > 0
        await client.send(bytes.fromhex("00000001 03"))
        assert await client.read() == (0x14, b"")


async def test_a_bad_request_hurts_only_itself(action, path):
    async with RawClient(path) as client, RawClient(path) as other:
        type, body = await client.ask(b"no frame", type=0x02)
        assert type == 0x13 and b"\n" not in body
        type, body = await client.ask(b"", type=0x77)
        assert type == 0x13 and body.startswith(b"message type 0x77 is none that a server takes")
        for one in (client, other):
            assert (await one.ask(local_frame.encode({"prompt": "go"}), type=0x02))[0] == 0x12


async def test_many_clients_are_answered_at_once(script, path):
    async with serving(path, lambda: script):
        clients = [await RawClient(path).__aenter__() for _ in range(200)]
        active, idle = clients[:20], clients[20:]
        for index, client in enumerate(active):
            await client.send(framed(INFER, b"hold %d" % index))
        await script.until_holding(20)
        assert await idle[0].ask(b"meanwhile") == (REPLY, b"meanwhile")
        script.gate.set()
        for index, client in enumerate(active):
            assert await client.read() == (REPLY, b"hold %d" % index)
        for client in idle:
            assert await client.ask(b"still here") == (REPLY, b"still here")
            await client.__aexit__()
        for client in active:
            await client.__aexit__()


async def test_pipelined_messages_are_answered_in_order(script, path):
    bodies = [bytes([index]) * random.Random(index).choice((0, 1, 300, 70_000)) for index in range(100)]
    async with serving(path, lambda: script), RawClient(path) as client:
        sending = asyncio.create_task(client.send(b"".join(framed(INFER, body) for body in bodies)))
        assert [await client.read() for _ in bodies] == [(REPLY, body) for body in bodies]
        await sending
        assert await client.ask(b"after") == (REPLY, b"after")
    assert script.sent_count == len(bodies) + 1


@pytest.mark.parametrize("size", [0, 10_000, 65_536, 65_537, 3_000_000])
async def test_answers_of_all_sizes(script, path, size):
    async with serving(path, lambda: script), RawClient(path) as client:
        for _ in range(2):
            assert await client.ask(b"bytes %d" % size) == (REPLY, bytes(size))


async def test_a_message_of_the_largest_size(script, path):
    body = random.Random(1).randbytes(LIMIT)
    async with serving(path, lambda: script), RawClient(path) as client:
        assert await client.ask(body) == (REPLY, body)


async def test_a_half_closed_client_gets_its_answer(script, path):
    async with serving(path, lambda: script), RawClient(path) as client, RawClient(path) as other:
        await client.send(framed(INFER, b"hold"))
        await script.until_holding(1)
        client.end()
        for _ in range(5):  # by then the server has seen the end
            assert await other.ask(b"") == (REPLY, b"")
        script.gate.set()
        assert [await client.read(), await client.read()] == [(REPLY, b"hold"), None]


async def test_a_half_closed_client_gets_the_answers_to_all_it_sent(script, path):
    async with serving(path, lambda: script), RawClient(path) as client:
        await client.send(framed(INFER, b"hold 1") + framed(INFER, b"2") + framed(INFER, b"3") + b"\x00\x00")
        client.end()
        await script.until_holding(1)
        script.gate.set()
        assert [await client.read() for _ in range(4)] == [(REPLY, b"hold 1"), (REPLY, b"2"), (REPLY, b"3"), None]


async def test_a_client_that_is_gone_is_not_served_any_more(script, path):
    async with serving(path, lambda: script), RawClient(path) as other:
        await other.send(framed(INFER, b"hold other"))
        async with RawClient(path) as client:
            await client.send(framed(INFER, b"hold"))
            await script.until_holding(2)
            client.vanish()
            await asyncio.wait_for(script.cancelled.wait(), SECONDS)
        await script.until_holding(1)
        script.gate.set()
        assert await other.read() == (REPLY, b"hold other")


async def test_a_client_that_leaves_in_the_middle_of_a_message(script, path):
    async with serving(path, lambda: script) as transport:
        async with RawClient(path) as client:
            assert await client.ask(b"whole") == (REPLY, b"whole")
            (connection,) = transport._shared.clients
            await client.send(framed(INFER, bytes(1000))[:500])
        await asyncio.wait_for(connection.gone, SECONDS)
        async with RawClient(path) as client:
            assert await client.ask(b"fine") == (REPLY, b"fine")
    assert script.asked == [b"whole", b"fine"]


async def test_a_client_that_does_not_read_is_asked_nothing_more(script, path):
    """What was under way when its first answer jammed is held for it, and one message behind that."""
    size = 8 << 20  # more than the socket's buffers take
    async with serving(path, lambda: script), RawClient(path) as lazy, RawClient(path) as other:
        lazy._writer.transport.pause_reading()
        await lazy.send(framed(INFER, b"bytes %d" % size) * 6)
        for index in range(50):
            assert await other.ask(b"%d" % index) == (REPLY, b"%d" % index)
        assert script.asked.count(b"bytes %d" % size) == MAX_UNFINISHED
        lazy._writer.transport.resume_reading()
        for _ in range(6):
            assert await lazy.read() == (REPLY, bytes(size))


async def test_an_observation_is_let_go_before_a_slow_client_has_read_its_answer(path):
    seen, written = [], asyncio.Event()

    class Answers:
        async def answer(self, message):
            seen.append(weakref.ref(message.body.obj))
            return Message(REPLY, bytes(8 << 20))

        def sent(self):
            written.set()

        def close(self):
            pass

    async with serving(path, Answers), RawClient(path) as lazy, RawClient(path) as other:
        lazy._writer.transport.pause_reading()
        await lazy.send(framed(INFER, bytes(400_000)))
        assert (await other.ask(b""))[0] == REPLY
        assert written.is_set()
        gc.collect()
        assert len(seen) == 2 and seen[0]() is None
        lazy._writer.transport.resume_reading()
        assert (await lazy.read())[0] == REPLY


async def test_a_conversation_that_raises_is_an_error_for_that_request_alone(script, path, caplog):
    async with serving(path, lambda: script), RawClient(path) as client:
        assert await client.ask(b"raise") == (ERROR, b"internal error; the server's log has it")
        assert await client.ask(b"go on") == (REPLY, b"go on")
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.exc_info[0] is RuntimeError


async def test_an_answer_that_cannot_be_sent_closes_its_own_connection_only(script, path, caplog, monkeypatch):
    def header(type: int, size: int) -> bytes:
        raise MessageError("too large for its length field")

    async with serving(path, lambda: script), RawClient(path) as client, RawClient(path) as other:
        with monkeypatch.context() as patch:
            patch.setattr(unix_socket, "header", header)
            await client.send(framed(INFER, b"1") + framed(INFER, b"2"))
            assert await client.read() is None
        assert await other.ask(b"go on") == (REPLY, b"go on")
    assert any(record.exc_info and str(path) in record.getMessage() for record in caplog.records)


async def test_a_client_that_leaves_closes_its_conversation_once(path):
    conversations: list[Gated] = []

    def converse() -> Gated:
        conversations.append(Gated())
        return conversations[-1]

    async with serving(path, converse), RawClient(path) as other:
        async with RawClient(path) as client:
            await client.send(b"".join(framed(INFER, body) for body in (b"runs", b"waits")))
            await until(lambda: len(conversations) == 2 and len(conversations[1].held) == 2)
            client.vanish()
            await until(lambda: conversations[1].closed_count)
        await until(lambda: len(conversations[1].cancelled) == 2)
        await other.send(framed(INFER, b"x"))
        await until(lambda: conversations[0].held)
        assert [conversation.closed_count for conversation in conversations] == [0, 1]
        conversations[0].let(b"x")
        assert await other.read() == (REPLY, b"x")
    assert [conversation.closed_count for conversation in conversations] == [1, 1]


async def test_a_newer_request_reaches_the_conversation_while_an_older_one_is_under_way(path):
    gated = Gated()
    async with serving(path, lambda: gated), RawClient(path) as client:
        await client.send(b"".join(framed(INFER, b"%d" % number) for number in range(6)))
        await until(lambda: len(gated.held) == MAX_UNFINISHED)
        gated.let(b"1")
        await until(lambda: b"3" in gated.held)
        assert b"4" not in gated.asked
        for body in (b"3", b"2", b"0"):
            gated.let(body)
        await until(lambda: gated.held == [b"4", b"5"])
        gated.let(b"5")
        gated.let(b"4")
        assert [await client.read() for _ in range(6)] == [(REPLY, b"%d" % number) for number in range(6)]


@pytest.mark.parametrize("seed", range(5))
async def test_any_depth_and_any_order_of_completion(path, seed):
    chance, gated = random.Random(seed), Gated()
    count, sent, received = 300, 0, 0

    async def let() -> None:
        while received < count:
            if gated.held:
                gated.let(chance.choice(gated.held))
            await turns(chance.randrange(1, 5))

    async with serving(path, lambda: gated), RawClient(path) as client:
        letting = asyncio.create_task(let())
        while received < count:
            for _ in range(min(chance.randrange(1, 9), count - sent)):
                await client.send(framed(INFER, b"%d" % sent))
                sent += 1
            while received < sent and chance.random() < 0.8:
                assert await client.read() == (REPLY, b"%d" % received)
                received += 1
        await letting
    assert gated.sent_count == count


# --- clients that break the rules ----------------------------------------------------------------------------------------------------


async def test_a_message_over_the_limit_is_refused_with_the_reason(script, path):
    """The client is in the middle of sending it, and reads why when it has."""
    async with serving(path, lambda: script), RawClient(path) as client, RawClient(path) as other:
        await client.send(framed(INFER, bytes(20 * LIMIT)))
        assert await client.read() == (ERROR, b"the message has %d bytes, expected at most %d (max_message_bytes)" % (20 * LIMIT, LIMIT))
        assert await client.read() is None
        assert await other.ask(b"fine") == (REPLY, b"fine")
    assert script.asked == [b"fine"]


async def test_an_empty_message_is_refused_after_the_answers_before_it(script, path):
    async with serving(path, lambda: script), RawClient(path) as client:
        await client.send(framed(INFER, b"hold 1") + framed(INFER, b"2") + bytes(4) + bytes(100_000))
        await script.until_holding(1)
        script.gate.set()
        assert [await client.read(), await client.read()] == [(REPLY, b"hold 1"), (REPLY, b"2")]
        type, text = await client.read()
        assert type == ERROR and text.startswith(b"a message of length 0 came")
        assert await client.read() is None


async def test_who_goes_on_sending_after_a_refusal_is_cut_off(script, path, monkeypatch):
    monkeypatch.setattr(unix_socket, "_LINGER_S", 0.02)

    async def send_for_ever(client: RawClient) -> None:
        await client.send(struct.pack("!IB", LIMIT + 2, INFER))
        while True:
            await client.send(bytes(100_000))

    async with serving(path, lambda: script), RawClient(path) as client, asyncio.timeout(SECONDS):
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            await send_for_ever(client)


async def test_a_client_that_stalls_in_a_message_is_closed_and_one_that_waits_between_messages_is_not(script, path):
    async with serving(path, lambda: script, stall_timeout_s=0.05), RawClient(path) as idle, RawClient(path) as stalled, RawClient(path) as header:
        assert await idle.ask(b"before") == (REPLY, b"before")
        await stalled.send(framed(INFER, bytes(1000))[:-1])
        await header.send(b"\x00")
        for client in (stalled, header):
            assert await client.read() == (ERROR, b"nothing came for 0.05 s in the middle of a message; send each message whole")
            assert await client.read() is None
        assert await idle.ask(b"after") == (REPLY, b"after")


async def test_mode_and_end_of_the_socket_file(script, path):
    async with serving(path, lambda: script):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


# --- one connection in memory, with a clock ------------------------------------------------------------------------------------------


class MemoryTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.paused = self.ended = self.closed = False
        self._pair = socket.socketpair()

    def get_extra_info(self, name, default=None):
        return self._pair[0]

    def set_write_buffer_limits(self, high=None, low=None) -> None:
        self.high = high

    def write(self, data) -> None:
        self.sent += bytes(data)

    def write_eof(self) -> None:
        self.ended = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def close(self) -> None:
        self.closed = True

    abort = close

    def free(self) -> None:
        for end in self._pair:
            end.close()


class InMemory:
    def __init__(self, script) -> None:
        self.client = _Client(script, _Shared("a path", LIMIT, 30.0))
        self.transport = MemoryTransport()
        self.client.connection_made(self.transport)
        assert self.transport.high == 0, "written means that every byte is gone"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.connection_lost(None)
        self.transport.free()

    def receive(self, data: bytes) -> None:
        while data:
            assert not self.transport.paused, "the loop would not have read this"
            buffer = self.client.get_buffer(-1)
            count = min(len(buffer), len(data))
            buffer[:count] = data[:count]
            data = data[count:]
            self.client.buffer_updated(count)


@pytest.fixture
async def clock(monkeypatch):
    """Seconds that the event loop's clock is ahead, in a list of one."""
    loop, ahead = asyncio.get_running_loop(), [0.0]
    real = loop.time
    monkeypatch.setattr(loop, "time", lambda: real() + ahead[0])
    return ahead


async def test_one_message_is_read_behind_those_that_are_under_way(script):
    bodies = [b"hold %d" % number for number in range(MAX_UNFINISHED + 1)]
    with InMemory(script) as memory:
        for body in bodies[:-1]:
            memory.receive(framed(INFER, body))
            await turns()
            assert not memory.transport.paused, "the next message may come meanwhile"
        memory.receive(framed(INFER, bodies[-1]) + framed(INFER, b"last"))
        assert memory.transport.paused
        await turns()
        assert script.asked == bodies[:-1]
        script.gate.set()
        await turns()
        assert script.asked == [*bodies, b"last"] and not memory.transport.paused
        assert memory.transport.sent == b"".join(framed(REPLY, body) for body in script.asked)


async def test_messages_that_come_before_the_first_is_begun(script):
    with InMemory(script) as memory:
        memory.receive(framed(INFER, b"1"))
        memory.receive(framed(INFER, b"2"))
        await turns()
        assert script.asked == [b"1", b"2"]


async def test_a_connection_that_was_accepted_as_the_transport_closed(script):
    client, transport = _Client(script, _Shared("a path", LIMIT, 30.0, closed=True)), MemoryTransport()
    client.connection_made(transport)
    assert transport.closed
    client.connection_lost(None)
    transport.free()


async def test_nothing_is_left_to_happen_to_a_lost_connection(script, clock):
    with InMemory(script) as memory:
        memory.receive(b"\x00")
    clock[0] += 31
    await turns()
    assert not memory.transport.sent


async def test_a_message_may_take_long_as_long_as_something_comes(script, clock):
    with InMemory(script) as memory:
        message = framed(INFER, b"slowly")
        for byte in message[:-1]:
            memory.receive(bytes([byte]))
            clock[0] += 29
            await turns()
        memory.receive(message[-1:])
        await turns()
        assert memory.transport.sent == framed(REPLY, b"slowly")
        clock[0] += 1000
        await turns()
        memory.receive(message[:1])
        clock[0] += 29
        await turns()
        assert memory.transport.sent == framed(REPLY, b"slowly") and not memory.transport.ended
        clock[0] += 2
        await turns()
        assert memory.transport.sent[len(framed(REPLY, b"slowly")) + 5 :].startswith(b"nothing came for 30 s") and memory.transport.ended


async def test_a_client_that_is_not_read_does_not_stall(script, clock):
    """Its bytes may be there; they wait behind the message that is read last."""
    bodies = [b"hold %d" % number for number in range(MAX_UNFINISHED)]
    with InMemory(script) as memory:
        memory.receive(b"".join(framed(INFER, body) for body in bodies))
        await turns()
        behind, last = framed(INFER, b"behind"), framed(INFER, b"last")
        memory.receive(behind[:3])
        memory.receive(behind[3:] + last[:3])
        clock[0] += 1000
        await turns()
        assert memory.transport.paused and not memory.transport.sent
        script.gate.set()
        await turns()
        memory.receive(last[3:])
        await turns()
        assert memory.transport.sent == b"".join(framed(REPLY, body) for body in (*bodies, b"behind", b"last"))


async def test_a_stall_behind_a_request_under_way_is_told_after_its_answer(script, clock):
    with InMemory(script) as memory:
        memory.receive(framed(INFER, b"hold 1") + b"\x00")
        await turns()
        clock[0] += 31
        await turns()
        assert memory.transport.paused and not memory.transport.sent
        script.gate.set()
        await turns()
        first = framed(REPLY, b"hold 1")
        assert memory.transport.sent.startswith(first) and memory.transport.sent[len(first) + 4] == ERROR
        assert memory.transport.ended and not memory.transport.paused, "what still comes is read and dropped"
        clock[0] += 6
        await turns()
        assert memory.transport.closed


# --- the path ------------------------------------------------------------------------------------------------------------------------


async def test_clients_may_come_before_the_transport_starts(script, path):
    transport = UnixSocketTransport(path, lambda: script, max_message_bytes=LIMIT)
    transport.bind()
    async with RawClient(path) as client:
        await client.send(framed(INFER, b"early"))
        await transport.start()
        assert await client.read() == (REPLY, b"early")
        await transport.close()
        assert await client.read() is None


async def test_close_before_start(script, path):
    transport = UnixSocketTransport(path, lambda: script, max_message_bytes=LIMIT)
    transport.bind()
    await transport.close()
    assert not path.exists()
    await UnixSocketTransport(path, lambda: script, max_message_bytes=LIMIT).close()


async def test_the_path_of_a_live_server_is_refused_and_goes_on_serving(script, path):
    async with serving(path, lambda: script):
        with pytest.raises(ConfigError, match=f"^unix socket {path} is in use by another server; "):
            UnixSocketTransport(path, lambda: script, max_message_bytes=LIMIT).bind()
        async with RawClient(path) as client:
            assert await client.ask(b"fine") == (REPLY, b"fine")


async def test_a_path_that_is_anothers_by_now_is_left_alone(script, path):
    async with serving(path, lambda: script):
        path.unlink()
        path.write_text("mine")
    assert path.read_text() == "mine"


async def test_the_granted_buffers_are_logged_once(script, path, caplog):
    caplog.set_level(logging.DEBUG, unix_socket.__name__)
    async with serving(path, lambda: script):
        for _ in range(3):
            async with RawClient(path) as client:
                await client.ask(b"")
    assert sum("connections get buffers of" in record.getMessage() for record in caplog.records) == 1


# --- leaving -------------------------------------------------------------------------------------------------------------------------


async def test_draining(script, path):
    async with serving(path, lambda: script) as transport, RawClient(path) as idle, RawClient(path) as busy:
        assert await idle.ask(b"x") == (REPLY, b"x")
        await busy.send(framed(INFER, b"hold") * MAX_UNFINISHED + framed(INFER, b"not any more"))
        await script.until_holding(MAX_UNFINISHED)
        await transport.close_idle()
        assert await idle.read() is None
        async with RawClient(path) as late:
            await late.send(framed(INFER, b"late") + framed(INFER, b"too late"))
            assert await late.read() == (REPLY, b"late")
            assert await late.read() is None
        script.gate.set()
        for _ in range(MAX_UNFINISHED):
            assert await busy.read() == (REPLY, b"hold")
        assert await busy.read() is None
    assert b"not any more" not in script.asked and b"too late" not in script.asked


async def test_a_request_that_comes_in_a_drain_is_not_begun(path):
    gated = Gated()
    async with serving(path, lambda: gated) as transport, RawClient(path) as busy, RawClient(path) as other:
        await busy.send(framed(INFER, b"begun"))
        await other.send(framed(INFER, b"another's"))
        await until(lambda: len(gated.held) == 2)
        await transport.close_idle()
        await busy.send(framed(INFER, b"not begun"))
        gated.let(b"another's")
        assert [await other.read(), await other.read()] == [(REPLY, b"another's"), None]  # by then the server has read it
        gated.let(b"begun")
        assert [await busy.read(), await busy.read()] == [(REPLY, b"begun"), None]
    assert b"not begun" not in gated.asked


async def test_close_lets_answers_go_out(script, path):
    async with serving(path, lambda: script) as transport, RawClient(path) as client:
        await client.send(framed(INFER, b"hold"))
        await script.until_holding(1)
        closing = asyncio.create_task(transport.close())
        await turns()
        assert not path.exists() and not closing.done()
        script.gate.set()
        assert await client.read() == (REPLY, b"hold")
        await closing


async def test_close_does_not_wait_for_ever(script, path, monkeypatch):
    monkeypatch.setattr(unix_socket, "_CLOSE_S", 0.02)
    async with serving(path, lambda: script) as transport, RawClient(path) as stuck, RawClient(path) as lazy:
        await stuck.send(framed(INFER, b"hold"))
        lazy._writer.transport.pause_reading()
        await lazy.send(framed(INFER, b"bytes %d" % (8 << 20)))
        await script.until_holding(1)
        await transport.close()
        assert script.cancelled.is_set() and not transport._shared.clients
        assert await stuck.read() is None


# --- hostile input -------------------------------------------------------------------------------------------------------------------


async def test_damaged_streams(action, path):
    """Whatever comes is answered with whole messages or the end of the stream, and a good client never notices."""
    rng = random.Random(7)
    obs = {"state": np.ones(4, np.float32), "image": np.zeros((4, 4, 3), np.uint8), "prompt": "fold"}
    bodies = [(0x01, b""), (0x01, msgpack_numpy.pack({"api_key": "k"})), (0x03, b""), (0x03, msgpack_numpy.pack({"session_id": "s"}))]
    bodies += [(0x02, local_frame.encode(obs, "aloha")), (0x04, msgpack_numpy.pack(obs)), (0x04, msgpack_numpy.pack({"batch": [obs, obs]}))]
    whole = [framed(type, body) for type, body in bodies]
    answers = {
        MessageType.METADATA_REPLY,
        MessageType.FRAME_REPLY,
        MessageType.ERROR,
        MessageType.RESET_REPLY,
        MessageType.REPLY,
        MessageType.FAILURE,
    }

    async def damaged_bodies() -> None:
        """Well framed: the connection must stay."""
        async with RawClient(path) as client:
            for index, body in enumerate(mutations([body for _, body in bodies], rng, 7000)):
                type, _ = await client.ask(body, type=rng.choice((0x01, 0x02, 0x02, 0x03, 0x04, 0x04, rng.randrange(256))))
                assert type in answers, (index, body.hex())

    async def damaged_framing() -> None:
        for stream in mutations([*whole, whole[0] + whole[4] + whole[2], whole[5] * 3], rng, 3000):
            async with RawClient(path) as client:
                try:
                    await client.send(stream)
                    client.end()
                    while (answer := await client.read()) is not None:
                        assert answer[0] in answers, stream.hex()
                except (BrokenPipeError, ConnectionResetError):
                    pass  # refused and closed before all of it was sent

    async def good_client() -> None:
        async with RawClient(path) as client:
            while not done.is_set():
                assert (await client.ask(whole[4][5:], type=0x02))[0] == 0x12

    done = asyncio.Event()
    good = asyncio.create_task(good_client())
    await asyncio.gather(damaged_bodies(), damaged_framing())
    done.set()
    await good
    async with RawClient(path) as client:
        assert (await client.ask(whole[4][5:], type=0x02))[0] == 0x12
