"""What a slot serves next: each rule by example, then all of them at once against the oracle of request_queue_model.py."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from hosting.calls import Origin
from hosting.policy import OverloadedError
from hosting.request_queue import RequestQueue, Ticket
from tests.hosting.request_queue_model import (
    TICK_S,
    Answered,
    Clear,
    Expire,
    Limits,
    Offer,
    Pass,
    Remove,
    Take,
    Trial,
    failure,
    names,
    random_limits,
    random_steps,
    shortest,
    walk,
)

NO_PLAN: Any = None


def ticket(name: str, order: int = 0, *, key: Any = None, **fields: Any) -> Ticket:
    """``a1`` is of flow ``a``. It does not give way unless ``newest_wins`` is given."""
    origin = Origin(NO_PLAN, name[0], order, 0.0, **{"newest_wins": False, **fields})
    return Ticket(origin, key, name, 0.0)


def observation(name: str, **fields: Any) -> Ticket:
    """``a1`` is flow ``a``'s first; a newer one takes its place."""
    return ticket(name, int(name[1:]), newest_wins=True, **fields)


def offer(queue: RequestQueue, *tickets: Ticket) -> None:
    for each in tickets:
        assert queue.offer(each) is None


def served(queue: RequestQueue, now_s: float = 0.0) -> list[list[str]]:
    """The batches that follow each other from now on."""
    batches = []
    while batch := queue.take(now_s):
        batches.append(names(batch))
    return batches


# Newest wins.


def test_a_newer_observation_takes_the_place_of_the_one_that_waits():
    queue = RequestQueue()
    old, new = observation("a1"), observation("a2")
    offer(queue, old, observation("b1"))
    assert queue.offer(new) is old
    assert len(queue) == 2
    assert served(queue) == [["a2"], ["b1"]], "a robot that sends faster keeps its turn"


def test_an_observation_that_comes_after_a_newer_one_gives_way_itself():
    queue = RequestQueue()
    old, new = observation("a1"), observation("a2")
    offer(queue, new)
    assert queue.offer(old) is old
    assert served(queue) == [["a2"]]


def test_an_observation_keeps_its_place_among_its_flows_other_requests():
    queue = RequestQueue()
    offer(queue, ticket("a-first"), observation("a1"), ticket("a-last"))
    queue.offer(observation("a2"))
    assert served(queue) == [["a-first"], ["a2"], ["a-last"]]


def test_requests_that_do_not_give_way_all_wait():
    queue = RequestQueue()
    offer(queue, ticket("a1"), ticket("a2"), ticket("a3"))
    assert served(queue) == [["a1"], ["a2"], ["a3"]]


def test_an_observation_that_was_taken_is_no_longer_superseded():
    queue = RequestQueue()
    offer(queue, observation("a1"))
    assert names(queue.take(0.0)) == ["a1"]
    offer(queue, observation("a2"))
    assert served(queue) == [["a2"]]


@pytest.mark.parametrize("order", [1, 3])
def test_a_full_queue_has_room_for_a_newer_observation(order: int):
    queue = RequestQueue(max_queue=1)
    waiting, other = observation("a2"), observation(f"a{order}")
    offer(queue, waiting)
    assert queue.offer(other) is (waiting if order > 2 else other)
    assert len(queue) == 1


def test_a_superseding_observation_brings_its_own_deadline_and_key():
    queue = RequestQueue(max_batch=2)
    offer(queue, observation("a1", key="k", deadline_s=1.0), ticket("b1", key="l"))
    queue.offer(observation("a2", key="l", deadline_s=5.0))
    assert queue.expire(2.0) == []
    assert queue.wake_s(2.0) == 5.0
    assert served(queue, 2.0) == [["a2", "b1"]]


# Admission.


