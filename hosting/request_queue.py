"""What a slot serves next: the waiting calls of all clients, and the rules by which they go.

Pure: time comes in, nothing blocks, no thread is known. The rules:

- *newest wins*: of one flow at most one such call waits; a newer one takes its place, in the place it had;
- *fairness*: flows are served in turn, one call each;
- *priority*: what a robot waits for goes before what nobody waits for; a call that was set aside goes by itself, when no other robot waits, but not
  for ever;
- *batches*: the head is joined by calls of the same key, in the order of their turns;
- *deadlines*: what is late is never begun;
- *admission*: the queue is bounded, and one flow gets at most half of it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Set
from dataclasses import dataclass
from typing import Any

from hosting.calls import Origin
from hosting.policy import OverloadedError


@dataclass(slots=True, eq=False)
class Ticket:
    """One call that waits.

    Attributes:
        origin: whose it is.
        key: calls of equal keys can be served in one batch; None: by itself only.
        item: whatever its owner wants back.
        queued_s: when it was offered.
        aside_until_s: until then it goes, by itself, behind all others that a robot waits for, and from then on before them; None: in its turn.
    """

    origin: Origin
    key: Hashable | None
    item: Any
    queued_s: float
    aside_until_s: float | None = None

    def expired(self, now_s: float) -> bool:
        """Whether it may no longer be begun."""
        return self.origin.deadline_s is not None and self.origin.deadline_s < now_s


Rotation = OrderedDict[Hashable, deque[Ticket]]
"""Flow → its calls; the flow whose turn is next comes first."""


class Regulars:
    """Who is likely to ask again in a moment: flows that were answered just now, and that came back in time when they were answered before.

    Args:
        wait_s: how long after its answer a flow is in time.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._until_s: dict[Hashable, float] = {}  # of those that were answered and have not come back
        self._regular: set[Hashable] = set()

    def came(self, flow: Hashable, now_s: float) -> None:
        """``flow`` asks."""
        until_s = self._until_s.pop(flow, None)
        if until_s is not None:
            (self._regular.add if now_s <= until_s else self._regular.discard)(flow)

    def left(self, flow: Hashable) -> None:
        """``flow`` gets no answer."""
        self._regular.discard(flow)

    def answered(self, flows: Iterable[Hashable], now_s: float) -> None:
        """These flows got their answers."""
        if self._wait_s <= 0:
            return
        for flow in [flow for flow, until_s in self._until_s.items() if until_s <= now_s]:
            del self._until_s[flow]
            self._regular.discard(flow)
        self._until_s.update(dict.fromkeys(flows, now_s + self._wait_s))

    def until_s(self, but: Set[Hashable], now_s: float) -> float:
        """How long one of them, ``but`` these, is expected; ``now_s`` if none is."""
        if not self._regular:
            return now_s
        return max((until_s for flow, until_s in self._until_s.items() if flow in self._regular and flow not in but), default=now_s)


