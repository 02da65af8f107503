"""What one request asks of the slots: the calls that a route yields, and whose request they are part of."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hosting.cadence import SessionPlan
from hosting.policy import Reply

Slot = Literal["planner", "action"]


@dataclass(frozen=True)
class Together:
    """How a call is served in one model call with others.

    Attributes:
        key: calls whose keys are equal can be served together.
        row: this call's share of the arguments.
        serve: rows → one reply each.
    """

    key: Hashable
    row: Any
    serve: Callable[[Sequence[Any]], Sequence[Reply]]


@dataclass(frozen=True)
class Question:
    """What a call asks, where two that ask the same get the same answer and one is enough.

    Attributes:
        key: whatever is cheap to compare; equal for questions that may be the same.
        arrays: whatever is not, by name; questions of equal keys are the same where these have equal values.
    """

    key: Hashable
    arrays: Mapping[str, Any]


@dataclass(frozen=True)
class SlotCall:
    """A call that a route wants made on ``slot``'s thread: by itself, or ``together`` with others like it.

    Attributes:
        question: answers of calls in flight that ask the same are shared; None: never.
        timeout_s: how long the route waits for the answer; None: for ever. What the model is doing then goes on.
    """

    slot: Slot
    call: Callable[[], Reply]
    together: Together | None = None
    question: Question | None = None
    timeout_s: float | None = None


@dataclass(frozen=True)
class Background:
    """A call that is made beside the request that asks for it; the route goes on at once.

    Attributes:
        begun: called when the slot begins it; a newer one of the same session takes the place of one that has not begun.
        done: called with its reply or its error, whichever way it ends.
    """

    call: SlotCall
    begun: Callable[[], None]
    done: Callable[[Reply | BaseException], None]


Steps = Generator[SlotCall | Background, Reply, Reply]
"""A route under way: yields what it wants done, is sent each call's reply (or thrown its error), returns the request's reply."""


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one call.

    Attributes:
        queue_s: seconds it waited for the slot.
        infer_s: seconds the model took, for the whole batch.
        batch: rows of that batch.
    """

    slot: Slot
    queue_s: float
    infer_s: float
    batch: int


@dataclass(slots=True, eq=False)
class Origin:
    """Whose request a call is part of.

    Attributes:
        plan: what was believed about the robot when the request came; a reset meanwhile leaves it to this request alone.
        flow: requests of one flow are served in the order they came, flows in turn.
        order: grows with each request of the flow; where ``newest_wins``, one that waits gives way to one of a higher order.
        arrived_s: when the request came (:func:`time.perf_counter`).
        deadline_s: no call of it is begun after this; None: no deadline.
        index: the observation's number: its ``obs_index``, or its place in the session, from 0.
        replan: whether the request asks for a new subtask.
        background: gives way to everything that a robot waits for.
        places: what it counts towards the queue's length: 1, or 0 for all but the first row of a batched request.
        served: the calls made so far.
    """

    plan: SessionPlan
    flow: Hashable
    order: int
    arrived_s: float
    deadline_s: float | None = None
    index: int = 0
    replan: bool = False
    newest_wins: bool = True
    background: bool = False
    places: int = 1
    served: list[Served] = field(default_factory=list)