def test_a_full_queue_refuses_at_once_and_stays_as_it_is():
    queue = RequestQueue(max_queue=3)
    offer(queue, ticket("a1"), ticket("b1"), ticket("c1"))
    with pytest.raises(OverloadedError, match="3") as refused:
        queue.offer(ticket("d1"))
    assert "\n" not in str(refused.value)
    assert len(queue) == 3
    assert served(queue) == [["a1"], ["b1"], ["c1"]]


def test_being_refused_gives_no_turn():
    queue = RequestQueue(max_queue=2)
    offer(queue, ticket("a1"), ticket("b1"))
    with pytest.raises(OverloadedError):
        queue.offer(ticket("c1"))
    queue.clear()
    offer(queue, ticket("d1"), ticket("c2"))
    assert served(queue) == [["d1"], ["c2"]]


@pytest.mark.parametrize(("max_queue", "half"), [(1, 1), (2, 1), (3, 1), (5, 2), (64, 32)])
def test_one_flow_gets_half_of_the_queue(max_queue: int, half: int):
    queue = RequestQueue(max_queue=max_queue)
    offer(queue, *(ticket(f"a{number}") for number in range(half)))
    with pytest.raises(OverloadedError, match=str(half)):
        queue.offer(ticket("a-one-more"))
    if max_queue > 1:
        offer(queue, ticket("b1"))


def test_the_rows_of_a_request_that_was_admitted_always_are():
    queue = RequestQueue(max_queue=1)
    offer(queue, ticket("a1"), *(ticket(f"a{row}", places=0) for row in range(2, 5)))
    assert len(queue) == 4
    with pytest.raises(OverloadedError):
        queue.offer(ticket("b1"))


@pytest.mark.parametrize(
    "leave",
    [
        lambda queue, waiting: queue.remove(waiting),
        lambda queue, waiting: queue.take(0.0),
        lambda queue, waiting: queue.expire(2.0),
        lambda queue, waiting: queue.clear(),
    ],
    ids=["removed", "taken", "expired", "cleared"],
)
def test_whoever_leaves_makes_room(leave: Callable[[RequestQueue, Ticket], object]):
    queue = RequestQueue(max_queue=1)
    waiting = ticket("a1", deadline_s=1.0)
    offer(queue, waiting)
    leave(queue, waiting)
    assert len(queue) == 0
    offer(queue, ticket("a2"))


def test_superseding_over_and_over_takes_one_place():
    queue = RequestQueue(max_queue=2)
    for number in range(10):
        queue.offer(observation(f"a{number}"))
    offer(queue, observation("b1"))
    assert served(queue) == [["a9"], ["b1"]]


# Fairness.


def test_flows_are_served_in_turn():
    queue = RequestQueue()
    offer(queue, ticket("a1"), ticket("a2"), ticket("a3"), ticket("b1"), ticket("b2"), ticket("c1"))
    assert served(queue) == [["a1"], ["b1"], ["c1"], ["a2"], ["b2"], ["a3"]]


def test_a_flow_that_was_just_served_goes_behind_one_that_came_later():
    queue = RequestQueue()
    offer(queue, ticket("a1"), ticket("a2"), ticket("b1"))
    assert names(queue.take(0.0)) == ["a1"]
    offer(queue, ticket("c1"))
    assert served(queue) == [["b1"], ["a2"], ["c1"]]


def test_a_flow_that_has_nothing_left_and_comes_back_is_last():
    queue = RequestQueue()
    gone = ticket("a1")
    offer(queue, gone, ticket("b1"))
    queue.remove(gone)
    offer(queue, ticket("a2"))
    assert served(queue) == [["b1"], ["a2"]]


def test_a_robot_that_sends_without_end_does_not_delay_another_by_more_than_one_turn():
    queue = RequestQueue()
    offer(queue, observation("a1"), observation("b1"))
    turns = []
    for number in range(2, 8):
        [taken] = queue.take(0.0)
        turns.append(taken.origin.flow)
        for flow in "ab":
            queue.offer(observation(f"{flow}{number}"))
    assert turns == ["a", "b"] * 3


