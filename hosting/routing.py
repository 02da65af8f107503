"""Which slots one request visits, written once for the event loop and for in-process use.

A route is a generator: it yields the calls it needs, one slot at a time, and returns the reply. :func:`run` drives it by calling
straight through; :func:`run_on` drives it through the slots' workers; :func:`run_together_on` drives the rows of a batched request side by
side. None of them knows what the route decides.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal, Protocol, TypeVar, get_args

import numpy as np

from hosting.calls import Background, Origin, Question, Slot, SlotCall, Steps, Together
from hosting.done_subtasks import DoneSubtasks
from hosting.observer import Observer, PlannerWork
from hosting.policy import BatchPlannerPolicy, BatchPolicy, ModeError, Observation, ObservationError, PlannerPolicy, Policy, Reply, RequestError
from hosting.scheduler import SlotWorker
from hosting.templates import LiveSettings
from pi0.cameras import camera_images

_LONGEST_SHOWN = 60

E = TypeVar("E", bound=BaseException)

RequestMode = Literal["default", "subtask_only", "action_only"]


class Route(Protocol):
    """What serves one observation. ``seed`` is of the action noise; without ``origin`` nothing is remembered from one observation to the next."""

    def __call__(self, obs: Observation, /, *, seed: int | None = None, origin: Origin | None = None) -> Steps: ...


def run(steps: Steps) -> Reply:
    """Drive a route on this thread."""
    try:
        step = next(steps)
        while True:
            if isinstance(step, Background):
                step = steps.send(_beside(step))
                continue
            try:
                reply = step.call()
            except Exception as error:  # noqa: BLE001 - the route decides what a slot's failure means
                step = steps.throw(error)
            else:
                step = steps.send(reply)
    except StopIteration as stop:
        result: Reply = stop.value
        return result


def _beside(background: Background) -> Reply:
    """On one thread, beside means before."""
    background.begun()
    try:
        outcome: Reply | BaseException = background.call.call()
    except Exception as error:  # noqa: BLE001 - as above
        outcome = error
    background.done(outcome)
    return {}


async def run_on(workers: Mapping[Slot, SlotWorker], steps: Steps, origin: Origin) -> Reply:
    """Drive a route, each call on its slot's worker, in the turn of ``origin``."""
    try:
        step = next(steps)
        while True:
            if isinstance(step, Background):
                workers[step.call.slot].serve_beside(step, origin)
                step = steps.send({})
                continue
            try:
                reply = await workers[step.slot].serve(step, origin)
            except Exception as error:  # noqa: BLE001 - the route decides what a slot's failure means
                step = steps.throw(error)
            else:
                step = steps.send(reply)
    except StopIteration as stop:
        result: Reply = stop.value
        return result


async def run_together_on(workers: Mapping[Slot, SlotWorker], routes: Sequence[tuple[Steps, Origin]]) -> list[Reply]:
    """Drive the rows of one request side by side. When one fails, the others are given up.

    Raises:
        RequestError: a row failed with one; the message says which where there are several.
        Exception: whatever else a row raises.
    """
    rows = [asyncio.ensure_future(run_on(workers, steps, origin)) for steps, origin in routes]
    try:
        await asyncio.wait(rows, return_when=asyncio.FIRST_EXCEPTION)
        for index, error in enumerate([row.exception() if row.done() else None for row in rows]):
            if error is not None:
                raise of_row(error, index, len(rows))
        return [row.result() for row in rows]
    finally:
        await _give_up(rows)
        # An error's frames hold the observations; in a circle with it they would keep them until the garbage collector comes by.
        rows, error = [], None


async def _give_up(rows: Sequence[asyncio.Task[Reply]]) -> None:
    for row in rows:
        row.cancel()
    await asyncio.gather(*rows, return_exceptions=True)


def of_row(error: E, row: int, count: int) -> E:
    """``error`` of the observation ``row`` of ``count``; a client's own says which where there are several."""
    if count == 1 or not isinstance(error, RequestError):
        return error
    return type(error)(f"batch[{row}]: {error}")


def request_mode(obs: Observation, loaded: frozenset[RequestMode]) -> RequestMode:
    """The request's ``mode``; absent or empty means ``default``.

    Raises:
        ModeError: it is not a request mode, or none that the ``loaded`` slots can serve.
    """
    mode = obs.get("mode")
    if mode is None or (isinstance(mode, str) and mode == ""):
        return "default"
    if not isinstance(mode, str) or mode not in ("default", "subtask_only", "action_only"):
        came = repr(mode if len(mode) <= _LONGEST_SHOWN else mode[: _LONGEST_SHOWN - 1] + "…") if isinstance(mode, str) else type(mode).__name__
        raise ModeError(f"mode: got {came}, expected one of {', '.join(get_args(RequestMode))}")
    if mode not in loaded:
        missing = "planner" if mode == "subtask_only" else "action policy"
        raise ModeError(f"mode: {mode} is not served on this endpoint, which has no {missing}")
    return mode


def without_mode(obs: Observation) -> dict[str, Any]:
    """``obs`` as the policies see it."""
    return {key: value for key, value in obs.items() if key != "mode"}


_WORK: Final = tuple(field.name for field in dataclasses.fields(PlannerWork))


