"""When the planner is asked for a robot's next subtask, and which subtask a request may use.

Pure: time comes in, nobody is called. A :class:`Cadence` holds the rules; a :class:`SessionPlan` is what one session remembers, which is one
plan and one refresh, whatever happens. The rules:

- a subtask is used with the task that it was planned for, and with prompt settings that would have planned the same;
- a plan becomes the session's only if it is for its newest task, from no older an observation than the one it replaces, and if the session was
  not reset since;
- a refresh that waits for the planner gives way to one from a newer observation; one that runs is waited for;
- after a failure the planner is left alone until the next interval, and nobody waits for it until it has answered again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hosting.templates import PromptSettings

RefreshMode = Literal["every_request", "async"]
OnTaskChange = Literal["wait", "keep"]


@dataclass(frozen=True, slots=True)
class Basis:
    """What a plan is made from: one observation's place among its session's, and what was asked about it.

    Attributes:
        task: the task as the robot sent it.
        settings: the prompt settings in force when its route began; None: those that the planner was loaded with.
        source_index: the observation's number.
        order: grows with each observation of a session.
        observed_s: when the observation came.
    """

    task: str
    settings: PromptSettings | None
    source_index: int
    order: int
    observed_s: float

    def plans_alike(self, settings: PromptSettings | None) -> bool:
        """Whether the planner is asked the same under ``settings``; how the action prompt is made from its answer does not matter to it."""
        if self.settings is None or settings is None:
            return self.settings is settings
        return (self.settings.generation_prompt_format, self.settings.max_generation_tokens) == (
            settings.generation_prompt_format,
            settings.max_generation_tokens,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What the planner said.

    Attributes:
        basis: what it was asked.
        subtask: its answer: ``text``, ``ms`` and whatever else it tells; ``error`` if there is none.
        revision: 1, 2, …: the session's plans in the order they came, across its resets.
    """

    basis: Basis
    subtask: Mapping[str, Any]
    revision: int


@dataclass(slots=True, eq=False)
class Refresh:
    """A background call of the planner under way."""

    begun: bool = False

    def begin(self) -> None:
        """The planner works on it."""
        self.begun = True


class SessionPlan:
    """What is believed about one robot's next step, from the session's start or reset to the next.

    Attributes:
        current: the plan in use; None before the first.
        refresh: the background call under way.
        refreshed_s: when the planner was last asked, in the foreground or beside a request.
        error: why the last answer failed to come, for the client; None once one came.
        failing: whether that was the planner's own failure: not where it was busy, or the observation was wrong.
    """

    __slots__ = ("_order", "_over", "_revisions", "_task", "current", "error", "failing", "refresh", "refreshed_s")

    def __init__(self, revisions: Iterator[int] | None = None) -> None:
        self.current: Plan | None = None
        self.refresh: Refresh | None = None
        self.refreshed_s = -math.inf
        self.error: str | None = None
        self.failing = False
        self._task: str | None = None
        self._order = -math.inf
        self._revisions = revisions or itertools.count(1)
        self._over = False

    def renewed(self) -> SessionPlan:
        """What the session remembers after a reset: nothing but how many plans it has had. What still comes in for this one is dropped."""
        self._over = True
        return SessionPlan(self._revisions)

    def observe(self, basis: Basis) -> None:
        """An observation came; its task is the session's from now on, unless a newer one came first."""
        if basis.order >= self._order:
            self._task, self._order = basis.task, basis.order

    def newest(self, basis: Basis) -> bool:
        """Whether no newer observation has come."""
        return basis.order >= self._order

    def takes(self, basis: Basis) -> bool:
        """Whether a plan made from ``basis`` would become the current one now."""
        return not self._over and basis.task == self._task and self._succeeds(basis)

    def planned(self, basis: Basis, subtask: Mapping[str, Any]) -> Plan:
        """The planner's answer as a plan. It becomes the current one if it still can."""
        plan = Plan(basis, subtask, next(self._revisions))
        if self.takes(basis):
            self.current, self.error, self.failing = plan, None, False
        return plan

    def failed(self, basis: Basis, error: str, *, failing: bool = True) -> None:
        """The planner gave none from ``basis``; ``error`` is what clients are told until it gives one, ``failing`` whether it is the planner's."""
        if self._succeeds(basis):
            self.error, self.failing = error, failing

    def fallback(self, basis: Basis, subtask: Mapping[str, Any]) -> Plan:
        """What is acted on instead of a plan that failed to come."""
        return Plan(basis, subtask, self.current.revision if self.current is not None else 0)

    def ended(self, refresh: Refresh) -> None:
        """``refresh`` is no longer under way."""
        if self.refresh is refresh:
            self.refresh = None

    def _succeeds(self, basis: Basis) -> bool:
        return self.current is None or basis.order >= self.current.basis.order


@dataclass(frozen=True)
class Cadence:
    """How often the planner is asked.

    Attributes:
        refresh: ``every_request`` plans from each observation before acting on it; ``async`` acts on the session's subtask while a newer one is
            planned beside it.
        interval_s: seconds between the starts of two refreshes.
        max_age_s: a request waits for a new subtask where the observation behind the current one is older; None: never.
        on_task_change: a request with a new task waits for its subtask (``wait``), or acts on the old task and its subtask until the new one's
            is there (``keep``).
    """

    refresh: RefreshMode = "every_request"
    interval_s: float = 1.0
    max_age_s: float | None = 10.0
    on_task_change: OnTaskChange = "wait"

    def usable(self, memory: SessionPlan, basis: Basis, now_s: float) -> Plan | None:
        """The plan that a request may act on at once; None: it waits for one of its own."""
        plan = memory.current
        if self.refresh == "every_request" or plan is None:
            return None
        if plan.basis.task != basis.task and self.on_task_change == "wait":
            return None
        if self.max_age_s is not None and now_s - plan.basis.observed_s > self.max_age_s:
            return None
        return plan

    def forgoes(self, memory: SessionPlan, now_s: float) -> bool:
        """Whether the planner failed lately: then a request acts without a subtask rather than wait for the next failure."""
        if self.refresh == "every_request" or not memory.failing:
            return False
        return memory.refresh is not None or now_s - memory.refreshed_s <= 2 * self.interval_s

    def due(self, memory: SessionPlan, basis: Basis, now_s: float) -> bool:
        """Whether a refresh starts from this observation, beside the request that acts on the current plan."""
        if not memory.newest(basis):
            return False
        if memory.refresh is not None:
            return not memory.refresh.begun
        if now_s - memory.refreshed_s >= self.interval_s:
            return True
        plan = memory.current
        outdated = plan is None or plan.basis.task != basis.task or not plan.basis.plans_alike(basis.settings)
        return outdated and memory.error is None