# Priority.


def test_background_work_waits_until_no_robot_does():
    queue = RequestQueue()
    offer(queue, ticket("x1", background=True), ticket("a1"), ticket("a2"))
    assert names(queue.take(0.0)) == ["a1"]
    offer(queue, ticket("b1"))
    assert served(queue) == [["a2"], ["b1"], ["x1"]]


def test_background_work_is_served_in_turn():
    queue = RequestQueue()
    offer(queue, *(ticket(name, background=True) for name in ["x1", "x2", "y1"]))
    assert served(queue) == [["x1"], ["y1"], ["x2"]]


def test_what_is_late_does_not_keep_background_work_waiting():
    queue = RequestQueue()
    offer(queue, ticket("x1", background=True), ticket("a1", deadline_s=1.0))
    assert names(queue.take(2.0)) == ["x1"]


# Batches.


def test_calls_of_equal_keys_share_a_batch_in_the_order_of_their_turns():
    queue = RequestQueue(max_batch=8)
    offer(queue, *(ticket(name, key="k") for name in ["a1", "a2", "b1", "c1"]))
    assert served(queue) == [["a1", "b1", "c1", "a2"]]


def test_a_batch_has_max_batch_rows_at_most_and_the_rest_comes_next():
    queue = RequestQueue(max_batch=2)
    offer(queue, *(ticket(name, key="k") for name in ["a1", "a2", "b1", "c1"]))
    assert served(queue) == [["a1", "b1"], ["c1", "a2"]]


def test_another_key_stays_where_it_was_in_the_rotation():
    queue = RequestQueue(max_batch=8)
    offer(queue, ticket("a1", key="k"), ticket("b1", key="l"), ticket("c1", key="k"), ticket("c2", key="l"), ticket("d1", key="m"))
    assert served(queue) == [["a1", "c1"], ["b1", "c2"], ["d1"]]


def test_a_flows_requests_stay_in_order_where_a_later_one_would_fit():
    queue = RequestQueue(max_batch=8)
    offer(queue, ticket("a1", key="k"), ticket("b1", key="l"), ticket("b2", key="k"))
    assert served(queue) == [["a1"], ["b1"], ["b2"]]


def test_a_call_without_a_key_is_served_by_itself():
    queue = RequestQueue(max_batch=8)
    offer(queue, ticket("a1"), ticket("b1"), ticket("c1", key="k"), ticket("d1"))
    assert served(queue) == [["a1"], ["b1"], ["c1"], ["d1"]]


def test_background_work_rides_along_behind_every_robot_that_fits():
    queue = RequestQueue(max_batch=3)
    offer(queue, *(ticket(name, key="k", background=True) for name in ["x1", "y1"]), *(ticket(name, key="k") for name in ["a1", "a2"]))
    assert served(queue) == [["a1", "a2", "x1"], ["y1"]]


def test_what_is_late_has_no_row():
    queue = RequestQueue(max_batch=2)
    offer(queue, ticket("a1", key="k"), ticket("b1", key="k", deadline_s=1.0), ticket("c1", key="k"))
    assert names(queue.take(2.0)) == ["a1", "c1"]


# Holding a batch for those who are about to come back.


def regular(queue: RequestQueue, flows: Iterable[str] = "abcd") -> RequestQueue:
    """``flows`` have come back at once when they were answered before."""
    for flow in flows:
        queue.answered(flow, -0.25)
        queue.offer(ticket(f"{flow}0", key="k"))
        queue.take(5.0)
    assert len(queue) == 0
    return queue


def holding(*, max_batch: int = 3, answered: Iterable[str] = ("b",)) -> RequestQueue:
    """``answered`` got their replies at 10.0; ``a`` has come back."""
    queue = regular(RequestQueue(max_batch=max_batch, max_wait_s=0.5))
    queue.answered(answered, 10.0)
    offer(queue, ticket("a1", key="k"))
    return queue