class RequestQueue:
    """The calls that wait for one slot.

    Args:
        max_queue: how many requests may wait.
        max_batch: most rows of a batch.
        max_wait_s: how long a batch that is not full may be held for clients that were answered just now and are likely to ask again, since they
            did so at once before. A client that is alone never waits.
    """

    def __init__(self, *, max_queue: int = 64, max_batch: int = 1, max_wait_s: float = 0.0) -> None:
        self.max_queue = max_queue
        self.max_batch = max_batch
        self.max_wait_s = max_wait_s
        self._foreground: Rotation = OrderedDict()
        self._aside: Rotation = OrderedDict()
        self._background: Rotation = OrderedDict()
        self._rotations = (self._foreground, self._aside, self._background)
        self._timed: dict[Ticket, None] = {}  # those with a deadline
        self._regulars = Regulars(max_wait_s)
        self._places: dict[Hashable, int] = {}
        self._taken_places = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def offer(self, ticket: Ticket) -> Ticket | None:
        """Let ``ticket`` wait.

        Returns:
            The ticket that gives way to a newer one of its flow, if there is one; it may be ``ticket`` itself.

        Raises:
            OverloadedError: there is no room for it.
        """
        origin = ticket.origin
        self._regulars.came(origin.flow, ticket.queued_s)
        waiting = self._rival(ticket)
        if waiting is None:
            try:
                self._admit(ticket)
            except OverloadedError:
                self._regulars.left(origin.flow)
                raise
            self._append(ticket)
            return None
        if waiting.origin.order > origin.order:
            return ticket
        tickets = self._rotation(waiting)[origin.flow]
        if tickets is self._rotation(ticket).get(origin.flow):
            tickets[tickets.index(waiting)] = ticket
            self._forget(waiting)
            self._count(ticket)
        else:
            self._drop(waiting)
            self._append(ticket)
        return waiting

    def _rival(self, ticket: Ticket) -> Ticket | None:
        """The call that gives way to ``ticket``, or to which it gives way itself."""
        if not ticket.origin.newest_wins:
            return None
        rotations = (self._background,) if ticket.origin.background else (self._foreground, self._aside)
        tickets = (waiting for rotation in rotations for waiting in rotation.get(ticket.origin.flow, ()))
        return next((waiting for waiting in tickets if waiting.origin.newest_wins), None)

    def _append(self, ticket: Ticket) -> None:
        self._rotation(ticket).setdefault(ticket.origin.flow, deque()).append(ticket)
        self._count(ticket)

    def make_room(self, ticket: Ticket) -> Ticket | None:
        """Take out what nobody waits for where the queue has no room for ``ticket``, which is about to be offered and which somebody waits for.

        Returns:
            The background call whose turn is last; None: there is room, or nothing to take out would make any.
        """
        origin = ticket.origin
        if origin.background or not origin.places or self._taken_places + origin.places <= self.max_queue:
            return None
        if self._rival(ticket) is not None:
            return None  # one of the two gives way
        if self._places.get(origin.flow, 0) + origin.places > self._share:
            return None
        last = next((tickets[-1] for tickets in reversed(self._background.values()) if tickets[-1].origin.places), None)
        if last is not None:
            self._drop(last)
        return last

    def waiting(self) -> list[Ticket]:
        """All that wait, flow by flow."""
        return [ticket for rotation in self._rotations for tickets in rotation.values() for ticket in tickets]

    def remove(self, ticket: Ticket) -> bool:
        """Take ``ticket`` out; returns whether it was still there."""
        tickets = self._rotation(ticket).get(ticket.origin.flow)
        if tickets is None or ticket not in tickets:
            return False
        self._drop(ticket)
        self._regulars.left(ticket.origin.flow)
        return True

    def expire(self, now_s: float) -> list[Ticket]:
        """Take out what is late."""
        late = [ticket for ticket in self._timed if ticket.expired(now_s)]
        for ticket in late:
            self._drop(ticket)
            self._regulars.left(ticket.origin.flow)
        return late

    def take(self, now_s: float) -> list[Ticket]:
        """The next batch, taken out; empty where nothing waits or where it is worth holding (:meth:`wake_s`)."""
        batch = self._next(now_s)
        if not batch or self._hold_s(batch, now_s) is not None:
            return []
        for ticket in batch:
            rotation, flow = self._rotation(ticket), ticket.origin.flow
            self._drop(ticket)
            if flow in rotation:
                rotation.move_to_end(flow)
        return batch

    def wake_s(self, now_s: float) -> float | None:
        """When to look again although nothing was offered: at the end of a hold or at a deadline; None: never."""
        moments = [ticket.origin.deadline_s for ticket in self._timed if ticket.origin.deadline_s is not None]
        if (batch := self._next(now_s)) and (hold_s := self._hold_s(batch, now_s)) is not None:
            moments.append(hold_s)
        return min(moments, default=None)

    def answered(self, flows: Iterable[Hashable], now_s: float) -> None:
        """These flows got their answers; whoever sends one observation after the other sends the next in a moment."""
        self._regulars.answered(flows, now_s)

    def clear(self) -> list[Ticket]:
        """Take out everything, in the order it would have been served one by one."""
        tickets: list[Ticket] = []
        for rotation in self._rotations:
            while rotation:
                flow, waiting = next(iter(rotation.items()))
                tickets.append(waiting[0])
                self._drop(waiting[0])
                self._regulars.left(flow)
                if flow in rotation:
                    rotation.move_to_end(flow)
        return tickets

    def _next(self, now_s: float) -> list[Ticket]:
        """The batch whose turn it is; nothing is taken out."""
        for tickets in self._aside.values():
            if (aside := tickets[0]).aside_until_s is not None and aside.aside_until_s <= now_s and not aside.expired(now_s):
                return [aside]
        batch: list[Ticket] = []
        for rotation in self._rotations:
            lanes = [iter(tickets) for tickets in rotation.values()]
            while lanes:
                served = []
                for lane in lanes:
                    ticket = next((ticket for ticket in lane if not ticket.expired(now_s)), None)
                    if ticket is None or (batch and (ticket.key != batch[0].key or rotation is self._aside)):
                        continue
                    batch.append(ticket)
                    if ticket.key is None or len(batch) == self.max_batch or rotation is self._aside:
                        return batch
                    served.append(lane)
                lanes = served
        return batch

    def _hold_s(self, batch: list[Ticket], now_s: float) -> float | None:
        """Until when ``batch`` is held for more to join it; None: it is not."""
        if self.max_wait_s <= 0 or batch[0].key is None or len(batch) == self.max_batch:
            return None
        until_s = self._regulars.until_s({ticket.origin.flow for ticket in batch}, now_s)
        if until_s <= now_s:
            return None
        missed = any(deadline_s is not None and now_s <= deadline_s <= until_s for deadline_s in (t.origin.deadline_s for t in self._timed))
        return None if missed else until_s

    def _admit(self, ticket: Ticket) -> None:
        places, flow = ticket.origin.places, ticket.origin.flow
        if not places:
            return
        if self._taken_places + places > self.max_queue:
            raise OverloadedError(f"overloaded: {self._taken_places} requests are waiting already; try again later")
        held = self._places.get(flow, 0)
        if held + places > self._share:
            raise OverloadedError(f"overloaded: {held} requests of this session are waiting already; wait for their answers")

    @property
    def _share(self) -> int:
        """Places that one flow may have."""
        return max(1, self.max_queue // 2)

    def _rotation(self, ticket: Ticket) -> Rotation:
        if ticket.origin.background:
            return self._background
        return self._foreground if ticket.aside_until_s is None else self._aside

    def _count(self, ticket: Ticket) -> None:
        origin = ticket.origin
        self._length += 1
        self._taken_places += origin.places
        if origin.places:
            self._places[origin.flow] = self._places.get(origin.flow, 0) + origin.places
        if origin.deadline_s is not None:
            self._timed[ticket] = None

    def _forget(self, ticket: Ticket) -> None:
        origin = ticket.origin
        self._length -= 1
        self._taken_places -= origin.places
        if origin.places:
            self._places[origin.flow] -= origin.places
            if not self._places[origin.flow]:
                del self._places[origin.flow]
        self._timed.pop(ticket, None)

    def _drop(self, ticket: Ticket) -> None:
        rotation = self._rotation(ticket)
        tickets = rotation[ticket.origin.flow]
        tickets.remove(ticket)
        if not tickets:
            del rotation[ticket.origin.flow]
        self._forget(ticket)
