"""Messages over a QUIC connection in memory: what arrives, what is refused, what is lost, and how it ends."""

from __future__ import annotations

import os

import pytest

from hosting.protocol.messages import Message, MessageType
from hosting.quic import Arrived, Cancelled, Established, Rejected
from hosting.quic_endings import Why
from hosting.udp import Received
from tests.hosting.quic_support import CLIENT_ADDRESS, LIMIT, Pair, certificate


def connected(**options) -> Pair:
    pair = Pair(**options)
    pair.run(lambda: any(isinstance(event, Established) for event in pair.events[pair.client]) and pair.client.delivered)
    pair.run(lambda: pair.server.delivered)
    pair.take(pair.client)
    pair.take(pair.server)
    return pair


def arrive(pair: Pair, end, count: int = 1) -> list[Arrived]:
    pair.run(lambda: sum(isinstance(event, Arrived) for event in pair.events[end]) >= count)
    return pair.take(end, Arrived)


@pytest.mark.parametrize("size", [0, 1, 1500, 70_000, LIMIT])
def test_a_message_and_its_answer_arrive_whole(size):
    pair = connected()
    body = os.urandom(size)
    stream = pair.request(MessageType.INFER, body[: size // 3], body[size // 3 :])
    (request,) = arrive(pair, pair.server)
    assert request == Arrived(stream, Message(MessageType.INFER, body))
    assert pair.server.unanswered == 1
    pair.server.reply(stream, Message(MessageType.REPLY, body[::-1]))
    assert arrive(pair, pair.client) == [Arrived(stream, Message(MessageType.REPLY, body[::-1]))]
    assert pair.server.unanswered == 0
    pair.run(lambda: pair.server.delivered)


def test_a_message_without_body_parts():
    pair = connected()
    stream = pair.request(MessageType.RESET)
    assert arrive(pair, pair.server) == [Arrived(stream, Message(MessageType.RESET, b""))]


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_missing_where_datagrams_are_lost_from_the_handshake_on(seed):
    pair = Pair(loss=0.05, seed=seed)
    pair.run(lambda: any(isinstance(event, Established) for event in pair.events[pair.client]))
    bodies = {pair.request(MessageType.INFER, body): body for body in (b"", os.urandom(5_000), os.urandom(120_000))}
    requests = arrive(pair, pair.server, 3)
    assert {request.stream: bytes(request.message.body) for request in requests} == bodies
    for stream, body in bodies.items():
        pair.server.reply(stream, Message(MessageType.REPLY, body))
    assert {answer.stream: bytes(answer.message.body) for answer in arrive(pair, pair.client, 3)} == bodies
    assert pair.lost > 0


@pytest.mark.parametrize("size", [0, 1_000, 45_000])
def test_one_request_after_the_other_where_every_fifth_datagram_is_lost(size):
    pair = connected()
    pair.loss = 0.2
    for _ in range(30):
        body = os.urandom(size)
        stream = pair.request(MessageType.INFER, body)
        (request,) = arrive(pair, pair.server)
        assert request.message.body == body
        pair.server.reply(stream, Message(MessageType.REPLY, body[:10_000]))
        (answer,) = arrive(pair, pair.client)
        assert answer.message.body == body[:10_000]
    assert pair.lost > 5


def test_thousands_of_requests_on_one_connection_leave_nothing_behind():
    pair = connected()
    for _ in range(1500):
        stream = pair.request(MessageType.INFER, b"x")
        arrive(pair, pair.server)
        pair.server.reply(stream, Message(MessageType.REPLY, b"y"))
        arrive(pair, pair.client)
    assert not pair.client.incoming and not pair.server.incoming and pair.server.unanswered == 0


def test_a_message_over_the_limit_is_refused_while_it_comes_and_the_connection_goes_on():
    pair = connected(limit=50_000)
    stream = pair.request(MessageType.INFER, bytes(2_000_000))
    pair.run(lambda: pair.events[pair.server])
    assert pair.take(pair.server) == [Rejected(stream, "the message has more than 50000 bytes")]
    pair.server.reply(stream, Message(MessageType.ERROR, b"too large"))
    assert arrive(pair, pair.client) == [Arrived(stream, Message(MessageType.ERROR, b"too large"))]
    pair.run(lambda: not pair.server.incoming)
    assert pair.sent < 300, "the rest of it should not have been sent"
    fits = pair.request(MessageType.INFER, bytes(50_000))
    assert arrive(pair, pair.server)[0].stream == fits


@pytest.mark.parametrize("size", [50_001, 50_020])
def test_the_limit_is_exact(size):
    pair = connected(limit=50_000)
    stream = pair.request(MessageType.INFER, bytes(size))
    pair.run(lambda: pair.events[pair.server])
    assert pair.take(pair.server) == [Rejected(stream, "the message has more than 50000 bytes")]


def test_unfinished_messages_share_one_limit():
    pair = connected(limit=50_000)
    quic = pair.client._quic
    for stream in (0, 4, 8):
        quic.send_stream_data(stream, b"\x04" + bytes(20_000), False)
    pair.run(lambda: pair.events[pair.server])
    assert [type(event) for event in pair.take(pair.server)] == [Rejected]
    assert pair.server.incoming.held_bytes <= 50_100


def test_a_stream_without_a_type_byte_is_refused():
    pair = connected()
    pair.client._quic.send_stream_data(0, b"", True)
    pair.run(lambda: pair.events[pair.server])
    assert pair.take(pair.server) == [Rejected(0, "the message is empty; expected a type byte and a body")]


def test_an_answer_over_the_clients_limit():
    pair = connected(limit=50_000)
    stream = pair.request(MessageType.INFER, b"x")
    arrive(pair, pair.server)
    pair.server.reply(stream, Message(MessageType.REPLY, bytes(60_000)))
    pair.run(lambda: pair.events[pair.client])
    assert isinstance(pair.take(pair.client)[0], Rejected)


def test_a_cancelled_request_is_reported_and_its_late_answer_ignored():
    pair = connected()
    stream = pair.request(MessageType.INFER, b"x")
    arrive(pair, pair.server)
    pair.client.cancel(stream)
    pair.run(lambda: pair.events[pair.server])
    assert pair.take(pair.server) == [Cancelled(stream)]
    pair.server.reply(stream, Message(MessageType.REPLY, b"late"))
    pair.run(lambda: not pair.client.incoming)
    assert pair.take(pair.client) == []
    again = pair.request(MessageType.INFER, b"again")
    assert arrive(pair, pair.server)[0].stream == again


def test_an_answer_that_crosses_its_cancellation_is_ignored():
    pair = connected()
    stream = pair.request(MessageType.INFER, b"x")
    arrive(pair, pair.server)
    pair.server.reply(stream, Message(MessageType.REPLY, b"on its way"))
    pair.client.cancel(stream)
    pair.run(lambda: not pair.client.incoming)
    pair.run(lambda: pair.server.delivered)
    assert pair.take(pair.client) == []
    pair.client.cancel(stream)  # harmless


def test_a_request_that_is_given_up_half_way_holds_no_memory():
    pair = connected()
    pair.client._quic.send_stream_data(0, b"\x04" + bytes(20_000), False)
    pair.run(lambda: pair.server.incoming.held_bytes > 0)
    pair.client._quic.reset_stream(0, 1)
    pair.run(lambda: not pair.server.incoming)
    assert pair.take(pair.server) == [Cancelled(0)]
    assert pair.server.incoming.held_bytes == 0 and pair.server.unanswered == 0


def test_the_client_may_change_its_address():
    pair = connected()
    sent_to = []
    send = pair.server.datagrams_to_send

    def noting(now):
        datagrams = send(now)
        sent_to.extend(address for _, address in datagrams)
        return datagrams

    pair.server.datagrams_to_send = noting
    for port in (4001, 4998, 4999):
        pair.client_address = ("127.0.0.1", port)
        for _ in range(3):  # the new path is validated with the first
            stream = pair.request(MessageType.INFER, b"x")
            (request,) = arrive(pair, pair.server)
            pair.server.reply(request.stream, Message(MessageType.REPLY, b"y"))
            assert arrive(pair, pair.client) == [Arrived(stream, Message(MessageType.REPLY, b"y"))]
        assert sent_to[-1] == ("127.0.0.1", port)


def test_closing_says_why():
    pair = connected()
    pair.server.close("the server is shutting down")
    pair.run(lambda: pair.client.ended)
    assert pair.client.ended is not None
    assert (pair.client.ended.why, pair.client.ended.text) == (Why.CLOSED, "the server is shutting down")
    pair.run(lambda: pair.client.next_timer_s() is None and pair.server.next_timer_s() is None)


def test_silence_ends_a_connection():
    pair = connected(idle_timeout_s=30.0)
    pair.run(lambda: pair.client.ended and pair.server.ended, for_s=31.0)
    assert [ended.why for ended in pair.ended()] == [Why.IDLE, Why.IDLE]
    assert pair.client.next_timer_s() is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pin": "00" * 32}, certificate().sha256),
        ({"pin": None}, "issuer"),
    ],
    ids=["pinned", "no pin"],
)
def test_a_certificate_that_is_not_trusted(options, words):
    pair = Pair(**options)
    pair.run(lambda: pair.client.ended and pair.server.ended)
    for ended in pair.ended():
        assert ended.why is Why.CERTIFICATE
        assert words in ended.text
    assert pair.client.peer_sha256 == certificate().sha256
    assert {"localhost", "127.0.0.1", "::1"} <= set(pair.client.peer_names)


