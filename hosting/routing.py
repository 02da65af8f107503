"""Which slots one request visits, written once for the event loop and for in-process use.

A route is a generator: it yields the calls it needs, one slot at a time, and returns the reply. :func:`run` drives it by calling
straight through; :func:`run_on` drives it through the slots' workers; :func:`run_together_on` drives several side by side and serves
in one model call what can be. None of them knows what the route decides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, get_args

from hosting.policy import BatchPlannerPolicy, BatchPolicy, ModeError, Observation, ObservationError, PlannerPolicy, Policy, Reply, RequestError
from hosting.scheduler import SlotWorker
from hosting.templates import LiveSettings

_LONGEST_SHOWN = 60

Slot = Literal["planner", "action"]
RequestMode = Literal["default", "subtask_only", "action_only"]


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
class SlotCall:
    """A call that a route wants made on ``slot``'s thread: by itself, or ``together`` with others like it."""

    slot: Slot
    call: Callable[[], Reply]
    together: Together | None = None


Steps = Generator[SlotCall, Reply, Reply]


class Route(Protocol):
    """What serves one observation. ``seed`` is of the action noise."""

    def __call__(self, obs: Observation, /, *, seed: int | None = None) -> Steps: ...


def run(steps: Steps) -> Reply:
    """Drive a route on this thread."""
    try:
        step = next(steps)
        while True:
            try:
                reply = step.call()
            except Exception as error:  # noqa: BLE001 - the route decides what a slot's failure means
                step = steps.throw(error)
            else:
                step = steps.send(reply)
    except StopIteration as stop:
        result: Reply = stop.value
        return result


async def run_on(workers: Mapping[Slot, SlotWorker], steps: Steps, *, deadline_s: float | None = None) -> Reply:
    """Drive a route, each call on its slot's worker; none is begun after ``deadline_s`` (:func:`time.perf_counter`)."""
    try:
        step = next(steps)
        while True:
            try:
                reply = await workers[step.slot].run(step.call, deadline_s=deadline_s)
            except Exception as error:  # noqa: BLE001 - the route decides what a slot's failure means
                step = steps.throw(error)
            else:
                step = steps.send(reply)
    except StopIteration as stop:
        result: Reply = stop.value
        return result


async def run_together_on(workers: Mapping[Slot, SlotWorker], routes: Sequence[Steps], *, deadline_s: float | None = None) -> list[Reply]:
    """Drive several routes side by side: one turn of a slot's worker for all that ask for it next.

    Raises:
        RequestError: a route failed with one; the message says which where there are several.
        Exception: whatever else a route raises.
    """
    replies: dict[int, Reply] = {}
    waiting: dict[int, SlotCall] = {}

    def advance(row: int, go: Callable[[], SlotCall]) -> None:
        try:
            waiting[row] = go()
        except StopIteration as stop:
            replies[row] = stop.value
        except RequestError as error:
            raise of_row(error, row, len(routes)) from error

    for row, steps in enumerate(routes):
        advance(row, partial(next, steps))
    while waiting:
        slot = next(iter(waiting.values())).slot
        rows = [row for row, call in waiting.items() if call.slot == slot]
        outcomes = await workers[slot].run(partial(_serve, [waiting.pop(row) for row in rows]), deadline_s=deadline_s)
        for row, outcome in zip(rows, outcomes, strict=True):
            steps = routes[row]
            advance(row, partial(steps.throw, outcome) if isinstance(outcome, Exception) else partial(steps.send, outcome))
    return [replies[row] for row in range(len(routes))]


def _serve(calls: Sequence[SlotCall]) -> list[Reply | Exception]:
    """The calls' outcomes, those that can be served together in one model call."""
    outcomes: list[Reply | Exception] = [{}] * len(calls)
    groups: dict[Hashable, list[int]] = {}
    for index, call in enumerate(calls):
        groups.setdefault(index if call.together is None else (call.together.key,), []).append(index)
    for indices in groups.values():
        together = calls[indices[0]].together
        if together is not None and len(indices) > 1:
            try:
                replies = together.serve([call.together.row for index in indices if (call := calls[index]).together])
            except RequestError:
                # Whose fault it was is found by asking one by one; what was right is computed again only when something was wrong.
                pass
            except Exception as error:  # noqa: BLE001 - each route decides what its slot's failure means
                for index in indices:
                    outcomes[index] = error
                continue
            else:
                for index, reply in zip(indices, replies, strict=True):
                    outcomes[index] = reply
                continue
        for index in indices:
            try:
                outcomes[index] = calls[index].call()
            except Exception as error:  # noqa: BLE001 - as above
                outcomes[index] = error
    return outcomes


def of_row(error: RequestError, row: int, count: int) -> RequestError:
    """``error`` of the observation ``row`` of ``count``, saying which where there are several."""
    return error if count == 1 else type(error)(f"batch[{row}]: {error}")


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

    def __call__(self, obs: Observation, **overrides: Any) -> SlotCall:
        """The planner on one observation; ``overrides`` are its prompt settings."""
        call = partial(self._planner.infer, obs, **overrides)
        if self._batches is None:
            return SlotCall("planner", call)
        key = (id(self._planner), *sorted(overrides.items()))
        return SlotCall("planner", call, Together(key, obs, partial(self._batches.infer_batch, **overrides)))


def action_route(policy: Policy) -> Route:
    """The action endpoint of a service without a planner."""
    served: frozenset[RequestMode] = frozenset({"default", "action_only"})
    call = ActionCalls(policy)

    def steps(obs: Observation, /, *, seed: int | None = None) -> Steps:
        request_mode(obs, served)
        return (yield call(without_mode(obs), seed=seed))

    return steps


def planner_route(planner: PlannerPolicy, live: LiveSettings) -> Route:
    """The planner endpoint: always just the subtask. Decoding is greedy, so a seed changes nothing."""
    served: frozenset[RequestMode] = frozenset({"default", "subtask_only"})
    call = PlannerCalls(planner)

    def steps(obs: Observation, /, *, seed: int | None = None) -> Steps:
        request_mode(obs, served)
        settings = live.current
        return (
            yield call(
                without_mode(obs),
                generation_prompt_format=settings.generation_prompt_format,
                max_generation_tokens=settings.max_generation_tokens,
            )
        )

    return steps
