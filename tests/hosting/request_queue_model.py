"""The rules of the request queue a second time, slow and plain, and random walks that hold the queue against them.

    python -m tests.hosting.request_queue_model [--steps N] [--seed S]

prints the steps, what became of the tickets and the violations, each with the shortest sequence that shows it; exits with 1 if there is one.
The same seed gives the same steps. :class:`Oracle` says what every call must give; :class:`Ledger` knows nothing of it and holds the queue to
what is promised to robots: nothing is lost, nobody starves, nothing late is begun.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from hosting.calls import Origin
from hosting.policy import OverloadedError
from hosting.request_queue import RequestQueue, Ticket

TICK_S = 1 / 64
"""All times are multiples of it, so that sums are exact and moments coincide often."""

Lane = tuple[bool, Hashable]
"""Background or not, and the flow: what is served in turn."""


@dataclass(frozen=True)
class Limits:
    max_queue: int = 64
    max_batch: int = 1
    max_wait_s: float = 0.0


@dataclass(frozen=True)
class Offer:
    """``number`` names the ticket; its deadline is ``within_s`` from the moment of the offer."""

    number: int
    flow: str
    order: int
    key: str | None = None
    within_s: float | None = None
    newest_wins: bool = False
    background: bool = False
    places: int = 1


@dataclass(frozen=True)
class Remove:
    number: int


@dataclass(frozen=True)
class Expire:
    pass


@dataclass(frozen=True)
class Take:
    pass


@dataclass(frozen=True)
class Answered:
    flows: tuple[str, ...]


@dataclass(frozen=True)
class Clear:
    pass


@dataclass(frozen=True)
class Pass:
    seconds: float


Step = Offer | Remove | Expire | Take | Answered | Clear | Pass


class Queue(Protocol):
    """What is on trial."""

    def __len__(self) -> int: ...
    def offer(self, ticket: Ticket) -> Ticket | None: ...
    def remove(self, ticket: Ticket) -> bool: ...
    def expire(self, now_s: float) -> list[Ticket]: ...
    def take(self, now_s: float) -> list[Ticket]: ...
    def wake_s(self, now_s: float) -> float | None: ...
    def answered(self, flows: Iterable[Hashable], now_s: float) -> None: ...
    def clear(self) -> list[Ticket]: ...


class RuleBrokenError(AssertionError):
    """A rule was broken."""


def lane_of(ticket: Ticket) -> Lane:
    return (ticket.origin.background, ticket.origin.flow)


def late(ticket: Ticket, now_s: float) -> bool:
    return ticket.origin.deadline_s is not None and ticket.origin.deadline_s < now_s


class Oracle:
    """One list of what waits, and a number that says whose turn it is; everything else is worked out anew at each call."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: list[Ticket] = []
        self.turns: dict[Lane, int] = {}
        self.last_turn = 0
        self.answered_s: dict[Hashable, float] = {}
        self.regular: set[Hashable] = set()

    def offer(self, ticket: Ticket) -> Ticket | None:
        origin = ticket.origin
        # Whoever asks has come back, whatever becomes of what it asks.
        if (answered_s := self.answered_s.pop(origin.flow, None)) is not None:
            self.regular.discard(origin.flow)
            if ticket.queued_s <= answered_s + self.limits.max_wait_s:
                self.regular.add(origin.flow)
        for place, other in enumerate(self.waiting):
            if origin.newest_wins and other.origin.newest_wins and other.origin.flow == origin.flow:
                if other.origin.order > origin.order:
                    return ticket
                self.waiting[place] = ticket
                return other
        places = sum(other.origin.places for other in self.waiting)
        of_flow = sum(other.origin.places for other in self.waiting if other.origin.flow == origin.flow)
        if origin.places and (places + origin.places > self.limits.max_queue or of_flow + origin.places > max(1, self.limits.max_queue // 2)):
            self.regular.discard(origin.flow)
            raise OverloadedError("full")
        if not any(lane_of(other) == lane_of(ticket) for other in self.waiting):
            self.go_to_the_end(lane_of(ticket))
        self.waiting.append(ticket)
        return None

    def remove(self, ticket: Ticket) -> bool:
        found = ticket in self.waiting
        self.end([ticket] if found else [])
        return found

    def end(self, tickets: Sequence[Ticket]) -> None:
        """They are not served; nobody is waited for because of them."""
        self.waiting = [other for other in self.waiting if other not in tickets]
        self.regular -= {ticket.origin.flow for ticket in tickets}

    def expire(self, now_s: float) -> list[Ticket]:
        gone = [ticket for ticket in self.waiting if late(ticket, now_s)]
        self.end(gone)
        return gone

    def take(self, now_s: float) -> list[Ticket]:
        if self.held_until_s(now_s) is not None:
            return []
        batch = self.batch(now_s)
        self.waiting = [ticket for ticket in self.waiting if ticket not in batch]
        for ticket in batch:
            self.go_to_the_end(lane_of(ticket))
        return batch

    def wake_s(self, now_s: float) -> float | None:
        moments = [self.held_until_s(now_s), *(ticket.origin.deadline_s for ticket in self.waiting)]
        return min((moment for moment in moments if moment is not None), default=None)

    def answered(self, flows: Iterable[Hashable], now_s: float) -> None:
        self.regular -= {flow for flow, answered_s in self.answered_s.items() if answered_s + self.limits.max_wait_s <= now_s}
        self.answered_s = {flow: answered_s for flow, answered_s in self.answered_s.items() if answered_s + self.limits.max_wait_s > now_s}
        self.answered_s.update(dict.fromkeys(flows, now_s))

    def clear(self) -> list[Ticket]:
        gone = self.one_by_one(self.waiting)
        self.end(gone)
        return gone

    def one_by_one(self, tickets: Sequence[Ticket]) -> list[Ticket]:
        """``tickets`` in the order they are served: foreground first, then the first of every lane by its turn, then the second of each."""
        seen: Counter[Lane] = Counter()
        order: list[tuple[bool, int, int, Ticket]] = []
        for ticket in tickets:
            lane = lane_of(ticket)
            order.append((ticket.origin.background, seen[lane], self.turns[lane], ticket))
            seen[lane] += 1
        return [ticket for *_, ticket in sorted(order, key=lambda entry: entry[:3])]

    def batch(self, now_s: float) -> list[Ticket]:
        order = self.one_by_one([ticket for ticket in self.waiting if not late(ticket, now_s)])
        if not order or order[0].key is None:
            return order[:1]
        batch: list[Ticket] = []
        blocked: set[Lane] = set()
        for ticket in order:
            if ticket.key != order[0].key:
                blocked.add(lane_of(ticket))
            elif lane_of(ticket) not in blocked:
                batch.append(ticket)
        return batch[: self.limits.max_batch]

    def held_until_s(self, now_s: float) -> float | None:
        batch, max_wait_s = self.batch(now_s), self.limits.max_wait_s
        if not batch or max_wait_s <= 0 or batch[0].key is None or len(batch) == self.limits.max_batch:
            return None
        riding = {ticket.origin.flow for ticket in batch}
        ends = [begun_s + max_wait_s for flow, begun_s in self.answered_s.items() if flow in self.regular and flow not in riding]
        ends = [end_s for end_s in ends if now_s < end_s]
        if not ends:
            return None
        deadlines = [ticket.origin.deadline_s for ticket in self.waiting if ticket.origin.deadline_s is not None]
        return None if any(now_s <= deadline_s <= max(ends) for deadline_s in deadlines) else max(ends)

    def go_to_the_end(self, lane: Lane) -> None:
        self.last_turn += 1
        self.turns[lane] = self.last_turn


@dataclass
class Ledger:
    """What waits and who was served before whom, kept from what the queue answers; ``seen`` counts how tickets ended."""

    limits: Limits
    waiting: list[Ticket] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    last_answer_s: float | None = None
    _overtaken: dict[Lane, Counter[Lane]] = field(default_factory=dict)

    def admitted(self, ticket: Ticket) -> None:
        self.waiting.append(ticket)

    def refused(self, ticket: Ticket) -> None:
        expect(not self._fits(ticket), f"{ticket.item} was refused although there is room")
        expect(not (ticket.origin.newest_wins and self._newest(ticket.origin.flow)), f"{ticket.item} was refused although it takes another's place")
        self.seen["refused"] += 1

    def ended(self, ticket: Ticket, fate: str) -> None:
        expect(ticket in self.waiting, f"{ticket.item} was {fate}, but it does not wait")
        self.waiting.remove(ticket)
        self.seen[fate] += 1

    def taken(self, batch: Sequence[Ticket], now_s: float) -> None:
        live = [ticket for ticket in self.waiting if not late(ticket, now_s)]
        if not batch:
            if live:
                self.seen["held"] += 1
                expect(self.last_answer_s is not None, "held although nobody was answered")
                expect(now_s < (self.last_answer_s or 0.0) + self.limits.max_wait_s, "held beyond max_wait_s")
            return
        head = batch[0]
        expect(len(batch) == 1 or (head.key is not None and len(batch) <= self.limits.max_batch), "a batch of more rows than there may be")
        expect(all(ticket.key == head.key for ticket in batch), "a batch of several keys")
        expect(not any(late(ticket, now_s) for ticket in batch), "late work was begun")
        expect(not head.origin.background or all(ticket.origin.background for ticket in live), "background work went before a robot's")
        served = {lane_of(ticket) for ticket in batch}
        for lane in {lane_of(ticket) for ticket in live} - served:
            if lane[0] == head.origin.background:
                overtaken = self._overtaken.setdefault(lane, Counter())
                overtaken[lane_of(head)] += 1
                expect(overtaken[lane_of(head)] == 1, f"{lane_of(head)} had a second turn while {lane} waited for its first")
        for ticket in batch:
            self.ended(ticket, "taken")
        for lane in served:
            self._overtaken.pop(lane, None)
        self.seen["batches of several"] += len(batch) > 1
        self.seen["background rides along"] += not head.origin.background and batch[-1].origin.background

    def check(self) -> None:
        """What holds after every step."""
        expect(sum(ticket.origin.places for ticket in self.waiting) <= self.limits.max_queue, "more waits than may")
        for flow in {ticket.origin.flow for ticket in self.waiting}:
            places = sum(ticket.origin.places for ticket in self.waiting if ticket.origin.flow == flow)
            expect(places <= max(1, self.limits.max_queue // 2), f"{flow} holds more than its half")
            expect(len(self._newest(flow)) <= 1, f"two observations of {flow} wait, one of which is old")
        lanes = {lane_of(ticket) for ticket in self.waiting}
        self._overtaken = {lane: counts for lane, counts in self._overtaken.items() if lane in lanes}

    def _fits(self, ticket: Ticket) -> bool:
        """Found by letting it in and counting."""
        others = [*self.waiting, ticket]
        of_flow = [other for other in others if other.origin.flow == ticket.origin.flow]
        return not ticket.origin.places or (
            sum(other.origin.places for other in others) <= self.limits.max_queue
            and sum(other.origin.places for other in of_flow) <= max(1, self.limits.max_queue // 2)
        )

    def _newest(self, flow: Hashable) -> list[Ticket]:
        return [ticket for ticket in self.waiting if ticket.origin.newest_wins and ticket.origin.flow == flow]


class Trial:
    """One queue beside the oracle and the ledger, from empty to empty.

    Args:
        limits: the queue's arguments.
        make: gives the queue that is on trial.
    """

    def __init__(self, limits: Limits, make: Callable[..., Queue] = RequestQueue) -> None:
        self.queue: Queue = make(**asdict(limits))
        self.oracle = Oracle(limits)
        self.ledger = Ledger(limits)
        # 0 is a moment like any other, so deadlines may be 0 or less.
        self.now_s = 0.0
        self._tickets: dict[int, Ticket] = {}

    def step(self, step: Step) -> None:
        """Do ``step`` to all of them.

        Raises:
            RuleBrokenError: the queue did something else than it has to.
        """
        now_s = self.now_s
        match step:
            case Offer():
                self._offer(step)
            case Remove(number):
                if (ticket := self._tickets.get(number)) is not None:
                    removed = same(f"remove({number})", self.queue.remove(ticket), self.oracle.remove(ticket))
                    if removed:
                        self.ledger.ended(ticket, "removed")
            case Expire():
                gone = self.queue.expire(now_s)
                same("expire()", sorted(names(gone)), sorted(names(self.oracle.expire(now_s))))
                for ticket in gone:
                    self.ledger.ended(ticket, "expired")
            case Take():
                batch = self.queue.take(now_s)
                same("take()", names(batch), names(self.oracle.take(now_s)))
                self.ledger.taken(batch, now_s)
            case Answered(flows):
                self.queue.answered(flows, now_s)
                self.oracle.answered(flows, now_s)
                if flows:
                    self.ledger.last_answer_s = now_s
            case Clear():
                gone = self.queue.clear()
                same("clear()", names(gone), names(self.oracle.clear()))
                for ticket in gone:
                    self.ledger.ended(ticket, "cleared")
            case Pass(seconds):
                self.now_s += seconds
        self.ledger.check()
        same("len()", len(self.queue), len(self.ledger.waiting))
        same("wake_s()", self.queue.wake_s(self.now_s), self.oracle.wake_s(self.now_s))

    def drain(self) -> None:
        """Take until nothing waits: whatever was offered has ended by then, and every call of ``take`` gets on with it.

        Raises:
            RuleBrokenError: something stays, or a step went wrong.
        """
        self.step(Pass(self.ledger.limits.max_wait_s))
        while self.ledger.waiting:
            before = len(self.ledger.waiting)
            self.step(Expire())
            self.step(Take())
            expect(len(self.ledger.waiting) < before, "calls wait, no hold is possible any more, and none is taken")

    def _offer(self, step: Offer) -> None:
        origin = Origin(
            plan=_NO_PLAN,
            flow=step.flow,
            order=step.order,
            arrived_s=self.now_s,
            deadline_s=None if step.within_s is None else self.now_s + step.within_s,
            newest_wins=step.newest_wins,
            background=step.background,
            places=step.places,
        )
        ticket = self._tickets[step.number] = Ticket(origin, step.key, step.number, self.now_s)
        given_way = same(f"offer({step.number})", _offered(self.queue, ticket), _offered(self.oracle, ticket))
        if given_way == "overloaded":
            self.ledger.refused(ticket)
            return
        if given_way != ticket.item and given_way is not None:
            self.ledger.ended(self._tickets[given_way], "superseded")
        self.ledger.admitted(ticket)
        if given_way == ticket.item:
            self.ledger.ended(ticket, "came too late")


_NO_PLAN: Any = None
"""The queue knows flows only."""


def _offered(to: Queue | Oracle, ticket: Ticket) -> Any:
    try:
        given_way = to.offer(ticket)
    except OverloadedError:
        return "overloaded"
    return None if given_way is None else given_way.item


def names(tickets: Iterable[Ticket]) -> list[Any]:
    return [ticket.item for ticket in tickets]


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuleBrokenError(otherwise)


def same(what: str, came: Any, expected: Any) -> Any:
    expect(came == expected, f"{what}: got {came}, expected {expected}")
    return came


def replay(limits: Limits, steps: Iterable[Step], make: Callable[..., Queue] = RequestQueue) -> Counter[str]:
    """Do ``steps`` to a new queue and drain it; returns how many tickets ended how, and how often a batch was held or shared.

    Raises:
        RuleBrokenError: a step went wrong.
        Exception: whatever the queue raises that it should not.
    """
    trial = Trial(limits, make)
    for step in steps:
        trial.step(step)
    trial.drain()
    return trial.ledger.seen


def failure(limits: Limits, steps: Iterable[Step], make: Callable[..., Queue] = RequestQueue) -> Exception | None:
    """What goes wrong with ``steps``."""
    try:
        replay(limits, steps, make)
    except Exception as error:  # noqa: BLE001 - a queue that breaks down is as wrong as one that answers wrongly
        return error
    return None


def shortest(limits: Limits, steps: Sequence[Step], make: Callable[..., Queue] = RequestQueue) -> list[Step]:
    """Of ``steps`` that go wrong, some that still do, none of which can be left out."""
    left = list(steps)
    size = len(left)
    while size:
        size = min(size, len(left))
        for begin in range(len(left) - size, -1, -1):
            fewer = left[:begin] + left[begin + size :]
            if len(fewer) < len(left) and failure(limits, fewer, make) is not None:
                left = fewer
                break
        else:
            size //= 2
    return left


def random_limits(rng: random.Random) -> Limits:
    return Limits(
        max_queue=rng.choice([1, 2, 3, 5, 8, 13]),
        max_batch=rng.choice([1, 2, 3, 4, 8]),
        max_wait_s=rng.choice([0.0, TICK_S, 4 * TICK_S]),
    )


def random_steps(rng: random.Random, count: int) -> list[Step]:
    """Robots a to d, of which c and d ask for background work mostly. Only plain calls of one flow are of both classes."""
    steps: list[Step] = []
    offered = 0
    while len(steps) < count:
        flow = rng.choice("abcd")
        match rng.choices(["offer", "take", "pass", "answered", "remove", "expire", "clear"], [44, 22, 12, 9, 7, 5, 0.4])[0]:
            case "offer":
                offered += 1
                newest_wins = rng.random() < 0.5
                background = (flow in "cd") ^ (not newest_wins and rng.random() < 0.2)
                steps.append(
                    Offer(
                        offered,
                        flow,
                        # Now and then one comes after a newer one.
                        order=-offered if newest_wins and rng.random() < 0.2 else offered,
                        key=rng.choice([None, "k", "k", "k", "l"]),
                        within_s=rng.choice([None, None, TICK_S * rng.randint(-1, 8)]),
                        newest_wins=newest_wins,
                        background=background,
                        places=int(newest_wins or rng.random() < 0.8),
                    )
                )
            case "take":
                steps.append(Take())
            case "pass":
                steps.append(Pass(TICK_S * rng.choice([0, 1, 1, 2, 5])))
            case "answered":
                steps.append(Answered(tuple(rng.sample("abcd", rng.randint(0, 3)))))
            case "remove":
                steps.append(Remove(rng.randint(max(1, offered - 8), max(1, offered))))
            case "expire":
                steps.append(Expire())
            case _:
                steps.append(Clear())
    return steps


@dataclass
class Walk:
    """What ``steps`` random steps showed: how often what was ``seen``; ``violations`` are texts with the shortest sequence each."""

    steps: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


def walk(steps: int, seed: int, make: Callable[..., Queue] = RequestQueue, *, most_violations: int = 3) -> Walk:
    """Random steps in episodes of up to 200, each on a new queue with limits of its own; ends early after ``most_violations``."""
    rng = random.Random(seed)
    result = Walk()
    while result.steps < steps and len(result.violations) < most_violations:
        limits = random_limits(rng)
        episode = random_steps(rng, min(rng.choice([10, 50, 200]), steps - result.steps))
        result.steps += len(episode)
        try:
            result.seen += replay(limits, episode, make)
        except Exception:  # noqa: BLE001 - as in :func:`failure`, which says what it is of the shortest sequence
            few = shortest(limits, episode, make)
            result.violations.append("\n  ".join([f"{failure(limits, few, make)!r} with {limits}", *map(repr, few), "(drained)"]))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result = walk(arguments.steps, arguments.seed)
    seen = ", ".join(f"{what} {count}" for what, count in sorted(result.seen.items()))
    sys.stdout.write("\n".join([f"steps {result.steps}", seen, f"violations {len(result.violations)}", *result.violations]) + "\n")
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main())
