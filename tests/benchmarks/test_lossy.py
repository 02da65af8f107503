"""What the benchmark of lossy links is built of."""

from __future__ import annotations

import socket

import pytest

from benchmarks import lossy
from benchmarks.lossy import BACK_TO_BACK, QUIC, QUIC_8, QUIC_JPEG, ROBOT, STOCK, Plan, figures_of, goals_of, observations, running, tcp_default
from tests.benchmarks.link.emulated import link_or_skip


def congestion_control(tcp: socket.socket) -> str:
    return tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).partition(b"\0")[0].decode()


def test_the_peers_connections_have_the_congestion_control_that_is_named():
    with socket.socket() as ordinary:
        usual = congestion_control(ordinary)
    with tcp_default("reno"):
        listening = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listening.getsockname())
    accepted, _ = listening.accept()
    with listening, client, accepted, socket.socket() as later:
        assert [congestion_control(tcp) for tcp in (client, accepted)] == ["reno", "reno"]
        assert congestion_control(later) == usual


def test_a_congestion_control_that_the_kernel_lacks_is_an_error():
    with tcp_default("there-is-none"), pytest.raises(FileNotFoundError):
        socket.create_server(("127.0.0.1", 0))


def test_the_cameras_are_as_large_as_a_robots():
    raw, jpegs = observations()
    assert sum(image.nbytes for image in raw["images"].values()) == 451_584
    assert 42_000 < sum(map(len, jpegs["images"].values())) < 48_000


def test_goals_follow_from_the_link():
    times = {(BACK_TO_BACK, STOCK): [100.0, 300.0, 200.0], (BACK_TO_BACK, QUIC): [150.0], (BACK_TO_BACK, QUIC_8): [52.0]}
    times |= {(BACK_TO_BACK, QUIC_JPEG): [20.0], (ROBOT, STOCK): [10.0], (ROBOT, QUIC): [6.0]}
    figures = figures_of(times)
    assert figures[BACK_TO_BACK][STOCK] == {"p50": 200, "p99": pytest.approx(298), "n": 3, "share": 1}

    def reached(loss_percent: float) -> list[tuple[float, str, bool]]:
        return [(goal.value, goal.goal, goal.reached) for goal in goals_of(Plan(20, loss_percent), figures)]

    robot, default_path = (0.6, "<= 0.6", True), (0.1, "<= 0.1", True)
    assert reached(0) == [robot, (0.75, "<= 1.05", True)]
    assert reached(0.5) == [robot, (0.75, "<= 0.75", True), (0.26, "<= 0.25", False), default_path]
    assert reached(2) == [robot, default_path]


def fails(ready):
    raise SystemExit(1)


def test_a_server_that_does_not_start_is_an_error():
    with link_or_skip() as link, pytest.raises(EOFError), running(fails, link.b):
        pass


def test_the_plans_name_clients_that_can_be_had():
    names = {name for plan in (*lossy.FULL, *lossy.QUICK) for name in (*plan.bulk, *plan.paused)}
    with link_or_skip() as link, lossy.servers_on(link) as servers, lossy.connected(servers, names) as clients:
        raw, jpegs = observations()
        for client in clients.values():
            assert lossy.ask(client, raw) > 0
            assert lossy.ask(client, jpegs) > 0
