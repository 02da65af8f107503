"""Datagrams to connections, without sockets: new ones, strangers, garbage, and clients that never ask."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosting.protocol.messages import MessageType
from hosting.quic import Arrived, MessageConnection
from hosting.quic_router import Router
from hosting.quic_settings import client_configuration, server_configuration
from hosting.udp import Received
from tests.hosting.quic_support import RESET_KEY, SERVER_ADDRESS, certificate

ADDRESS = ("127.0.0.1", 5001)


def router(**options) -> Router:
    return Router(server_configuration(certificate()), reset_key=RESET_KEY, greeting_bytes=65536, **options)


def client() -> MessageConnection:
    return MessageConnection.client(client_configuration("localhost", pin=certificate().sha256), SERVER_ADDRESS, 0.0, max_message_bytes=65536)


def give(to: Router, datagrams: list[bytes], *, address=ADDRESS, now: float = 0.0) -> list[bytes]:
    answers: list[bytes] = []
    for datagram in datagrams:
        answers += to.receive(Received(datagram, len(datagram), address, now), now)
    return answers


def talk(to: Router, end: MessageConnection, now: float, *, address=ADDRESS, rounds: int = 6) -> list:
    """Datagrams go back and forth; returns the server's events."""
    events = []
    for _ in range(rounds):
        give(to, [datagram for datagram, _ in end.datagrams_to_send(now)], address=address, now=now)
        for peer in to.touched():
            events += to.events(peer)
            for datagram, _ in to.settle(peer, now):
                end.receive(Received(datagram, len(datagram), SERVER_ADDRESS, now), now)
        list(end.events())
    return events


def test_each_client_gets_its_own_connection_even_from_one_address():
    made = router()
    clients = [client() for _ in range(5)]
    for end in clients:
        talk(made, end, 0.0)
    assert len(made.peers) == 5
    for number, end in enumerate(clients):
        assert list(end.request(MessageType.INFER, [bytes([number])])) == [0]
        arrived = [event for event in talk(made, end, 1.0) if isinstance(event, Arrived)]
        assert [bytes(event.message.body) for event in arrived] == [bytes([number])]


def test_a_batch_that_mixes_clients_is_sorted_out():
    made = router()
    ends = [client(), client()]
    for end in ends:
        talk(made, end, 0.0)
        list(end.request(MessageType.INFER, [bytes(5000)]))
    queues = [[datagram for datagram, _ in end.datagrams_to_send(1.0)] for end in ends]
    size = max(len(datagram) for queue in queues for datagram in queue)
    mixed = [datagram for pair in zip(*queues, strict=False) for datagram in pair if len(datagram) == size]
    assert len(mixed) >= 4
    made.receive(Received(b"".join(mixed), size, ADDRESS, 1.0), 1.0)
    give(made, [datagram for queue in queues for datagram in queue if len(datagram) != size], now=1.0)
    touched = made.touched()
    assert len(touched) == 2
    for peer in touched:
        (event,) = [event for event in made.events(peer) if isinstance(event, Arrived)]
        assert event.message.body == bytes(5000)


def test_a_client_with_a_new_address_is_recognised():
    made = router()
    end = client()
    talk(made, end, 0.0)
    list(end.request(MessageType.INFER, [b"moved"]))
    (event,) = [event for event in talk(made, end, 1.0, address=("127.0.0.9", 999)) if isinstance(event, Arrived)]
    assert event.message.body == b"moved"
    assert len(made.peers) == 1


def test_a_version_that_is_not_spoken_is_answered_with_the_one_that_is():
    made = router()
    hello = bytes((0xC0,)) + b"\x1a\x2a\x3a\x4a" + b"\x08" + b"d" * 8 + b"\x04" + b"s" * 4
    (answer,) = give(made, [hello + bytes(1200)])
    assert answer[0] & 0x80
    assert answer[1:] == bytes(4) + b"\x04" + b"s" * 4 + b"\x08" + b"d" * 8 + b"\x00\x00\x00\x01"
    assert give(made, [hello]) == [], "a small datagram must not get a larger answer"
    assert give(made, [answer + bytes(1200)]) == [], "no answer to an answer"
    assert made.peers == []


def test_small_initials_and_strangers_are_ignored():
    made = router()
    (datagram, *_) = [datagram for datagram, _ in client().datagrams_to_send(0.0)]
    give(made, [datagram[:1199], b"\x40" + os.urandom(60), b"", b"\xc0", b"\x40"])
    assert made.peers == [] and made.touched() == []


def initial(*, first: int = 0xC0, destination: bytes = b"d" * 8, source: bytes = b"s" * 8, rest: bytes = b"\x00\x44\xb0") -> bytes:
    header = bytes((first,)) + b"\0\0\0\1" + bytes((len(destination),)) + destination + bytes((len(source),)) + source
    return header + rest + os.urandom(1300)


