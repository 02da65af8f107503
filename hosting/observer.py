"""What the server reports of its work, for whoever counts it. :mod:`hosting.metrics` is the one that does."""

from __future__ import annotations

from hosting.calls import Served, Slot


class Observer:
    """Told of everything that happens, on the event loop's thread; does nothing by itself. Implementations must be quick and never raise."""

    def request(self, slot: Slot, mode: str, outcome: str, seconds: float) -> None:
        """A request was answered. ``slot``: the endpoint it came to; ``mode``: default, subtask_only or action_only, reset or metadata, or unknown
        where it could not be read; ``outcome``: ``ok`` or the failure's code (:class:`hosting.failures.Failure`), or ``cancelled``."""

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

    def decode_steps(self, steps: int) -> None:
        """The planner took that many decode steps for one subtask."""

    def received(self, slot: Slot, transport: str, count: int) -> None:
        """A message of ``count`` bytes came over ``transport`` (``websocket``, ``quic`` or ``unix``)."""

    def sent(self, slot: Slot, transport: str, count: int) -> None:
        """A message of ``count`` bytes was handed to ``transport``."""
