"""The emulated link does to packets what it says, touches no other network, and leaves nothing behind."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.link import emulator
from benchmarks.link.emulator import EmulatedLink, LinkUnavailableError, emulated_link
from tests.benchmarks.link.emulated import link_or_skip

HEADERS_BYTES = 28
WAIT_S = 20


@contextmanager
def udp_pair(link: EmulatedLink) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A socket on each side that talks to the other."""
    sockets = []
    for side in (link.a, link.b):
        with side.entered():
            sockets.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sockets[-1].bind((side.address, 0))
        sockets[-1].settimeout(WAIT_S)
    a, b = sockets
    with a, b:
        a.connect(b.getsockname())
        b.connect(a.getsockname())
        yield a, b


def arrived(link: EmulatedLink, count: int) -> set[int]:
    """Which of ``count`` numbered datagrams arrive; no more than a socket's buffer takes."""
    with udp_pair(link) as (a, b):
        for number in range(count):
            a.send(number.to_bytes(4))
        while (way := link.traffic()[0]).lost + way.delivered < count:
            assert way.dropped == 0
        return {int.from_bytes(b.recv(100)) for _ in range(way.delivered)}


def ends(pid: int) -> bool:
    """Whether a process, not necessarily a child, ends soon."""
    try:
        waiting = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    poll = select.poll()
    poll.register(waiting, select.POLLIN)
    try:
        return bool(poll.poll(WAIT_S * 1000))
    finally:
        os.close(waiting)


def test_without_loss_everything_arrives_in_its_order():
    with link_or_skip() as link, udp_pair(link) as (a, b):
        for sender, receiver in ((a, b), (b, a)):
            for number in range(50):
                sender.send(bytes([number]) * 1472)
            assert [receiver.recv(2000) for _ in range(50)] == [bytes([number]) * 1472 for number in range(50)]
        assert [(way.packets, way.bytes, way.lost, way.dropped, way.delivered) for way in link.traffic()] == [(50, 50 * 1500, 0, 0, 50)] * 2


def test_losses_are_random_and_the_same_for_the_same_seed():
    survivors = []
    for seed in (1, 1, 2):
        with link_or_skip(loss_percent=30, seed=seed) as link:
            survivors.append(arrived(link, 200))
    assert survivors[0] == survivors[1] != survivors[2]
    for numbers in survivors:
        assert 27 < 200 - len(numbers) < 93  # five standard deviations


def test_each_direction_has_its_own_losses():
    with link_or_skip(loss_percent=50) as link, udp_pair(link) as (a, b):
        for _ in range(100):
            a.send(b"")
            b.send(b"")
        there, back = link.traffic()
        while there.lost + there.delivered + back.lost + back.delivered < 200:
            there, back = link.traffic()
        assert 0 < there.lost < 100
        assert 0 < back.lost < 100


def test_a_packet_takes_half_the_round_trip():
    with link_or_skip(rtt_ms=60) as link, udp_pair(link) as (a, b):
        started_s = time.monotonic()
        a.send(b"there")
        b.recv(100)
        assert time.monotonic() - started_s >= 0.030
        b.send(b"and back")
        a.recv(100)
        assert time.monotonic() - started_s >= 0.060


def test_the_rate_is_not_exceeded():
    with link_or_skip(rate_mbit=10) as link, udp_pair(link) as (a, b):
        started_s = time.monotonic()
        for _ in range(40):
            a.send(bytes(1000))
        for _ in range(40):
            b.recv(2000)
        assert time.monotonic() - started_s >= 40 * (1000 + HEADERS_BYTES) * 8 / 10e6


def test_a_full_queue_drops_the_packets_that_come_last():
    with link_or_skip(rate_mbit=0.1, queue_packets=10) as link, udp_pair(link) as (a, b):
        for number in range(50):
            a.send(bytes([number]) * 200)
        while (way := link.traffic()[0]).packets < 50:
            pass
        # 18 ms each: a few may have gone while the others came
        assert 30 <= way.dropped <= 40
        assert [b.recv(300)[0] for _ in range(10)] == list(range(10))


def test_only_the_thread_that_enters_is_inside():
    def namespace() -> str:
        return os.readlink("/proc/thread-self/ns/net")

    outside = namespace()
    with link_or_skip() as link:
        with link.a.entered():
            assert len({outside, namespace(), os.readlink(link.b.namespace)}) == 3
            assert namespace() == os.readlink(link.a.namespace)
            with pytest.raises(ZeroDivisionError), link.b.entered():
                raise ZeroDivisionError
            assert namespace() == os.readlink(link.a.namespace)
        assert namespace() == outside


def test_settings_belong_to_one_side():
    name = "net.ipv4.tcp_no_metrics_save"
    with link_or_skip() as link:
        assert (link.a.sysctl(name), link.b.sysctl(name)) == ("0", "0")
        assert link.a.sysctl(name, "1") == "1"
        assert link.b.sysctl(name) == "0"
        with pytest.raises(FileNotFoundError):
            link.a.sysctl("net.ipv4.there_is_none")


def test_two_links_at_once_do_not_meet():
    with link_or_skip() as one, link_or_skip() as other:
        assert arrived(one, 10) == set(range(10))
        assert other.traffic()[0].packets == 0


def test_it_ends_with_its_context():
    with link_or_skip() as link:
        pid = int(link.a.namespace.parts[2])
    assert ends(pid)
    with pytest.raises(OSError, match=str(pid)):
        link.a.enter()


def test_it_ends_with_the_process_that_made_it():
    with link_or_skip():
        pass
    program = (
        "from benchmarks.link.emulator import emulated_link\n"
        "with emulated_link(rtt_ms=1, loss_percent=0, rate_mbit=1) as link:\n"
        "    print(link.a.namespace.parts[2], flush=True)\n"
        "    input()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert ends(pid)


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr(emulator.shutil, "which", lambda name: None)
    with pytest.raises(LinkUnavailableError, match="no C compiler"), emulated_link(rtt_ms=1, loss_percent=0, rate_mbit=1):
        pass


def test_without_the_right_it_says_so():
    with link_or_skip():
        pass
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        program = emulator._build(Path(directory))
        pipe = subprocess.PIPE
        nobody = subprocess.Popen([program, "0", "0", "1", "1", "1"], user=65534, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        with nobody, pytest.raises(LinkUnavailableError, match="cannot make a network namespace: Operation not permitted"):
            EmulatedLink(nobody)


def test_an_end_nobody_asked_for_is_an_error():
    with link_or_skip() as link:
        os.kill(int(link.a.namespace.parts[2]), signal.SIGKILL)
        with pytest.raises((RuntimeError, BrokenPipeError)):
            link.traffic()