def test_a_client_that_is_alone_never_waits():
    queue = holding(answered="a")
    assert queue.wake_s(10.0) is None
    assert names(queue.take(10.0)) == ["a1"]


def test_a_client_that_asks_again_before_it_is_answered_never_waits_for_itself():
    queue = RequestQueue(max_batch=3, max_wait_s=0.5)
    offer(queue, ticket("a1", key="k"))
    queue.answered("a", 10.0)
    assert names(queue.take(10.0)) == ["a1"]


def test_a_batch_is_held_until_everybody_who_was_answered_is_back():
    queue = holding(max_batch=4, answered="bc")
    assert queue.take(10.0) == []
    offer(queue, ticket("b1", key="k"))
    assert queue.take(10.0) == []
    offer(queue, ticket("c1", key="k"))
    assert names(queue.take(10.0)) == ["a1", "b1", "c1"]


def test_a_batch_is_held_no_longer_than_max_wait_s():
    queue = holding()
    assert queue.wake_s(10.0) == 10.5
    assert queue.take(10.49) == []
    assert names(queue.take(10.5)) == ["a1"]


def test_a_batch_is_held_for_the_one_who_was_answered_last():
    queue = holding()
    queue.answered("c", 10.25)
    assert queue.wake_s(10.25) == 10.75
    assert queue.take(10.5) == []
    assert names(queue.take(10.75)) == ["a1"]


def test_somebody_else_who_is_answered_does_not_end_the_hold():
    queue = holding(max_batch=4)
    queue.answered("c", 10.25)
    offer(queue, ticket("c1", key="k"))
    assert queue.wake_s(10.25) == 10.5
    assert queue.take(10.25) == []


def test_a_full_batch_is_not_held():
    queue = holding(max_batch=2)
    assert queue.take(10.0) == []
    offer(queue, ticket("d1", key="k"))
    assert names(queue.take(10.0)) == ["a1", "d1"]


def test_whoever_comes_back_with_something_else_is_no_longer_waited_for():
    queue = holding()
    offer(queue, ticket("b1", key="l"))
    assert served(queue, 10.0) == [["a1"], ["b1"]]


def test_whoever_comes_back_and_is_refused_is_no_longer_waited_for():
    queue = regular(RequestQueue(max_queue=1, max_batch=3, max_wait_s=0.5))
    queue.answered("b", 10.0)
    offer(queue, ticket("a1", key="k"))
    with pytest.raises(OverloadedError):
        queue.offer(ticket("b1", key="k"))
    assert names(queue.take(10.0)) == ["a1"]


def test_nobody_is_waited_for_who_never_came_back_at_once_or_did_not_the_last_time():
    queue = RequestQueue(max_batch=3, max_wait_s=0.5)
    queue.answered("b", 10.0)
    offer(queue, ticket("a1", key="k"))
    assert names(queue.take(10.0)) == ["a1"]
    late = ticket("b1", key="k")
    late.queued_s = 10.75
    queue = holding()
    offer(queue, late)
    assert names(queue.take(10.75)) == ["a1", "b1"]
    queue.answered("b", 11.0)
    offer(queue, ticket("a2", key="k"))
    assert names(queue.take(11.0)) == ["a2"]


@pytest.mark.parametrize("ending", ["cancelled", "expired", "refused", "late for good"])
def test_nobody_is_waited_for_who_may_be_gone(ending: str):
    queue = regular(RequestQueue(max_queue=2, max_batch=3, max_wait_s=0.5), "b")
    if ending == "cancelled":
        offer(queue, cancelled := ticket("b1", key="k"))
        queue.remove(cancelled)
    elif ending == "expired":
        offer(queue, ticket("b1", key="k", deadline_s=1.0))
        queue.expire(2.0)
    elif ending == "refused":
        offer(queue, ticket("c1"), ticket("d1"))
        with pytest.raises(OverloadedError):
            queue.offer(ticket("b1", key="k"))
        served(queue, 2.0)
    else:
        queue.answered("b", 3.0)
        queue.answered("c", 9.0)
    queue.answered("b", 10.0)
    offer(queue, ticket("a1", key="k"))
    assert names(queue.take(10.0)) == ["a1"]