def test_a_client_of_another_protocol_is_told(monkeypatch):
    monkeypatch.setattr("hosting.quic_settings.ALPN", "h3")
    pair = Pair(server_protocol="tandem/1")
    pair.run(lambda: pair.client.ended)
    assert pair.client.ended.why is Why.PROTOCOL
    assert "no application protocol in common" in pair.client.ended.text


def test_bytes_that_upset_the_library_end_one_connection_only(monkeypatch):
    pair = connected()

    def upset(*_):
        raise KeyError("unknown")

    monkeypatch.setattr(pair.server._quic, "receive_many_datagrams", upset)
    pair.server.receive(Received(b"\x40" + bytes(40), 41, CLIENT_ADDRESS, 0.0), pair.now)
    assert pair.server.ended.why is Why.PROTOCOL
    assert "KeyError" in pair.server.ended.text
    monkeypatch.undo()
    pair.run(lambda: pair.client.ended)
    assert "internal error" in pair.client.ended.text
    pair.run(lambda: pair.server.next_timer_s() is None)


def test_a_connection_that_cannot_build_packets_any_more_ends(monkeypatch):
    pair = connected()
    calls = []

    def fail(now):
        calls.append(now)
        raise ValueError("no packet")

    monkeypatch.setattr(pair.server._quic, "datagrams_to_send", fail)
    assert pair.server.datagrams_to_send(pair.now) == []
    assert pair.server.ended is None, "one failure is like a loss"
    while pair.server.ended is None:
        pair.now = pair.server.next_timer_s()
        assert pair.server.datagrams_to_send(pair.now - 0.001) == [], "it is not tried all the time"
        assert pair.server.datagrams_to_send(pair.now) == []
    assert "no packet" in pair.server.ended.text
    assert 1 < len(calls) < 20
