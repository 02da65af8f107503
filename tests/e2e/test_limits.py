"""Sizes, time limits and crowds on a live service: what is promised is kept, and who breaks a limit hurts nobody else."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import numpy as np
import pytest
from websockets.frames import Frame, Opcode

import hosting.service
import hosting.transports.quic
from hosting.clients.errors import ConnectionLostError, InferenceError
from hosting.clients.quic import QuicLink
from hosting.clients.quic_channel import pump
from hosting.config import WebSocketConfig
from hosting.protocol import msgpack_numpy
from hosting.protocol.messages import Message, MessageType
from hosting.quic_router import Router
from hosting.transports.prompt_http import PromptHTTPProtocol
from hosting.transports.quic import QuicTransport
from hosting.transports.unix_socket import UnixSocketTransport
from tests.e2e import hostile
from tests.e2e.hostile import SECONDS, UPGRADE, Ground, digest, keeping_at_most, observation
from tests.hosting.transports.unix_support import framed

TRANSPORTS = ("websocket", "quic", "unix")
LIMIT = 1 << 20
PATIENCE_S = 0.2
IDLE_S = 1.0
PING_TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    """As configured by default."""
    with hostile.ground() as ground:
        yield ground


@pytest.fixture(scope="module")
def impatient() -> Iterator[Ground]:
    """Small messages, and all time limits a hundred times shorter than usual."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptHTTPProtocol, "header_timeout_s", PATIENCE_S)
        patch.setattr(hosting.service, "UnixSocketTransport", partial(UnixSocketTransport, stall_timeout_s=PATIENCE_S))
        patch.setattr(hosting.service, "QuicTransport", partial(QuicTransport, idle_timeout_s=IDLE_S))
        patch.setattr(hosting.transports.quic, "Router", partial(Router, patience_s=PATIENCE_S))
        pings = WebSocketConfig(ping_interval_s=PATIENCE_S, ping_timeout_s=PING_TIMEOUT_S)
        with hostile.ground(max_message_bytes=LIMIT, websocket=pings) as ground:
            yield ground


# --- sizes ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_observation_of_60_mib_is_taken(ground: Ground, transport: str) -> None:
    """0.4 s over WebSocket and Unix socket, 0.6 s over QUIC on two cores."""
    obs = {**observation(1), "large": np.arange(60 << 20, dtype=np.uint8)}
    link = ground.link(transport)
    answer = link.exchange(MessageType.INFER, [msgpack_numpy.pack(obs)], 60)
    assert msgpack_numpy.unpack(answer.body)["digest"] == digest(obs)
    link.close()
    ground.check()


@pytest.mark.parametrize("extra", [1, 5 << 20])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_more_than_the_limit_is_refused_with_its_name_and_the_next_request_is_served(impatient: Ground, transport: str, extra: int) -> None:
    client = impatient.client(transport)
    with pytest.raises((InferenceError, ConnectionLostError)) as caught:
        client.infer({**observation(1), "large": np.zeros(LIMIT + extra, np.uint8)})
    assert str(LIMIT) in str(caught.value)
    assert transport != "websocket" or "1009" in str(caught.value)
    assert client.infer(observation(2))["digest"] == digest(observation(2))
    impatient.check()


# --- slow and half-open clients --------------------------------------------------------------------------------------------------------------


def frame(payload: bytes) -> bytes:
    return Frame(Opcode.BINARY, payload).serialize(mask=True)


def upgraded(ground: Ground) -> socket.socket:
    """A WebSocket client that does nothing by itself, after the handshake and the greeting."""
    client = socket.create_connection(ground.websocket, timeout=SECONDS)
    client.sendall(UPGRADE)
    received = b""
    while b"\r\n\r\n" not in received or len(received.partition(b"\r\n\r\n")[2]) < 100:
        piece = client.recv(1 << 16)
        assert piece
        received += piece
    return client