def test_a_call_that_nothing_can_join_is_not_held():
    queue = regular(RequestQueue(max_batch=3, max_wait_s=0.5))
    queue.answered("b", 10.0)
    offer(queue, ticket("a1"))
    assert names(queue.take(10.0)) == ["a1"]


@pytest.mark.parametrize("options", [{"max_batch": 3}, {"max_batch": 1, "max_wait_s": 0.5}], ids=["no max_wait_s", "no batches"])
def test_without_batches_or_max_wait_s_nothing_is_held(options: dict[str, Any]):
    queue = regular(RequestQueue(**options))
    queue.answered("b", 10.0)
    offer(queue, ticket("a1", key="k"))
    assert names(queue.take(10.0)) == ["a1"]


@pytest.mark.parametrize(("deadline_s", "held"), [(10.0, False), (10.4, False), (10.6, True)])
def test_a_batch_is_not_held_beyond_a_deadline_of_anything_that_waits(deadline_s: float, held: bool):
    queue = holding()
    offer(queue, ticket("d1", key="l", deadline_s=deadline_s))
    assert names(queue.take(10.0)) == ([] if held else ["a1"])


def test_a_deadline_that_has_passed_already_ends_no_hold():
    queue = holding()
    offer(queue, ticket("d1", key="k", deadline_s=9.0))
    assert queue.take(10.0) == []


# Deadlines.


def test_what_is_late_is_never_begun_and_comes_out_once():
    queue = RequestQueue()
    late = ticket("a1", deadline_s=1.0)
    offer(queue, late, ticket("b1"))
    assert names(queue.take(1.5)) == ["b1"]
    assert queue.take(1.5) == []
    assert len(queue) == 1
    assert queue.expire(1.5) == [late]
    assert queue.expire(1.5) == []
    assert len(queue) == 0


@pytest.mark.parametrize("deadline_s", [-1.0, 0.0, 1.0])
def test_a_deadline_is_the_last_moment_that_is_in_time(deadline_s: float):
    queue = RequestQueue()
    in_time = ticket("a1", deadline_s=deadline_s)
    offer(queue, in_time)
    assert queue.expire(deadline_s) == []
    assert queue.take(deadline_s + TICK_S) == []
    assert queue.take(deadline_s) == [in_time]


def test_a_late_call_does_not_keep_its_flow_from_being_served():
    queue = RequestQueue()
    offer(queue, ticket("a1", deadline_s=1.0), ticket("a2"))
    assert names(queue.take(2.0)) == ["a2"]


def test_the_earliest_deadline_says_when_to_look_again():
    queue = RequestQueue()
    assert queue.wake_s(0.0) is None
    last = ticket("c1", deadline_s=3.0)
    offer(queue, ticket("a1"), ticket("b1", deadline_s=5.0), last)
    assert queue.wake_s(0.0) == 3.0
    queue.remove(last)
    assert queue.wake_s(0.0) == 5.0


# Leaving.


def test_a_call_is_removed_once():
    queue = RequestQueue()
    leaving = ticket("a1")
    offer(queue, leaving, ticket("a2"))
    assert queue.remove(leaving)
    assert not queue.remove(leaving)
    assert served(queue) == [["a2"]]


def test_a_call_that_was_taken_or_superseded_or_never_offered_cannot_be_removed():
    queue = RequestQueue()
    taken, superseded = ticket("a1"), observation("b1")
    offer(queue, taken, superseded)
    queue.take(0.0)
    queue.offer(observation("b2"))
    assert not any(queue.remove(gone) for gone in (taken, superseded, ticket("c1")))
    assert len(queue) == 1


