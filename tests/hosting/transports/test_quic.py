"""The QUIC endpoint through real sockets: many clients, cancellations, limits, hostile datagrams, draining and closing."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import threading
import time

import pytest

from hosting.clients.errors import ConnectError, ConnectionLostError, ReplyTimeoutError
from hosting.clients.quic import QuicLink
from hosting.clients.quic_channel import pump
from hosting.protocol.messages import Message, MessageType
from hosting.protocol.striping import split
from hosting.transports.quic import CLOSING_REASON, QuicTransport
from hosting.udp import Received, UdpSocket
from pi0.errors import ConfigError
from tests.hosting.quic_support import LIMIT, LiveServer, certificate, digest, serving

TIMEOUT_S = 20.0


def link_to(server: LiveServer, **options) -> QuicLink:
    return QuicLink(server.host, server.port, pin=certificate().sha256, **options)


def ask(link: QuicLink, body: bytes, timeout_s: float | None = TIMEOUT_S) -> bytes:
    answer = link.exchange(MessageType.INFER, [body], timeout_s)
    assert answer.type == MessageType.REPLY, bytes(answer.body[:200])
    return bytes(answer.body)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_requests_are_answered(host):
    with serving(host=host) as server:
        link = link_to(server)
        for size in (0, 1, 10_000, 450_000, LIMIT):
            body = os.urandom(size)
            assert ask(link, body) == digest(body)
        assert ask(link, b"large 1000000") == bytes(1_000_000)
        link.close()
        assert len(server.conversations) == 1


@pytest.mark.parametrize(("bound", "asked"), [("0.0.0.0", "127.0.0.2"), ("::", "::1"), ("0.0.0.0", "127.0.0.1")])
def test_a_server_on_all_addresses_answers_from_the_one_that_was_asked(bound, asked):
    with serving(host=bound) as server:
        link = QuicLink(asked, server.port, pin=certificate().sha256)
        body = os.urandom(100_000)
        assert ask(link, body) == digest(body)
        link.close()


def test_the_conversation_hears_when_an_answer_has_left():
    with serving() as server:
        link = link_to(server)
        for _ in range(3):
            ask(link, b"x")
        link.close()
        server.wait(server.transport.close_idle())
        server.wait(server.transport.close())
        assert server.conversations[0].sent_count == 4


def test_many_clients_at_once():
    with serving() as server:
        wrong: list[object] = []

        def client(number: int) -> None:
            chance = random.Random(number)
            try:
                link = link_to(server)
                for _ in range(15):
                    body = chance.randbytes(chance.choice([10, 5_000, 60_000, 300_000]))
                    if ask(link, body) != digest(body):
                        wrong.append("another's answer")
                link.close()
            except Exception as error:  # noqa: BLE001 - reported below
                wrong.append(error)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(server.conversations) == 8


def test_two_hundred_idle_clients_do_not_disturb_an_active_one():
    with serving() as server:
        links = [link_to(server) for _ in range(200)]
        for _ in range(20):
            body = os.urandom(50_000)
            assert ask(links[100], body) == digest(body)
        assert all(ask(link, b"still there") == digest(b"still there") for link in links[::20])
        for link in links:
            link.close()


def test_a_request_that_is_held_delays_no_other_stream():
    with serving() as server:
        slow, quick = link_to(server), link_to(server)
        answers: list[bytes] = []
        thread = threading.Thread(target=lambda: answers.append(ask(slow, b"hold on")))
        thread.start()
        assert server.holding.wait(TIMEOUT_S)
        assert ask(quick, b"me first") == digest(b"me first")
        assert not answers
        server.call(server.gate.set)
        thread.join()
        assert answers == [digest(b"hold on")]
        slow.close()
        quick.close()


def give_up(server: LiveServer, link: QuicLink, body: bytes) -> None:
    """Ask, and stop waiting for the answer when the request is there; how long that takes depends on what else the machine does."""
    while not server.holding.is_set():
        with pytest.raises(ReplyTimeoutError, match=r"no reply from 127.0.0.1:\d+ within 0.05 s"):
            ask(link, body, timeout_s=0.05)


def test_a_client_that_gives_up_has_its_answer_cancelled_and_goes_on():
    with serving() as server:
        link = link_to(server)
        give_up(server, link, b"hold")
        assert server.cancelled.wait(TIMEOUT_S)
        assert ask(link, b"next") == digest(b"next")
        assert not link.closed
        assert len(server.conversations) == 1, "the connection is the same"
        link.close()


def test_a_client_that_leaves_has_its_answers_cancelled():
    with serving() as server:
        link = link_to(server)
        channel = link._channels[0]
        channel.request(MessageType.INFER, [b"hold"])
        assert pump([channel], server.holding.is_set, time.monotonic() + TIMEOUT_S)
        link.close()
        assert server.cancelled.wait(TIMEOUT_S)


def test_each_conversation_is_closed_once_when_its_connection_has_ended():
    with serving() as server:
        leaving, staying = link_to(server), link_to(server)
        for link in (leaving, staying):
            ask(link, b"x")
        gone, kept = server.conversations
        leaving.close()
        assert gone.closed.wait(TIMEOUT_S)
        assert ask(staying, b"still here") == digest(b"still here")
        assert (gone.closed_count, kept.closed_count) == (1, 0)
    assert (gone.closed_count, kept.closed_count) == (1, 1)


def test_an_endpoint_that_breaks_down_closes_its_conversations():
    def break_down(now: float) -> None:
        raise RuntimeError("a bug of ours")

    with LiveServer() as server:
        link = link_to(server)
        ask(link, b"x")
        (conversation,) = server.conversations
        server.transport._order(break_down)
        assert conversation.closed.wait(TIMEOUT_S)
        with pytest.raises(RuntimeError, match="a bug of ours"):
            server.wait(asyncio.wait_for(server.transport.failed, TIMEOUT_S))
        link.close()
    assert conversation.closed_count == 1


@pytest.mark.parametrize("extra", [1, 500_000])
def test_a_request_over_the_limit_is_refused_and_the_connection_goes_on(extra):
    with serving() as server:
        link = link_to(server)
        answer = link.exchange(MessageType.INFER, [bytes(LIMIT + extra)], TIMEOUT_S)
        assert (answer.type, bytes(answer.body)) == (MessageType.ERROR, b"the message has more than 1048576 bytes")
        assert ask(link, b"next") == digest(b"next")
        link.close()


def test_before_the_greeting_only_small_messages_are_taken():
    with serving(api_key="secret") as server:
        server.call(server.ready.clear)
        refusals: list[Exception] = []

        def connect() -> None:
            try:
                link_to(server, api_key="x" * 70_000)
            except ConnectError as error:
                refusals.append(error)

        thread = threading.Thread(target=connect)
        thread.start()
        thread.join(TIMEOUT_S)
        assert "the message has more than 65536 bytes" in str(refusals[0])


@pytest.mark.parametrize("connections", [2, 5])
def test_a_striped_request_is_answered_whole(connections):
    with serving() as server:
        link = link_to(server, connections=connections)
        for size in (10, 65_536, 700_001, LIMIT):
            body = os.urandom(size)
            assert ask(link, body) == digest(body)
        assert server.transport._parts.held_bytes == 0
        link.close()


def test_a_striped_request_over_the_limit():
    with serving() as server:
        link = link_to(server, connections=3)
        answer = link.exchange(MessageType.INFER, [bytes(LIMIT + 1)], TIMEOUT_S)
        assert (answer.type, bytes(answer.body)) == (MessageType.ERROR, b"the message has 1048577 bytes; the server takes at most 1048576")
        body = os.urandom(200_000)
        assert ask(link, body) == digest(body)
        link.close()


def test_a_striped_request_that_is_given_up_leaves_nothing_behind():
    with serving() as server:
        link = link_to(server, connections=3)
        give_up(server, link, b"hold" + bytes(200_000))
        assert server.cancelled.wait(TIMEOUT_S)
        first, *_ = split(MessageType.INFER, [bytes(90_000)], 3, b"t" * 16)
        channel = link._channels[0]
        stream = channel.request(MessageType.PART, first)
        body = os.urandom(100_000)
        assert ask(link, body) == digest(body)
        assert server.transport._parts.held_bytes == 30_000
        channel.connection.cancel(stream)
        assert ask(link, body) == digest(body)
        assert server.transport._parts.held_bytes == 0
        link.close()


class Hasty(QuicLink):
    """Does not ask for the metadata."""

    def _greet(self, deadline_s: float | None) -> Message:
        return Message(MessageType.METADATA_REPLY, b"")


def test_parts_need_a_greeting():
    with serving(api_key="secret") as server:
        link = Hasty(server.host, server.port, pin=certificate().sha256, connections=2)
        answer = link.exchange(MessageType.INFER, [bytes(100_000)], TIMEOUT_S)
        assert answer.type == MessageType.ERROR
        assert b"every connection begins with METADATA" in bytes(answer.body)
        assert server.conversations == []
        link.close()


def test_hostile_datagrams_disturb_nobody(monkeypatch):
    """≥ 5,000 datagrams of a real conversation, damaged; then a good client is served, and one that was there before still is."""
    captured: list[bytes] = []
    send = UdpSocket.send

    def capture(self, datagrams, *where):
        captured.extend(datagrams)
        send(self, datagrams, *where)

    chance = random.Random(20)
    with serving() as server:
        before = link_to(server)
        monkeypatch.setattr(UdpSocket, "send", capture)
        link = link_to(server)
        ask(link, bytes(20_000))
        link.close()
        monkeypatch.undo()
        assert len(captured) > 10
        attacker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        attacker.connect((server.host, server.port))
        live = before._channels[0].connection._quic._tls.tls  # keeps the connection's ids in use while they are aimed at
        assert live is not None
        for number in range(6000):
            datagram = bytearray(chance.choice(captured))
            for _ in range(chance.choice([0, 1, 1, 3, 20])):
                datagram[chance.randrange(len(datagram))] = chance.randrange(256)
            if chance.random() < 0.2:
                datagram = datagram[: chance.randrange(1, len(datagram) + 1)]
            if chance.random() < 0.1:
                datagram += chance.randbytes(chance.randrange(1, 200))
            if chance.random() < 0.1:
                datagram[6:14] = chance.randbytes(8)  # another connection id: a new connection each
            attacker.send(datagram[:60_000])
            if number % 1000 == 999:
                assert ask(before, b"still here") == digest(b"still here")
        attacker.close()
        good = link_to(server)
        body = os.urandom(100_000)
        assert ask(good, body) == digest(body)
        good.close()
        before.close()


async def test_bytes_that_upset_the_router_do_not_end_the_thread_silently(caplog):
    transport = QuicTransport(
        "127.0.0.1", 0, lambda: None, certificate=certificate(), max_message_bytes=LIMIT, loop=asyncio.get_running_loop(), field="action.quic_port"
    )
    transport.bind()

    def break_down(received: Received, now: float) -> list[bytes]:
        raise RuntimeError("a bug of ours")

    transport._router.receive = break_down
    await transport.start()
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.sendto(b"x", transport.address)
    sender.close()
    with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError, match="a bug of ours"):
        await asyncio.wait_for(transport.failed, 10)
    assert "the QUIC endpoint on action.quic_port failed" in caplog.text
    await transport.close()


async def test_a_port_that_is_taken():
    loop = asyncio.get_running_loop()
    first = QuicTransport("127.0.0.1", 0, lambda: None, certificate=certificate(), max_message_bytes=LIMIT, loop=loop)
    first.bind()
    port = first.address[1]
    second = QuicTransport("127.0.0.1", port, lambda: None, certificate=certificate(), max_message_bytes=LIMIT, loop=loop, field="x.quic_port")
    with pytest.raises(ConfigError, match=rf"^x.quic_port: cannot listen on 127.0.0.1 UDP port {port} \(Address already in use\); stop what uses it"):
        second.bind()
    await second.close()
    await first.close()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 300, "203.0.113.7"])
async def test_a_host_that_cannot_be_bound(host):
    transport = QuicTransport(host, 0, lambda: None, certificate=certificate(), max_message_bytes=LIMIT, loop=asyncio.get_running_loop())
    with pytest.raises(ConfigError, match=r"^quic_port: cannot listen on "):
        transport.bind()
    await transport.close()


def test_draining_closes_the_idle_and_lets_the_others_finish():
    with serving() as server:
        idle, busy = link_to(server), link_to(server)
        answers: list[bytes] = []
        thread = threading.Thread(target=lambda: answers.append(ask(busy, b"hold the door")))
        thread.start()
        assert server.holding.wait(TIMEOUT_S)
        server.wait(server.transport.close_idle())
        assert pump(idle._channels, lambda: idle._channels[0].lost is not None, time.monotonic() + TIMEOUT_S)
        assert idle._channels[0].lost == CLOSING_REASON
        with pytest.raises(ConnectError, match=CLOSING_REASON):
            ask(idle, b"x")
        with pytest.raises(ConnectError, match=CLOSING_REASON):
            link_to(server)
        assert not answers
        server.call(server.gate.set)
        thread.join()
        assert answers == [digest(b"hold the door")]
        server.wait(server.transport.close())
        busy.close()


def test_draining_does_not_cut_off_a_striped_request_that_was_accepted():
    with serving() as server:
        link = link_to(server, connections=3)
        answers: list[bytes] = []
        body = b"hold" + bytes(200_000)
        thread = threading.Thread(target=lambda: answers.append(ask(link, body)))
        thread.start()
        assert server.holding.wait(TIMEOUT_S)
        server.wait(server.transport.close_idle())
        first, *others = server.transport._router.peers
        while not (first.connection.ended or all(peer.gone for peer in others)):
            thread.join(0.001)
        server.call(server.gate.set)
        thread.join(TIMEOUT_S)
        assert answers == [digest(body)]
        link.close()


def test_closing_delivers_what_has_been_answered_and_cancels_the_rest():
    with serving() as server:
        link = link_to(server)
        failures: list[Exception] = []

        def wait() -> None:
            try:
                ask(link, b"hold for ever")
            except ConnectionLostError as error:
                failures.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        assert server.holding.wait(TIMEOUT_S)
        server.wait(server.transport.close())
        thread.join()
        assert CLOSING_REASON in str(failures[0])
        assert link.closed
        assert server.cancelled.wait(TIMEOUT_S)


def test_a_transport_that_was_never_started_closes():
    async def run() -> None:
        transport = QuicTransport("127.0.0.1", 0, lambda: None, certificate=certificate(), max_message_bytes=LIMIT, loop=asyncio.get_running_loop())
        transport.bind()
        await transport.close()

    asyncio.run(run())


def test_a_thread_whose_event_loop_was_closed_ends():
    loop = asyncio.new_event_loop()
    transport = QuicTransport("127.0.0.1", 0, lambda: None, certificate=certificate(), max_message_bytes=LIMIT, loop=loop)
    transport.bind()
    loop.run_until_complete(transport.start())
    loop.close()
    with pytest.raises(ConnectError):
        QuicLink(*transport.address, pin=certificate().sha256)
    transport._thread.join(TIMEOUT_S)
    assert not transport._thread.is_alive()