def dribble(client: socket.socket, data: bytes) -> bytes:
    """Send a byte now and then until the other side has closed; returns what it sent."""
    received = b""
    poll = select.poll()
    poll.register(client, select.POLLIN)
    deadline_s = time.monotonic() + SECONDS
    for byte in data:
        assert time.monotonic() < deadline_s, "still open"
        try:
            client.send(bytes((byte,)))
            while poll.poll(20):
                piece = client.recv(1 << 16)
                if not piece:
                    return received
                received += piece
        except (BrokenPipeError, ConnectionResetError):
            return received
    raise AssertionError("there was nothing left to send")


def test_request_headers_that_dribble(impatient: Ground) -> None:
    with socket.create_connection(impatient.websocket, timeout=SECONDS) as client:
        assert dribble(client, UPGRADE[:-4] + b"\r\nX: " + b"y" * 5000) == b""
    with socket.create_connection(impatient.websocket, timeout=SECONDS) as client:
        assert client.recv(1) == b"", "nor is one kept that says nothing"
    impatient.check()


def test_websocket_clients_that_stall_or_dribble_or_answer_no_ping(impatient: Ground) -> None:
    """Each is closed with 1011 after the ping timeout, in the middle of a message or between two."""
    message = frame(bytes(500_000))
    with closing(upgraded(impatient)) as silent, closing(upgraded(impatient)) as stalled, closing(upgraded(impatient)) as dribbler:
        stalled.sendall(message[:250_000])
        dribbler.sendall(message[:1000])
        ends = [dribble(dribbler, message[1000:])]
        for client in (silent, stalled):
            received = b""
            while piece := client.recv(1 << 16):
                received += piece
            ends.append(received)
    for received in ends:
        assert received.endswith(struct.pack("!BBH", 0x88, 24, 1011) + b"keepalive ping timeout"), received[-40:]
    impatient.check()


def test_a_long_upload_over_a_slow_link_survives_the_ping_timeout(impatient: Ground) -> None:
    """It can answer no ping before it is through: there is no room for a pong within a frame."""
    obs = {**observation(3), "large": np.zeros(900_000, np.uint8)}
    message = frame(msgpack_numpy.pack(obs))
    pace = select.poll()
    begun_s = time.monotonic()
    with closing(upgraded(impatient)) as client:
        for start in range(0, len(message), 20_000):
            client.sendall(message[start : start + 20_000])
            pace.poll(80)
        assert time.monotonic() - begun_s > PATIENCE_S + PING_TIMEOUT_S
        received = b""
        while digest(obs).encode() not in received:
            piece = client.recv(1 << 16)
            assert piece, received[-100:]
            received += piece
    impatient.check()


def test_a_unix_client_that_stalls_in_the_middle_of_a_message(impatient: Ground) -> None:
    for part in (3, 100, 5000):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(SECONDS)
            client.connect(str(impatient.unix))
            client.sendall(framed(MessageType.INFER, bytes(10_000))[:part])
            received = client.recv(1 << 16)
            assert received[4] == MessageType.ERROR
            assert received[5:] == b"nothing came for 0.2 s in the middle of a message; send each message whole"
    impatient.check()


def closed_by_server(client: socket.socket) -> bool:
    """Whether it was, waiting for it, without reading anything."""
    poll = select.poll()
    poll.register(client, select.POLLRDHUP)
    return bool(poll.poll(SECONDS * 1000))


PADDED = msgpack_numpy.pack({**observation(1), "padding": 500_000})
READS_NOTHING_BYTES = 64 << 20
"""A reply of 500 kB is held for each of these clients, one for each of 60 streams over QUIC; one for each request would be gigabytes."""


def test_a_websocket_client_that_reads_nothing_is_dropped(impatient: Ground) -> None:
    with keeping_at_most(READS_NOTHING_BYTES), closing(upgraded(impatient)) as client:
        client.setblocking(False)
        requests = frame(PADDED) * 30_000
        assert send_until_it_jams(client, requests) < len(requests)
        del requests
        impatient.check()
        assert closed_by_server(client)
        impatient.check()


