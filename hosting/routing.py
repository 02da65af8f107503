"""Which slots one request visits, written once for the event loop and for in-process use.

A route is a generator: it yields the calls it needs, one slot at a time, and returns the reply. :func:`run` drives it by calling
straight through; :func:`run_on` drives it through the slots' workers. Neither knows what the route decides.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hosting.policy import ModeError, Observation, PlannerPolicy, Policy, Reply
from hosting.scheduler import SlotWorker
from hosting.templates import LiveSettings

_LONGEST_SHOWN = 60

Slot = Literal["planner", "action"]
RequestMode = Literal["default", "subtask_only", "action_only"]


@dataclass(frozen=True)
class SlotCall:
    """A call that a route wants made on ``slot``'s thread."""

    slot: Slot
    call: Callable[[], Reply]


Steps = Generator[SlotCall, Reply, Reply]
Route = Callable[[Observation], Steps]


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


async def run_on(workers: Mapping[Slot, SlotWorker], steps: Steps) -> Reply:
    """Drive a route, each call on its slot's worker."""
    try:
        step = next(steps)
        while True:
            try:
                reply = await workers[step.slot].run(step.call)
            except Exception as error:  # noqa: BLE001 - the route decides what a slot's failure means
                step = steps.throw(error)
            else:
                step = steps.send(reply)
    except StopIteration as stop:
        result: Reply = stop.value
        return result


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


def action_route(policy: Policy) -> Route:
    """The action endpoint of a service without a planner."""
    served: frozenset[RequestMode] = frozenset({"default", "action_only"})

    def steps(obs: Observation) -> Steps:
        request_mode(obs, served)
        return (yield SlotCall("action", lambda: policy.infer(without_mode(obs))))

    return steps


def planner_route(planner: PlannerPolicy, live: LiveSettings) -> Route:
    """The planner endpoint: always just the subtask."""
    served: frozenset[RequestMode] = frozenset({"default", "subtask_only"})

    def steps(obs: Observation) -> Steps:
        request_mode(obs, served)
        settings = live.current
        return (
            yield SlotCall(
                "planner",
                lambda: planner.infer(
                    without_mode(obs),
                    generation_prompt_format=settings.generation_prompt_format,
                    max_generation_tokens=settings.max_generation_tokens,
                ),
            )
        )

    return steps