@pytest.mark.parametrize(
    "datagram",
    [
        initial(first=0x80),  # the bit that is always set is not
        initial(destination=b"d" * 60),
        initial(source=b"s" * 60),
        initial(destination=b""),
        initial(rest=b"\x7f\xff"),  # a token longer than the datagram
        initial(),  # cannot be decrypted
    ],
    ids=range(6),
)
def test_who_does_not_begin_a_connection_takes_nobodys_place(datagram):
    made = router(max_ungreeted=1)
    give(made, [datagram])
    assert made.peers == [] and made.touched() == [] and made.next_timer_s() is None
    talk(made, client(), 0.0)
    assert len(made.peers) == 1


def test_a_client_of_a_server_that_was_restarted_is_told():
    end = client()
    talk(router(), end, 0.0)
    assert end.established
    list(end.request(MessageType.INFER, [b"x"]))
    datagrams = [datagram for datagram, _ in end.datagrams_to_send(1.0)]
    (reset, *_) = give(router(), datagrams)
    assert len(reset) < len(datagrams[0]) and reset[0] & 0xC0 == 0x40
    end.receive(Received(reset, len(reset), SERVER_ADDRESS, 1.0), 1.0)
    list(end.events())
    assert end.ended is not None and "does not know it" in end.ended.text


def test_a_client_of_another_server_is_not():
    end = client()
    talk(router(), end, 0.0)
    list(end.request(MessageType.INFER, [b"x"]))
    other = Router(server_configuration(certificate()), reset_key=b"another", greeting_bytes=65536)
    for reset in give(other, [datagram for datagram, _ in end.datagrams_to_send(1.0)]):
        end.receive(Received(reset, len(reset), SERVER_ADDRESS, 1.0), 1.0)
    list(end.events())
    assert end.ended is None


def test_two_servers_that_know_nothing_of_each_other_soon_stop():
    datagram, exchanged = b"\x40" + os.urandom(60), 0
    ends = [router(), Router(server_configuration(certificate()), reset_key=b"another", greeting_bytes=65536)]
    while answer := give(ends[exchanged % 2], [datagram]):
        assert len(answer[0]) < len(datagram)
        (datagram,) = answer
        exchanged += 1
    assert exchanged < 50


def test_a_connection_that_has_gone_holds_no_memory_though_its_timers_are_far_away():
    made = router(patience_s=10.0)
    end = client()
    talk(made, end, 0.0)
    made.greet(made.peers[0])
    gone = weakref.ref(made.peers[0])
    end.close()
    talk(made, end, 1.0)
    now = 1.0
    while made.peers or now < 10.0:
        now += 1.0
        made.handle_timers(now)
        for peer in made.touched():
            made.settle(peer, now)
    del peer
    gc.collect()
    assert gone() is None
    made.handle_timers(1000.0)
    assert made.touched() == []


@given(st.binary(max_size=1500))
def test_garbage_is_dropped(data):
    made = ROUTER
    give(made, [data])
    for peer in made.touched():
        made.events(peer)
        made.settle(peer, 0.0)


ROUTER = router(max_ungreeted=20)


def test_a_client_that_does_not_ask_is_let_go():
    made = router(patience_s=10.0)
    end = client()
    talk(made, end, 0.0)
    made.handle_timers(9.9)
    talk(made, end, 9.9)
    assert end.ended is None
    made.handle_timers(10.0)
    talk(made, end, 10.0)
    assert end.ended.text == "the metadata was not asked for within 10 s"
    made.handle_timers(20.0)
    for peer in made.touched():
        made.settle(peer, 20.0)
    assert made.peers == [] and made._by_id == {} and made._ungreeted == 0


def test_a_client_that_has_asked_may_wait():
    made = router(patience_s=10.0)
    end = client()
    talk(made, end, 0.0)
    made.asked(made.peers[0])
    made.handle_timers(500.0)
    talk(made, end, 500.0)
    assert end.ended is None


def test_a_client_that_was_refused_may_ask_once_more_soon():
    made = router(patience_s=10.0)
    end = client()
    talk(made, end, 0.0)
    made.asked(made.peers[0])
    made.refuse(made.peers[0], 100.0)
    made.handle_timers(109.0)
    assert made.peers[0].connection.ended is None
    made.handle_timers(110.0)
    assert made.peers[0].connection.ended is not None


def test_clients_that_are_not_greeted_are_bounded_in_number(caplog):
    made = router(max_ungreeted=3, patience_s=10.0)
    ends = [client() for _ in range(6)]
    for end in ends:
        talk(made, end, 0.0)
    assert len(made.peers) == 3
    assert len([record for record in caplog.records if "have begun to connect" in record.message]) == 1
    made.greet(made.peers[0])
    made.greet(made.peers[0])
    talk(made, client(), 1.0)
    assert len(made.peers) == 4
    talk(made, client(), 1.0)
    assert len(made.peers) == 4


@pytest.mark.parametrize("idle", [30.0])
def test_an_idle_client_is_forgotten_without_a_trace(idle):
    made = Router(server_configuration(certificate(), idle_timeout_s=idle), reset_key=RESET_KEY, greeting_bytes=1000)
    end = client()
    talk(made, end, 0.0)
    made.greet(made.peers[0])
    made.asked(made.peers[0])
    now = 0.0
    while made.peers:
        now = made.next_timer_s()
        assert now is not None and now < 40
        made.handle_timers(now)
        for peer in made.touched():
            made.events(peer)
            made.settle(peer, now)
    assert made._by_id == {}