def test_a_unix_client_that_reads_nothing_costs_little(impatient: Ground) -> None:
    """It may stay: it has a process on this machine, and goes with it."""
    with keeping_at_most(READS_NOTHING_BYTES), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(impatient.unix))
        client.setblocking(False)
        message = framed(MessageType.INFER, PADDED)
        asked = send_until_it_jams(client, message * 20_000) // len(message)
        impatient.check()
        client.setblocking(True)
        client.settimeout(SECONDS)
        received = 0
        while received < min(asked, 5) * 500_000:  # though late, its replies are there
            received += len(client.recv(1 << 20))
    impatient.check()


def send_until_it_jams(client: socket.socket, data: bytes) -> int:
    """Returns how many bytes were taken until nothing more was for a while."""
    sent, poll = 0, select.poll()
    poll.register(client, select.POLLOUT)
    while sent < len(data) and poll.poll(300):
        try:
            sent += client.send(data[sent : sent + 100_000])
        except BlockingIOError:
            continue
    return sent


def test_a_quic_client_that_reads_nothing_costs_little(impatient: Ground) -> None:
    with keeping_at_most(READS_NOTHING_BYTES):
        link = QuicLink(*impatient.quic, pin=impatient.pin)
        channel = link._channels[0]
        for _ in range(60):
            channel.request(MessageType.INFER, [PADDED])
        impatient.check()
        channel._udp.close()  # it is gone without a word; what was on its way to it is sent again for a while
        impatient.check()


def test_a_greeting_of_60_mib_is_refused_before_the_key_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    # While this module's impatient service lives, every other one is as impatient; so large a greeting may take its time to arrive.
    monkeypatch.setattr(hosting.transports.quic, "Router", Router)
    with hostile.ground(api_key="secret") as ground, keeping_at_most(32 << 20):
        with closing(Hasty(*ground.quic, pin=ground.pin)) as link:
            body = bytes(60 << 20)
            answer = link.exchange(MessageType.METADATA, [body], 60)
            assert (answer.type, bytes(answer.body)) == (MessageType.ERROR, b"the message has more than 65536 bytes")
        del body
        ground.check()


class Hasty(QuicLink):
    """Does not ask for the metadata."""

    def _greet(self, deadline_s: float | None) -> Message:
        return Message(MessageType.METADATA_REPLY, b"")


def test_quic_clients_that_say_nothing_or_not_enough(impatient: Ground) -> None:
    """A handshake that is not finished or not followed by a request ends after ``patience_s``, a silent connection after the idle time-out."""
    with closing(Hasty(*impatient.quic, pin=impatient.pin)) as link:
        assert pump(link._channels, lambda: link._channels[0].lost is not None, time.monotonic() + SECONDS)
        assert "the metadata was not asked for within 0.2 s" in str(link._channels[0].lost)
    idle = QuicLink(*impatient.quic, pin=impatient.pin)
    channel = idle._channels[0]
    body = msgpack_numpy.pack(observation(1))
    next(channel.connection.request(MessageType.INFER, [body[:50], body[50:]]))
    channel.advance(time.monotonic())
    assert pump([channel], lambda: channel.lost is not None, time.monotonic() + SECONDS)
    idle.close()
    impatient.check()


# --- crowds ------------------------------------------------------------------------------------------------------------------------------------


def test_200_idle_clients_beside_8_active_ones(ground: Ground) -> None:
    idle = [ground.link(TRANSPORTS[number % 3]) for number in range(200)]
    active = [ground.client(TRANSPORTS[number % 3]) for number in range(8)]

    def work(number: int) -> None:
        for step in range(25):
            obs = {**observation(1000 * number + step), "image": np.full((100, 100, 3), step, np.uint8)}
            assert active[number].infer(obs)["digest"] == digest(obs)

    with ThreadPoolExecutor(len(active)) as pool:
        list(pool.map(work, range(len(active))))
    for number, link in enumerate(idle):
        answer = link.exchange(MessageType.INFER, [msgpack_numpy.pack(observation(number))], SECONDS)
        assert msgpack_numpy.unpack(answer.body)["digest"] == digest(observation(number))
        link.close()
    ground.check()