def test_clearing_gives_everything_back_in_the_order_of_the_turns():
    queue = RequestQueue()
    offer(queue, ticket("x1", background=True), ticket("a1"), ticket("a2"), ticket("b1", deadline_s=0.0))
    assert names(queue.clear()) == ["a1", "b1", "a2", "x1"]
    assert len(queue) == 0
    assert queue.clear() == queue.take(0.0) == queue.expire(1.0) == []
    assert queue.wake_s(0.0) is None


# All of it at once.


class AgainstTheOracle(RuleBasedStateMachine):
    """Hypothesis looks for steps after which the queue and the oracle differ, and shortens them."""

    @initialize(
        max_queue=st.integers(1, 8),
        max_batch=st.integers(1, 4),
        max_wait_ticks=st.integers(0, 4),
    )
    def begin(self, max_queue: int, max_batch: int, max_wait_ticks: int) -> None:
        self.trial = Trial(Limits(max_queue, max_batch, max_wait_ticks * TICK_S))
        self.offered = 0

    def _offer(self, flow: str, key: str | None, within_ticks: int | None, **fields: Any) -> None:
        self.offered += 1
        within_s = None if within_ticks is None else within_ticks * TICK_S
        # One that is not the newest is older than all before it, so no two are of the same age.
        order = self.offered if fields.pop("newest", True) else -self.offered
        self.trial.step(Offer(self.offered, flow, order, key, within_s, **fields))

    @rule(
        flow=st.sampled_from("abcd"),
        newest=st.booleans(),
        key=st.sampled_from([None, "k", "l"]),
        within_ticks=st.none() | st.integers(-1, 6),
    )
    def observe(self, flow: str, newest: bool, key: str | None, within_ticks: int | None) -> None:
        self._offer(flow, key, within_ticks, newest=newest, newest_wins=True, background=flow in "cd")

    @rule(
        flow=st.sampled_from("abcd"),
        key=st.sampled_from([None, "k", "l"]),
        within_ticks=st.none() | st.integers(-1, 6),
        background=st.booleans(),
        places=st.integers(0, 1),
    )
    def ask(self, flow: str, key: str | None, within_ticks: int | None, background: bool, places: int) -> None:
        self._offer(flow, key, within_ticks, background=background, places=places)

    @rule()
    def take(self) -> None:
        self.trial.step(Take())

    @rule()
    def expire(self) -> None:
        self.trial.step(Expire())

    @rule(back=st.integers(0, 7))
    def remove(self, back: int) -> None:
        self.trial.step(Remove(self.offered - back))

    @rule(flows=st.sets(st.sampled_from("abcd")))
    def answered(self, flows: set[str]) -> None:
        self.trial.step(Answered(tuple(sorted(flows))))

    @rule(ticks=st.integers(1, 6))
    def time_passes(self, ticks: int) -> None:
        self.trial.step(Pass(ticks * TICK_S))

    @rule()
    def clear(self) -> None:
        self.trial.step(Clear())

    def teardown(self) -> None:
        if hasattr(self, "trial"):
            self.trial.drain()


TestAgainstTheOracle = AgainstTheOracle.TestCase
TestAgainstTheOracle.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def test_a_long_random_walk_breaks_no_rule():
    result = walk(30_000, seed=1)
    assert result.violations == []
    assert result.steps == 30_000
    assert all(count > 100 for count in result.seen.values()), result.seen
    assert set(result.seen) == {
        *("taken", "superseded", "came too late", "refused", "expired", "removed", "cleared"),
        *("held", "batches of several", "background rides along"),
    }


# The oracle notices: queues that break one rule each.


class NewestGoesLast(RequestQueue):
    def offer(self, ticket: Ticket) -> Ticket | None:
        given_way = super().offer(ticket)
        if given_way is not None and given_way is not ticket:
            self.remove(ticket)
            super().offer(ticket)
        return given_way


