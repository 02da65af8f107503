"""SIGTERM at any moment loses no request that the server had accepted (see ``tests/e2e/drains.py``); ``benchmarks/drains.py`` does it 100 times."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import drains
from tests.e2e.drains import Books, Drain, Ended
from tests.hosting.transports.unix_support import socket_directory


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with socket_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def drained(directory: Path) -> list[Drain]:
    return [drains.drain(directory / str(seed), seed) for seed in range(8)]


def test_no_request_that_was_begun_or_answered_is_lost(drained: list[Drain]) -> None:
    assert [drain.lost for drain in drained] == [set()] * len(drained)


def test_every_connection_is_closed_in_good_order_and_the_process_exits_with_0(drained: list[Drain]) -> None:
    assert [drain.faults for drain in drained] == [[]] * len(drained)


def test_requests_were_under_way_and_every_transport_had_its_share(drained: list[Drain]) -> None:
    """Else the above would hold for a server that nobody asked anything."""
    assert all(drain.under_way > 0 for drain in drained)
    answered: Counter[str] = Counter()
    for drain in drained:
        for (transport, _, _), books in zip(drains.FLEET, drain.robots, strict=True):
            answered[transport] += list(books.outcomes.values()).count("ok")
    assert answered.keys() == drains.WIRES.keys() and min(answered.values()) > 0


def test_the_comparison_sees_what_is_lost() -> None:
    """The books of a drain that went wrong."""
    books = Books(sent={"a", "b", "c"}, outcomes={"a": "ok"}, ending=Ended("1006", clean=False))
    log = (
        {"logger": "stub.began", "level": "INFO", "message": "b"},
        *({"logger": "hosting.requests", "level": "INFO", "message": "", "request_id": name, "outcome": "ok"} for name in "ac"),
    )
    wrong = Drain(exit_code=-signal.SIGKILL, took_s=0.1, under_way=2, robots=(books,), log=log)
    assert wrong.lost == {"b", "c"}
    assert wrong.faults == ["exit code -9", "lost: b", "lost: c", "robot 0 (action): 1006, 2 requests unanswered"]
