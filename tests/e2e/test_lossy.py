"""Our clients and openpi's stock one over a slow, long and lossy link: a short form of ``benchmarks/lossy.py``, which has the figures."""

from __future__ import annotations

import pytest

from benchmarks.link.emulator import LinkUnavailableError, Traffic
from benchmarks.lossy import QUIC, QUIC_8, QUIC_JPEG, ROBOT, STOCK, WEBSOCKET, Plan, figures_of, measure


def measured(plan: Plan) -> tuple[dict[str, dict[str, float]], tuple[Traffic, Traffic]]:
    try:
        times, ways = measure(plan)
    except LinkUnavailableError as error:
        pytest.skip(f"no emulated link: {error}")
    return {name: row for rows in figures_of(times).values() for name, row in rows.items()}, ways


def test_a_robots_pauses_cost_quic_less():
    rows, ways = measured(Plan(60, 0, paused=(STOCK, QUIC), paused_s={ROBOT: 4}))
    assert [way.lost + way.dropped for way in ways] == [0, 0]
    assert rows[QUIC]["n"] >= 5
    # One round trip of 60 ms against two; the goal is 0.6
    assert rows[QUIC]["share"] < 0.9


def test_lost_packets_cost_time_and_nothing_else():
    names = (STOCK, QUIC, QUIC_8, WEBSOCKET, QUIC_JPEG)
    rows, ways = measured(Plan(20, 2, bulk=names, bulk_s=0.1, turn=(1, 2)))  # whose replies are checked
    assert {name: row["n"] for name, row in rows.items()} == dict.fromkeys(names, 2)
    assert all(way.lost > 0 for way in ways)
    # Some ten round trips against hundreds of milliseconds of waiting; the goals are 0.25 and 0.1
    assert rows[QUIC_8]["share"] < 0.8
    assert rows[QUIC_JPEG]["share"] < 0.5
