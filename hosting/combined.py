"""Planner → prompt → action: one request in combined mode, and what each request mode does (reference/model.md §13.5)."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from hosting.cadence import Basis, Cadence, Plan, Refresh, SessionPlan
from hosting.calls import Background, Origin, SlotCall, Steps
from hosting.done_subtasks import DoneSubtasks
from hosting.failures import client_text
from hosting.observer import Observer
from hosting.policy import (
    Observation,
    PlannerError,
    PlannerPolicy,
    Policy,
    PromptTooLongError,
    Reply,
    RequestError,
    SupersededError,
    UnavailableError,
)
from hosting.routing import ActionCalls, PlannerCalls, RequestMode, report_work, request_mode, run, without_mode
from hosting.templates import DEFAULT_ACTION_PROMPT_TEMPLATE, LiveSettings, PromptSettings, parse_action_prompt_template
from pi0.prompt import SEND_OR_SET_DEFAULT, prompt_text

OnFailure = Literal["use_task", "fail"]

_SERVED: frozenset[RequestMode] = frozenset({"default", "subtask_only", "action_only"})
_EVERY_REQUEST = Cadence()

MAX_TASK_CHARS = 1 << 14
"""More than any prompt that fits a model has. A session remembers its task, also one that the planner refuses."""


class CombinedPolicy:
    """An action policy whose prompt is rewritten through a planner. Itself a policy, with request modes:

    ============== ==================================================== =======================================
    ``mode``       what runs                                            reply
    ============== ==================================================== =======================================
    ``default``    planner, then the action policy on the template      the action policy's, plus ``subtask``
    ``subtask_only`` the planner                                        ``{"subtask": …}``
    ``action_only``  the action policy on the task as it was sent       the action policy's
    ============== ==================================================== =======================================

    Every ``subtask`` is the planner's own map (``text``, ``ms``, …) and where it comes from:

    ===================== ===================================================================================================
    ``age_ms``            how old the observation that it was planned from is when the action policy is about to be asked
    ``revision``          1, 2, …: which of the session's plans it is; 0: there was none yet
    ``source_index``      the number of the observation that it was planned from
    ``waited``            whether the request waited for the planner
    ``template_revision`` the one revision of the prompt settings that both prompts were made with
    ``error``             only where the planner's last answer failed to come: why
    ``task``              only where it is not the request's: the task that was acted on, since its own has no subtask yet
    ``kept``              only where the planner was not sure enough (``min_confidence``): what it said, and its ``confidence``; ``text`` is then
                          what it said before
    ``done``              only with ``done_subtasks``: whether it is one of them. Then the action policy is not asked, and in every mode the reply is
                          ``{"subtask": …}``
    ===================== ===================================================================================================

    Args:
        planner: the planner slot's policy.
        action: the action slot's policy.
        action_prompt_template: the action policy's prompt; ``{subtask}`` is required, ``{task}`` is optional.
        live: settings that can be edited while the service runs; they then take the place of ``action_prompt_template`` and of the
            prompt settings that the planner was loaded with. Read once per request.
        on_failure: when the planner fails, ``use_task`` acts on the task alone and says so in ``subtask.error``; ``fail`` fails the
            request. A request that is wrong (no camera, prompt too long) fails either way.
        cadence: when a session's subtask is planned anew. A request without a session plans its own.
        timeout_s: how long the planner is waited for; None: for ever. Being late is a failure of the planner.
        min_confidence: a subtask that the planner is less sure of does not take the place of the session's current one; where there is none
            for the task, it is used all the same. None: it always does.
        done_subtasks: what the planner says when nothing is left to do (:class:`~hosting.done_subtasks.DoneSubtasks`).
        clock: what ``Origin.arrived_s`` is a reading of, in seconds.
        observer: is told of every subtask.

    Raises:
        ConfigError: the template is wrong, or a done subtask is.
    """

    def __init__(
        self,
        planner: PlannerPolicy,
        action: Policy,
        *,
        action_prompt_template: str = DEFAULT_ACTION_PROMPT_TEMPLATE,
        live: LiveSettings | None = None,
        on_failure: OnFailure = "use_task",
        cadence: Cadence = _EVERY_REQUEST,
        timeout_s: float | None = None,
        min_confidence: float | None = None,
        done_subtasks: Sequence[str] = (),
        clock: Callable[[], float] = time.perf_counter,
        observer: Observer | None = None,
    ) -> None:
        self.planner = planner
        self.action = action
        self._ask = PlannerCalls(planner)
        self._act = ActionCalls(action)
        self._template = parse_action_prompt_template(action_prompt_template)
        self._live = live
        self._on_failure = on_failure
        self._cadence = cadence
        self._timeout_s = timeout_s
        self._min_confidence = min_confidence
        self._done = DoneSubtasks(done_subtasks)
        self._clock = clock
        self._observer = observer or Observer()

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the action policy tells a client that connects."""
        return self.action.metadata

    def infer(self, obs: Observation, /, **sampling: Any) -> Reply:
        """One observation → one reply, on this thread; ``sampling`` (``noise``, ``seed``) goes to the action policy.

        Raises:
            RequestError: the observation, its mode or its prompt is wrong.
            Exception: whatever a slot raises; the planner's only under ``on_failure="fail"`` or ``mode="subtask_only"``.
        """
        return run(self.steps(obs, **sampling))

    def steps(self, obs: Observation, /, *, origin: Origin | None = None, **sampling: Any) -> Steps:
        """The same as a route, for a driver that has a thread per slot; ``origin`` says whose session the observation is of."""
        mode = request_mode(obs, _SERVED)
        observation = without_mode(obs)
        if mode == "action_only":
            return (yield self._act(observation, **sampling))
        task = prompt_text(obs, getattr(self.action, "default_prompt", None), remedy=SEND_OR_SET_DEFAULT)
        if len(task) > MAX_TASK_CHARS:
            raise PromptTooLongError(f"prompt: has {len(task)} characters, expected at most {MAX_TASK_CHARS}; shorten it")
        settings = self._live.current if self._live is not None else None
        now_s = self._clock()
        memory, basis = _place(origin, task, settings, now_s)
        memory.observe(basis)

        use_task = mode == "default" and self._on_failure == "use_task"
        plan: Plan | None = None
        if mode == "default" and not (origin is not None and origin.replan):
            plan = self._cadence.usable(memory, basis, now_s)
            if plan is not None and plan.basis.task != task and self._done.says(plan.subtask):
                plan = None  # with on_task_change "keep": nothing is left to go on with, and the new task is not done because the old one is
            if plan is None and use_task and self._cadence.forgoes(memory, now_s):
                plan = memory.fallback(basis, {"text": "", "ms": 0.0, "error": memory.error})
        waited = plan is None
        if plan is None:
            plan = yield from self._planned(memory, basis, observation, use_task=use_task)
        elif self._cadence.due(memory, basis, now_s):
            yield self._refresh(memory, basis, observation)

        if not plan.basis.plans_alike(settings):
            settings = plan.basis.settings
        subtask = self._reported(plan, memory, settings, task=task, waited=waited)
        done = self._done.says(plan.subtask)
        if done:
            self._observer.subtask_done()
        if mode == "subtask_only":
            return {"subtask": subtask}
        if "error" not in plan.subtask:
            self._observer.subtask_used(subtask["age_ms"] / 1e3, waited=waited)
        if done:
            return {"subtask": subtask}
        reply = yield self._act({**observation, "prompt": self._prompt(plan, settings)}, **sampling)
        return {**reply, "subtask": subtask}

    def _call(self, memory: SessionPlan, basis: Basis, observation: Observation) -> SlotCall:
        overrides: dict[str, Any] = {}
        if basis.settings is not None:
            overrides = {
                "generation_prompt_format": basis.settings.generation_prompt_format,
                "max_generation_tokens": basis.settings.max_generation_tokens,
            }
        before = memory.current
        previous = before.subtask["text"] if before is not None and before.basis.task == basis.task else None
        return self._ask({**observation, "prompt": basis.task}, previous=previous, timeout_s=self._timeout_s, **overrides)

    def _planned(
        self, memory: SessionPlan, basis: Basis, observation: Observation, *, use_task: bool
    ) -> Generator[SlotCall | Background, Reply, Plan]:
        """A plan from this very observation."""
        memory.refreshed_s = started_s = self._clock()
        try:
            subtask = _subtask_of((yield self._call(memory, basis, observation)))
            if isinstance(subtask, PlannerError):
                raise subtask
        except (RequestError, UnavailableError):
            raise
        except Exception as error:
            if not use_task:
                raise
            text = client_text(error, slot="planner")
            memory.failed(basis, text)
            return memory.fallback(basis, {"text": "", "ms": (self._clock() - started_s) * 1e3, "error": text})
        report_work(self._observer, subtask)
        return memory.planned(basis, self._settled(memory, basis, subtask))

    def _settled(self, memory: SessionPlan, basis: Basis, subtask: dict[str, Any]) -> dict[str, Any]:
        """What becomes of the planner's answer: it, or, where the planner is not sure enough, what it said before about the same task."""
        confidence, before = subtask.get("confidence"), memory.current
        if self._min_confidence is None or confidence is None or confidence >= self._min_confidence:
            return subtask
        if before is None or before.basis.task != basis.task or before.subtask["text"] == subtask["text"]:
            return subtask
        return {**subtask, "text": before.subtask["text"], "kept": {"text": subtask["text"], "confidence": confidence}}

    def _refresh(self, memory: SessionPlan, basis: Basis, observation: Observation) -> Background:
        """The same beside the request, for those that follow."""
        memory.refreshed_s = self._clock()
        memory.refresh = refresh = Refresh()
        return Background(self._call(memory, basis, observation), refresh.begin, partial(self._refreshed, memory, refresh, basis))

    def _refreshed(self, memory: SessionPlan, refresh: Refresh, basis: Basis, outcome: Reply | BaseException) -> None:
        memory.ended(refresh)
        answer = outcome if isinstance(outcome, BaseException) else _subtask_of(outcome)
        match answer:
            case SupersededError():
                self._observer.refreshed("superseded")
            case Exception():
                memory.failed(basis, client_text(answer, slot="planner"), failing=not isinstance(answer, RequestError | UnavailableError))
                self._observer.refreshed("failed")
            case BaseException():
                pass  # cancelled: the slot is being closed
            case _:
                report_work(self._observer, answer)
                taken = memory.takes(basis)
                if taken:
                    memory.planned(basis, self._settled(memory, basis, answer))
                self._observer.refreshed("ok" if taken else "stale")

    def _reported(self, plan: Plan, memory: SessionPlan, settings: PromptSettings | None, *, task: str, waited: bool) -> dict[str, Any]:
        """The ``subtask`` of a reply."""
        basis = plan.basis
        subtask: dict[str, Any] = {
            **plan.subtask,
            **self._done.flag(plan.subtask),
            "age_ms": (self._clock() - basis.observed_s) * 1e3,
            "revision": plan.revision,
            "source_index": basis.source_index,
            "waited": waited,
            "template_revision": settings.revision if settings is not None else 1,
        }
        if not waited and memory.error is not None:
            subtask["error"] = memory.error
        if basis.task != task:
            subtask["task"] = basis.task
        return subtask

    def _prompt(self, plan: Plan, settings: PromptSettings | None) -> str:
        """What the action policy is told."""
        task, text = plan.basis.task, plan.subtask["text"]
        if not text:
            return task
        return settings.action_prompt(task=task, subtask=text) if settings is not None else self._template.render(task=task, subtask=text)


def _place(origin: Origin | None, task: str, settings: PromptSettings | None, now_s: float) -> tuple[SessionPlan, Basis]:
    """What is remembered of the observation's session, and the observation's place in it; the first of its own without a session."""
    if origin is None:
        return SessionPlan(), Basis(task, settings, source_index=0, order=0, observed_s=now_s)
    return origin.plan, Basis(task, settings, origin.index, origin.order, origin.arrived_s)


def _subtask_of(reply: Reply) -> dict[str, Any] | PlannerError:
    """The planner's answer, or what is wrong with it."""
    subtask = reply.get("subtask")
    if not isinstance(subtask, Mapping) or not isinstance(subtask.get("text"), str):
        return PlannerError("the planner's reply has no subtask.text, expected a string")
    return dict(subtask)