class ActionCalls:
    """How the action policy is called; what it can do is found out once.

    Args:
        policy: the action slot's policy.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._batches = policy if isinstance(policy, BatchPolicy) else None
        parameters = inspect.signature(policy.infer).parameters.values()
        self._takes_seed = any(parameter.name == "seed" or parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)

    def __call__(self, obs: Observation, *, seed: int | None = None, **sampling: Any) -> SlotCall:
        """The policy on one observation, as the policy sees it; ``sampling`` goes to it as well.

        Raises:
            ObservationError: a seed for a policy that takes none.
        """
        if seed is not None:
            if not self._takes_seed:
                raise ObservationError("seed: the policy that is loaded takes none; leave it out")
            seeded: dict[str, Any] = {**sampling, "seed": seed}
            return SlotCall("action", partial(self._policy.infer, obs, **seeded), self._together(obs, seed, sampling))
        return SlotCall("action", partial(self._policy.infer, obs, **sampling), self._together(obs, None, sampling))

    def _together(self, obs: Observation, seed: int | None, sampling: Mapping[str, Any]) -> Together | None:
        if self._batches is None or sampling:
            return None
        return Together(id(self._policy), (obs, seed), self._serve)

    def _serve(self, rows: Sequence[tuple[Observation, int | None]]) -> list[Reply]:
        assert self._batches is not None
        seeds = [seed for _, seed in rows]
        return self._batches.infer_batch([obs for obs, _ in rows], seeds=seeds if any(seed is not None for seed in seeds) else None)


class PlannerCalls:
    """How the planner is called; as :class:`ActionCalls`."""

    def __init__(self, planner: PlannerPolicy) -> None:
        self._planner = planner
        self._batches = planner if isinstance(planner, BatchPlannerPolicy) else None
        self._takes_previous = "previous" in inspect.signature(planner.infer).parameters

    def __call__(self, obs: Observation, *, previous: str | None = None, timeout_s: float | None = None, **overrides: Any) -> SlotCall:
        """The planner on one observation; ``overrides`` are its prompt settings.

        Args:
            previous: what it said last to the same robot, for a planner that takes it (:class:`~hosting.policy.PlannerPolicy`).
        """
        key = (id(self._planner), *sorted(overrides.items()))
        together = Together(key, (obs, previous), partial(self._serve, overrides)) if self._batches is not None else None
        told = {**overrides, "previous": previous} if self._takes_previous else overrides
        return SlotCall("planner", partial(self._planner.infer, obs, **told), together, _question(key, obs), timeout_s)

    def _serve(self, overrides: Mapping[str, Any], rows: Sequence[tuple[Observation, str | None]]) -> list[Reply]:
        assert self._batches is not None
        told = {**overrides, "previous": [previous for _, previous in rows]} if self._takes_previous else overrides
        return self._batches.infer_batch([obs for obs, _ in rows], **told)


def _question(key: Hashable, obs: Observation) -> Question | None:
    """What a planner is asked: the prompt, the images and a list to choose from are all that its answer depends on."""
    prompt, subtasks = obs.get("prompt"), obs.get("subtasks")
    try:
        images = camera_images(obs)
    except RequestError:
        return None  # the planner says what is wrong with it
    if not isinstance(prompt, str) or not images or not all(isinstance(image, np.ndarray) for image in images.values()):
        return None
    if subtasks is not None:
        listed = subtasks.tolist() if isinstance(subtasks, np.ndarray) else subtasks
        if not isinstance(listed, list | tuple) or not all(isinstance(text, str) for text in listed):
            return None  # the planner says what is wrong with it, too
        subtasks = tuple(listed)
    return Question((key, prompt, subtasks), images)


def action_route(policy: Policy) -> Route:
    """The action endpoint of a service without a planner."""
    served: frozenset[RequestMode] = frozenset({"default", "action_only"})
    call = ActionCalls(policy)

    def steps(obs: Observation, /, *, seed: int | None = None, origin: Origin | None = None) -> Steps:
        request_mode(obs, served)
        return (yield call(without_mode(obs), seed=seed))

    return steps


def report_work(observer: Observer, subtask: Any) -> None:
    """What one answer of a planner took, where it tells."""
    if isinstance(subtask, Mapping) and (told := {name: subtask[name] for name in _WORK if isinstance(subtask.get(name), int)}):
        observer.planned(PlannerWork(**told))


def planner_route(planner: PlannerPolicy, live: LiveSettings, observer: Observer | None = None, *, done_subtasks: Sequence[str] = ()) -> Route:
    """The planner endpoint: always just the subtask. Decoding is greedy, so a seed changes nothing.

    Args:
        done_subtasks: with any, every subtask says in ``done`` whether it is one of them.
    """
    observer = observer or Observer()
    ends = DoneSubtasks(done_subtasks)
    served: frozenset[RequestMode] = frozenset({"default", "subtask_only"})
    call = PlannerCalls(planner)

    def steps(obs: Observation, /, *, seed: int | None = None, origin: Origin | None = None) -> Steps:
        request_mode(obs, served)
        settings = live.current
        reply = yield call(
            without_mode(obs),
            generation_prompt_format=settings.generation_prompt_format,
            max_generation_tokens=settings.max_generation_tokens,
        )
        subtask = reply.get("subtask")
        report_work(observer, subtask)
        if ends.says(subtask):
            observer.subtask_done()
        return {**reply, "subtask": {**subtask, **ends.flag(subtask)}} if ends and isinstance(subtask, Mapping) else reply

    return steps
