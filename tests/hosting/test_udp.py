"""Batched UDP over loopback, with and without the kernel's help."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosting.udp import Received, UdpSocket, runs


def readable(udp: UdpSocket) -> None:
    poll = select.poll()
    poll.register(udp, select.POLLIN)
    assert poll.poll(5000), "nothing arrived"


def split(received: Received) -> list[bytes]:
    return [received.data[start : start + received.segment_bytes] for start in range(0, len(received.data), received.segment_bytes)]


def collect(udp: UdpSocket, count: int) -> list[bytes]:
    datagrams: list[bytes] = []
    while len(datagrams) < count:
        readable(udp)
        for received in udp.receive():
            datagrams += split(received)
    return datagrams


@pytest.fixture(params=["127.0.0.1", "::1"])
def ends(request):
    try:
        server = UdpSocket.bind(request.param, 0)
    except OSError as error:
        assert request.param == "::1" and error.errno == errno.EADDRNOTAVAIL
        pytest.skip("this machine has no IPv6 loopback address")
    client = UdpSocket.connect(socket.AF_INET6 if ":" in request.param else socket.AF_INET, server.address)
    yield server, client
    server.close()
    client.close()


SIZES = [1200] * 100 + [700, 8000, 8000, 8000, 1, 2, 3, 65_000, 9_000, 9_000, 9_000, 9_000, 9_000, 9_000, 9_000, 9_000, 9_000]


@pytest.mark.parametrize("gso", [True, False])
def test_datagrams_keep_their_borders_and_their_order(ends, gso):
    server, client = ends
    client._gso = client._gso and gso
    datagrams = [bytes([number % 256]) * size for number, size in enumerate(SIZES)]
    client.send(datagrams, client.peer)
    assert collect(server, len(datagrams)) == datagrams


def test_the_way_back_goes_to_where_it_came_from(ends):
    server, client = ends
    client.send([b"hello"], client.peer)
    readable(server)
    (received,) = server.receive()
    assert received.address[:2] == client.address[:2]
    server.send([b"a" * 1000, b"b" * 1000, b"c" * 10], received.address)
    assert collect(client, 3) == [b"a" * 1000, b"b" * 1000, b"c" * 10]
    assert list(client.receive()) == []


def test_a_reader_who_comes_late_learns_when_it_arrived(ends, monkeypatch):
    server, client = ends
    client.send([b"x"], client.peer)
    readable(server)
    (received,) = server.receive()
    server.send([b"y"], received.address)
    readable(client)
    monotonic, wall = time.monotonic, time.time
    monkeypatch.setattr("hosting.udp.time.monotonic", lambda: monotonic() + 1000)
    monkeypatch.setattr("hosting.udp.time.time", lambda: wall() + 1000)
    (received,) = client.receive()
    assert received.arrived_s < monotonic() + 1, "the kernel's time, not the reader's"


def test_a_port_where_nothing_listens(ends):
    server, client = ends
    server.close()
    client.send([b"x"], client.peer)
    readable(client)
    with pytest.raises(ConnectionRefusedError):
        list(client.receive())


def test_a_port_in_use():
    first = UdpSocket.bind("127.0.0.1", 0)
    with pytest.raises(OSError, match="in use"):
        UdpSocket.bind("127.0.0.1", first.address[1])
    first.close()


def test_buffers_are_as_large_as_the_kernel_allows():
    udp = UdpSocket.bind("127.0.0.1", 0)
    receive, send = udp.buffer_bytes()
    assert receive >= 100_000 and send >= 100_000
    udp.close()


class Kernel:
    """Stands in for a socket; ``script`` has an error, or None, for each send."""

    def __init__(self, *script: OSError | None) -> None:
        self.script = list(script)
        self.sent: list[list[bytes]] = []

    def sendmsg(self, buffers, *_):
        error = self.script.pop(0) if self.script else None
        if error is not None:
            raise error
        self.sent.append([bytes(buffer) for buffer in buffers])

    def close(self) -> None:
        pass


@pytest.fixture
def udp():
    made = UdpSocket.bind("127.0.0.1", 0)
    real = made._sock
    yield made
    real.close()


def refused(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def test_a_kernel_that_refuses_batches_gets_single_datagrams(udp, caplog):
    udp._gso = True
    udp._sock = kernel = Kernel(refused(errno.EIO))
    with caplog.at_level(logging.DEBUG, "hosting.udp"):
        udp.send([b"aa", b"bb", b"c"], ("127.0.0.1", 1))
    assert kernel.sent == [[b"aa"], [b"bb"], [b"c"]]
    assert udp.batched[1] is False
    assert "refuses UDP_SEGMENT" in caplog.text


def test_a_full_socket_buffer_keeps_the_rest_for_later(udp):
    udp._gso = False
    udp._sock = kernel = Kernel(None, BlockingIOError(errno.EAGAIN, "full"))
    udp.send([b"a", b"b", b"c"], ("127.0.0.1", 1))
    assert kernel.sent == [[b"a"]] and udp.wants_write
    udp.flush()
    assert kernel.sent == [[b"a"], [b"b"], [b"c"]] and not udp.wants_write


def test_a_probe_that_does_not_fit_the_path_is_dropped(udp):
    udp._gso = False
    udp._sock = kernel = Kernel(refused(errno.EMSGSIZE))
    udp.send([b"a" * 1400, b"b"], ("127.0.0.1", 1))
    assert kernel.sent == [[b"b"]]


def test_a_network_that_is_gone_is_reported_and_what_was_sent_is_lost(udp):
    udp._gso = False
    udp._sock = kernel = Kernel(refused(errno.ENETUNREACH))
    with pytest.raises(OSError, match="unreachable"):
        udp.send([b"a", b"b"], ("127.0.0.1", 1))
    udp.flush()
    assert kernel.sent == [[b"b"]]


@pytest.mark.parametrize("stays", [True, False])
def test_a_connected_socket_tells_when_the_way_takes_less_than_before(stays):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mute:
        mute.bind(("127.0.0.1", 0))
        udp = UdpSocket.connect(socket.AF_INET, mute.getsockname())
        real = udp._sock
        udp._gso = False
        # The error of a call may be a router's word on an earlier datagram: only that of a second call is this datagram's own.
        udp._sock = kernel = Kernel(None, refused(errno.EMSGSIZE), refused(errno.EMSGSIZE) if stays else None)
        udp.send([b"a" * 1400], mute.getsockname())
        if stays:
            with pytest.raises(OSError, match="too long"):
                udp.send([b"b" * 1400], mute.getsockname())
        else:
            udp.send([b"b" * 1400], mute.getsockname())
            assert kernel.sent == [[b"a" * 1400], [b"b" * 1400]]
        real.close()


@given(st.lists(st.integers(1, 9000), max_size=200))
def test_runs_are_what_one_segmented_send_takes(sizes):
    datagrams = [bytes(size) for size in sizes]
    grouped = list(runs(datagrams, batched=True))
    assert [datagram for run in grouped for datagram in run] == datagrams
    for run in grouped:
        assert 1 <= len(run) <= 64 and sum(map(len, run)) <= 65_000
        assert all(len(datagram) == len(run[0]) for datagram in run[:-1]) and len(run[-1]) <= len(run[0])
    assert all(len(run) == 1 for run in runs(datagrams, batched=False))
