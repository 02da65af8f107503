"""Who is remembered, for how long, and what a reset takes away; time is a number that the tests advance."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from hosting.cadence import Basis
from hosting.policy import OverloadedError
from hosting.sessions import SessionStore


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def store(clock: Clock, **settings: Any) -> SessionStore:
    return SessionStore(clock=clock, **{"ttl_s": 10.0, "max_sessions": 3, **settings})


def test_an_id_is_the_same_session_on_every_connection_and_survives_them(clock: Clock) -> None:
    sessions = store(clock)
    first, second = sessions.client(), sessions.client()
    robot = first.observe("a")
    assert (robot.next_index(), robot.next_index()) == (0, 1)
    first.close()
    assert second.observe("a") is robot and robot.next_index() == 2 and robot.requests == 2
    assert second.observe("b") is not robot and len(sessions) == 2


def test_without_an_id_each_connection_has_one_of_its_own(clock: Clock) -> None:
    sessions = store(clock)
    first, second = sessions.client(), sessions.client()
    assert len(sessions) == 0
    mine = first.observe(None)
    assert first.observe(None) is mine and second.observe(None) is not mine and len(sessions) == 2
    clock.now_s += 1e6
    assert sessions.sweep() == 0 and first.observe(None) is mine
    first.close()
    assert [entry["anonymous"] for entry in sessions.snapshot()] == [True] and len(sessions) == 1


def test_a_request_that_outlives_its_connection_leaves_nothing_behind(clock: Clock) -> None:
    sessions = store(clock)
    client = sessions.client()
    client.observe(None)
    client.close()
    late = client.observe(None)
    assert late.next_index() == 0 and len(sessions) == 0
    client.observe("a")
    assert client.reset(None) == 0


def test_forgotten_after_its_time(clock: Clock) -> None:
    sessions = store(clock)
    client = sessions.client()
    robot = client.observe("a")
    clock.now_s += 9.9
    assert sessions.sweep() == 0 and client.observe("a") is robot
    clock.now_s += 10
    again = client.observe("a")  # nobody swept
    assert again is not robot and again.key != robot.key and again.next_index() == 0
    clock.now_s += 5
    client.observe("b")
    clock.now_s += 5
    assert sessions.sweep() == 1 and [entry["id"] for entry in sessions.snapshot()] == ["b"]


def test_a_session_in_flight_is_not_forgotten(clock: Clock) -> None:
    sessions = store(clock)
    client = sessions.client()
    robot, other = client.observe("a"), client.observe("b")
    robot.in_flight += 1
    clock.now_s += 60
    assert client.observe("a") is robot
    clock.now_s += 60
    assert sessions.sweep() == 1 and client.observe("a") is robot and client.observe("b") is not other
    robot.in_flight -= 1
    clock.now_s += 9
    assert sessions.sweep() == 0
    clock.now_s += 1
    assert sessions.sweep() == 2


def test_the_one_unused_for_longest_makes_room(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    sessions = store(clock)
    client = sessions.client()
    for name in ("a", "b", "c"):
        client.observe(name)
        clock.now_s += 1
    client.observe("a")
    with caplog.at_level(logging.INFO, logger="hosting.sessions"):
        for name in ("d", "e"):
            client.observe(name)
        assert [entry["id"] for entry in sessions.snapshot()] == ["e", "d", "a"] and sessions.evicted == 2
        assert [entry["id"] for entry in sessions.snapshot(2)] == ["e", "d"]
        assert len(caplog.records) == 1
        clock.now_s += 60
        sessions.client().observe("f")  # what is over anyway is no eviction
        assert sessions.evicted == 2 and len(sessions) == 1
        for name in "ghi":
            client.observe(name)
    assert sessions.evicted == 3 and [record.getMessage().split(",")[0] for record in caplog.records] == ["sessions: 3 are remembered"] * 2


def test_no_session_in_flight_makes_room(clock: Clock) -> None:
    sessions = store(clock)
    client = sessions.client()
    robots = [client.observe(name) for name in "abc"]
    for robot in robots:
        robot.in_flight += 1
    with pytest.raises(OverloadedError, match=r"^session_id: all 3 sessions .* have requests under way; .*sessions\.max_sessions$"):
        client.observe("d")
    assert client.observe("a") is robots[0]
    robots[1].in_flight -= 1
    client.observe("d")
    assert {entry["id"] for entry in sessions.snapshot()} == {"a", "c", "d"}


def test_reset_begins_anew(clock: Clock) -> None:
    sessions = store(clock)
    client = sessions.client()
    robot = client.observe("a")
    robot.next_index()
    plan = robot.plan
    basis = Basis("tidy", None, source_index=0, order=0, observed_s=clock.now_s)
    plan.observe(basis)
    plan.planned(basis, {"text": "pick up"})
    assert client.reset(["a", "nobody", "a"]) == 1
    assert (robot.epoch, robot.observations, robot.requests) == (1, 0, 1) and robot.plan is not plan and robot.plan.current is None
    assert client.observe("a") is robot and robot.next_index() == 0


def test_an_observation_that_begins_its_session(clock: Clock) -> None:
    client = store(clock).client()
    robot = client.observe("a", begins=True)
    assert robot.epoch == 0 and robot.next_index() == 0
    assert client.observe("a", begins=True) is robot and robot.epoch == 1 and robot.next_index() == 0
    mine = client.observe(None)
    mine.next_index()
    assert client.observe(None, begins=True).next_index() == 0


def test_reset_of_all_is_of_all_that_this_connection_used(clock: Clock) -> None:
    sessions = store(clock)
    first, second = sessions.client(), sessions.client()
    mine, shared, own = first.observe("mine"), first.observe("shared"), first.observe(None)
    second.observe("shared")
    others, anonymous = second.observe("other"), second.observe(None)
    assert first.reset(None) == 3
    assert [session.epoch for session in (mine, shared, own, others, anonymous)] == [1, 1, 1, 0, 0]
    assert second.reset(["mine"]) == 1 and mine.epoch == 2
    assert sessions.client().reset(None) == 0


def test_reset_of_all_spares_who_took_a_forgotten_name(clock: Clock) -> None:
    sessions = store(clock)
    first, second = sessions.client(), sessions.client()
    first.observe("a")
    clock.now_s += 10
    other = second.observe("a")
    assert first.reset(None) == 0 and other.epoch == 0


def test_reset_is_a_use(clock: Clock) -> None:
    client = store(clock).client()
    robot = client.observe("a")
    clock.now_s += 9
    client.reset(["a"])
    clock.now_s += 9
    assert client.observe("a") is robot
    clock.now_s += 10
    assert client.reset(["a"]) == 0


def test_a_connection_remembers_no_more_than_the_store(clock: Clock) -> None:
    sessions = store(clock)
    client = sessions.client()
    for number in range(1000):
        client.observe(str(number))
        assert len(sessions) <= 3 and len(client._used) <= 6
    assert client.reset(None) == 3


def test_snapshot(clock: Clock) -> None:
    sessions = store(clock)
    client = sessions.client()
    robot = client.observe("a")
    index = robot.next_index()
    robot.in_flight += 1
    nothing = {"instruction": None, "task": None, "subtask": None, "subtask_age_s": None, "subtask_revision": None}
    counted = {"requests": 1, "observations": 1, "in_flight": 1, "epoch": 0}
    assert sessions.snapshot() == [{"id": "a", "key": 0, "anonymous": False, "age_s": 0.0, "idle_s": 0.0, **counted, **nothing}]
    basis = Basis("tidy", None, index, order=7, observed_s=clock.now_s - 0.5)
    robot.plan.observe(basis)
    robot.plan.planned(basis, {"text": "pick up", "ms": 3.0})
    clock.now_s += 2
    client.observe(None)
    known, anonymous = sessions.snapshot()
    assert known["age_s"] == known["idle_s"] == 2.0 and anonymous["id"] is None and anonymous["anonymous"]
    assert {key: known[key] for key in nothing} == {
        "instruction": None,
        "task": "tidy",
        "subtask": "pick up",
        "subtask_age_s": 2.5,
        "subtask_revision": 1,
    }


def test_by_key(clock: Clock) -> None:
    sessions = store(clock)
    client = sessions.client()
    robot, own = client.observe("a"), client.observe(None)
    assert sessions.by_key(robot.key) is robot and sessions.by_key(own.key) is own and sessions.by_key(99) is None
    assert sessions.remembers(robot) and sessions.remembers(own)
    client.close()
    assert sessions.by_key(own.key) is None and not sessions.remembers(own)
    clock.now_s += 10
    assert sessions.by_key(robot.key) is None and not sessions.remembers(robot)  # nobody swept
    assert client.observe("a") is not robot and not sessions.remembers(robot)


def test_an_operators_instruction_ends_with_the_episode(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    client = store(clock).client()
    robot = client.observe("a")
    for reset in (lambda: client.reset(["a"]), lambda: client.reset(None), lambda: client.observe("a", begins=True)):
        robot.instruction = "stop"
        client.observe("a")
        assert robot.instruction == "stop"
        with caplog.at_level(logging.INFO):
            reset()
        assert robot.instruction is None and "session a: was reset; the operator's instruction has ended" in caplog.messages
        caplog.clear()
