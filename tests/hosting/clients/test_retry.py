"""Deadlines and back-off, with a clock that only tests move."""

from __future__ import annotations

import math
import random

import pytest

from hosting.clients.retry import Deadline, Reconnect


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_what_is_left_of_a_deadline() -> None:
    clock = Clock()
    deadline = Deadline(2.0, clock)
    assert deadline.left_s() == 2.0 and deadline.within(10.0) == 2.0 and deadline.within(1.0) == 1.0 and deadline.within(None) == 2.0
    assert deadline.allows(1.9) and not deadline.allows(2.0)
    clock.now_s += 5.0
    assert deadline.left_s() == 0.0 and deadline.within(None) == 0.0 and not deadline.allows(0.0)


def test_no_deadline() -> None:
    deadline = Deadline(None, Clock())
    assert deadline.left_s() is None and deadline.within(None) is None and deadline.within(3.0) == 3.0 and deadline.allows(1e9)
    assert Deadline(math.inf, Clock()).left_s() is None and deadline.within(math.inf) is None


class Longest(random.Random):
    def uniform(self, a: float, b: float) -> float:
        assert a == 0.0, "full jitter"
        return b


def test_pauses_double_up_to_the_cap() -> None:
    assert list(Reconnect(attempts=7, rng=Longest()).pauses_s()) == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0]
    assert list(Reconnect(attempts=1).pauses_s()) == [0.0]


def test_pauses_differ_between_robots() -> None:
    assert list(Reconnect(rng=random.Random(1)).pauses_s()) != list(Reconnect(rng=random.Random(2)).pauses_s())


def test_no_attempts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^attempts: got 0, expected at least 1$"):
        Reconnect(attempts=0)
