"""How long to wait: one call's deadline, and the pauses between attempts to reconnect."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Reconnect:
    """When a lost connection is tried again: exponential back-off with full jitter, so that a fleet does not return in step.

    Attributes:
        attempts: connections tried before a call gives up; the first at once.
        first_s: longest pause before the second attempt; the longest pause doubles from one attempt to the next.
        cap_s: no pause is longer.
        rng: draws each pause uniformly between 0 and its longest.
        sleep: waits; time comes in so that tests need none.
        clock: seconds that never go back.
    """

    attempts: int = 5
    first_s: float = 0.1
    cap_s: float = 2.0
    rng: random.Random = field(default_factory=random.Random)
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts: got {self.attempts}, expected at least 1")

    def pauses_s(self) -> Iterator[float]:
        """The pause before each attempt, in seconds; none before the first."""
        yield 0.0
        for doubling in range(self.attempts - 1):
            yield self.rng.uniform(0.0, min(self.cap_s, self.first_s * 2**doubling))


class Deadline:
    """A point in time that a whole call keeps to, whatever it does on the way.

    Args:
        timeout_s: from now; None: never.
    """

    def __init__(self, timeout_s: float | None, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at_s = math.inf if timeout_s is None else clock() + timeout_s

    def left_s(self) -> float | None:
        """Seconds until then, not below 0; None: for ever."""
        return None if math.isinf(self._at_s) else max(0.0, self._at_s - self._clock())

    def within(self, limit_s: float | None) -> float | None:
        """``limit_s``, or what is left if that is less; None: for ever."""
        left_s = self.left_s()
        if left_s is None or limit_s is None:
            return (None if limit_s == math.inf else limit_s) if left_s is None else left_s
        return min(left_s, limit_s)

    def allows(self, pause_s: float) -> bool:
        """Whether something can still be done after ``pause_s``."""
        left_s = self.left_s()
        return left_s is None or left_s > pause_s
