"""What the server reports of its work: to :mod:`hosting.metrics`, which counts it, and to :mod:`hosting.recent`, which remembers some of it."""

from __future__ import annotations

from dataclasses import dataclass

from hosting.calls import Served, Slot
from hosting.policy import Observation, Reply
from hosting.sessions import Session


@dataclass(frozen=True, slots=True)
class PlannerWork:
    """What one answer of the planner took.

    Attributes:
        forward_passes: the one over the prompt, and one for each decode step.
        drafted_tokens: guessed tokens that were checked beside the prompt.
        accepted_tokens: those that were right, each a decode step less.
    """

    forward_passes: int = 0
    decode_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Observer:
    """Told of everything that happens, on the event loop's thread; does nothing by itself. Implementations must be quick and never raise."""

    def request(self, slot: Slot, mode: str, outcome: str, seconds: float) -> None:
        """A request was answered. ``slot``: the endpoint it came to; ``mode``: default, subtask_only or action_only, reset or metadata, or unknown
        where it could not be read; ``outcome``: ``ok`` or the failure's code (:class:`hosting.failures.Failure`), or ``cancelled``."""

    def answered(self, slot: Slot, session: Session, observation: Observation, reply: Reply, ms: float) -> None:
        """An observation of ``session`` was answered with ``reply`` after ``ms``. The observation is as the robot sent it, with its JPEG images
        decoded; its arrays are views of the message, so whoever keeps one keeps the message. Rows of a batch that name no session are not told."""

    def refused(self, slot: Slot, session: Session, observation: Observation, error: Exception) -> None:
        """It failed with ``error``; where it was one of a batch, any of them may be at fault."""

    def served(self, served: Served) -> None:
        """One call of a request was served by its slot; of a batch, each row is reported."""

    def batch(self, slot: Slot, rows: int) -> None:
        """A slot's model was called with ``rows`` rows."""

    def superseded(self, slot: Slot) -> None:
        """A call gave way to a newer one of its session."""

    def expired(self, slot: Slot) -> None:
        """A call's deadline passed before its turn came."""

    def overloaded(self, slot: Slot) -> None:
        """A call was refused because the slot's queue was full."""

    def refreshed(self, outcome: str) -> None:
        """A background refresh of a subtask ended: ``ok``, ``stale`` (another task or a reset came meanwhile), ``superseded`` or ``failed``."""

    def subtask_used(self, age_s: float, *, waited: bool) -> None:
        """An action request was answered with a subtask planned from an observation ``age_s`` old."""

    def subtask_done(self) -> None:
        """A request was answered with a subtask that says that nothing is left to do."""

    def shared(self) -> None:
        """A planner call was answered by an equal one in flight."""

    def planned(self, work: PlannerWork) -> None:
        """The planner answered, and tells what it took."""

    def received(self, slot: Slot, transport: str, count: int) -> None:
        """A message of ``count`` bytes came over ``transport`` (``websocket``, ``quic`` or ``unix``)."""

    def sent(self, slot: Slot, transport: str, count: int) -> None:
        """A message of ``count`` bytes was handed to ``transport``."""


class Observers(Observer):
    """Several, each told of everything in turn."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def request(self, slot: Slot, mode: str, outcome: str, seconds: float) -> None:
        for observer in self._observers:
            observer.request(slot, mode, outcome, seconds)

    def answered(self, slot: Slot, session: Session, observation: Observation, reply: Reply, ms: float) -> None:
        for observer in self._observers:
            observer.answered(slot, session, observation, reply, ms)

    def refused(self, slot: Slot, session: Session, observation: Observation, error: Exception) -> None:
        for observer in self._observers:
            observer.refused(slot, session, observation, error)

    def served(self, served: Served) -> None:
        for observer in self._observers:
            observer.served(served)

    def batch(self, slot: Slot, rows: int) -> None:
        for observer in self._observers:
            observer.batch(slot, rows)

    def superseded(self, slot: Slot) -> None:
        for observer in self._observers:
            observer.superseded(slot)

    def expired(self, slot: Slot) -> None:
        for observer in self._observers:
            observer.expired(slot)

    def overloaded(self, slot: Slot) -> None:
        for observer in self._observers:
            observer.overloaded(slot)

    def refreshed(self, outcome: str) -> None:
        for observer in self._observers:
            observer.refreshed(outcome)

    def subtask_used(self, age_s: float, *, waited: bool) -> None:
        for observer in self._observers:
            observer.subtask_used(age_s, waited=waited)

    def subtask_done(self) -> None:
        for observer in self._observers:
            observer.subtask_done()

    def shared(self) -> None:
        for observer in self._observers:
            observer.shared()

    def planned(self, work: PlannerWork) -> None:
        for observer in self._observers:
            observer.planned(work)

    def received(self, slot: Slot, transport: str, count: int) -> None:
        for observer in self._observers:
            observer.received(slot, transport, count)

    def sent(self, slot: Slot, transport: str, count: int) -> None:
        for observer in self._observers:
            observer.sent(slot, transport, count)