class BeginsLateWork(RequestQueue):
    def take(self, now_s: float) -> list[Ticket]:
        return super().take(now_s - 1.0)


class HoldsTooLong(RequestQueue):
    def answered(self, flows: Iterable[Any], now_s: float) -> None:
        super().answered(flows, now_s + TICK_S)


class NeverHolds(RequestQueue):
    def answered(self, flows: Iterable[Any], now_s: float) -> None:
        pass


class LosesWhatExpires(RequestQueue):
    def expire(self, now_s: float) -> list[Ticket]:
        return super().expire(now_s)[:1]


class AdmitsOneMore(RequestQueue):
    def __init__(self, *, max_queue: int, **limits: Any) -> None:
        super().__init__(max_queue=max_queue + 1, **limits)


class BatchesOneMore(RequestQueue):
    def __init__(self, *, max_batch: int, **limits: Any) -> None:
        super().__init__(max_batch=max_batch + 1, **limits)


@pytest.mark.parametrize(
    "broken",
    [NewestGoesLast, BeginsLateWork, HoldsTooLong, NeverHolds, LosesWhatExpires, AdmitsOneMore, BatchesOneMore],
)
def test_a_broken_queue_is_found_and_shown_in_few_steps(broken: type[RequestQueue]):
    rng = random.Random(0)
    for _ in range(200):
        limits, steps = random_limits(rng), random_steps(rng, 50)
        if failure(limits, steps, broken) is not None:
            break
    else:
        pytest.fail("none of 200 walks showed it")
    few = shortest(limits, steps, broken)
    assert failure(limits, few, broken) is not None
    assert failure(limits, few) is None, "the queue itself does them right"
    assert len(few) <= 8, few


class TestAside:
    """Calls that go behind the others for a while: of clients whose last ones made a batch fail."""

    def test_they_go_alone_behind_what_robots_wait_for_and_before_what_nobody_waits_for(self) -> None:
        queue = RequestQueue(max_batch=4)
        for waiting in (aside("x1", 9.0), aside("y1", 9.0), ticket("z1", background=True, key="k"), ticket("a1", key="k"), ticket("b1", key="k")):
            assert queue.offer(waiting) is None
        assert [[t.item for t in queue.take(0.0)] for _ in range(5)] == [["a1", "b1", "z1"], ["x1"], ["y1"], [], []]

    def test_in_time_they_go_first(self) -> None:
        queue = RequestQueue(max_batch=4)
        queue.offer(aside("x1", 9.0))
        queue.offer(ticket("a1", key="k"))
        assert [[t.item for t in queue.take(9.0)] for _ in range(2)] == [["x1"], ["a1"]]

    def test_newest_wins_between_both_kinds_of_one_flow_also_in_a_full_queue(self) -> None:
        queue = RequestQueue(max_queue=1)
        old, new, newest = (
            aside("x1", 9.0, order=1, newest_wins=True),
            ticket("x2", order=2, newest_wins=True),
            aside("x3", 9.0, order=3, newest_wins=True),
        )
        assert [queue.offer(old), queue.offer(new), queue.offer(newest), queue.offer(new)] == [None, old, new, new]
        assert queue.take(0.0) == [newest] and len(queue) == 0

    def test_they_can_be_cancelled_expire_and_are_cleared(self) -> None:
        queue = RequestQueue()
        cancelled, late, left = aside("x1", 9.0), aside("y1", 9.0, deadline_s=1.0), aside("z1", 9.0)
        for waiting in (cancelled, late, left):
            queue.offer(waiting)
        assert queue.remove(cancelled) and queue.expire(2.0) == [late] and queue.clear() == [left] and len(queue) == 0


def aside(name: str, until_s: float, order: int = 0, **fields: Any) -> Ticket:
    waiting = ticket(name, order, **fields)
    waiting.aside_until_s = until_s
    return waiting
