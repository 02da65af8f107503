"""Routes and their two drivers, and the request modes."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from hosting.cadence import SessionPlan
from hosting.calls import Origin, Slot, SlotCall, Steps
from hosting.combined import CombinedPolicy
from hosting.observer import Observer, PlannerWork
from hosting.policy import ModeError, ObservationError, Reply
from hosting.request_queue import RequestQueue
from hosting.routing import PlannerCalls, action_route, planner_route, report_work, request_mode, run, run_on, run_together_on, without_mode
from hosting.scheduler import SlotWorker
from hosting.templates import LiveSettings, PromptSettings
from tests.serving import EchoPlanner, EchoPolicy


@pytest.fixture
def workers() -> Iterator[dict[Slot, SlotWorker]]:
    slots: tuple[Slot, ...] = ("planner", "action")
    workers = {slot: SlotWorker(slot, RequestQueue(max_batch=8)) for slot in slots}
    yield workers
    for worker in workers.values():
        worker.close()


ORDERS = itertools.count()


def origin() -> Origin:
    """A row of a batched request."""
    return Origin(SessionPlan(), "one connection", next(ORDERS), 0.0, newest_wins=False)


async def together(workers: dict[Slot, SlotWorker], routes: list[Steps]) -> list[Reply]:
    return await run_together_on(workers, [(steps, origin()) for steps in routes])


def fail() -> Reply:
    raise ZeroDivisionError("slot")


def two_slots(threads: list[str]) -> Steps:
    def call(n: int) -> Reply:
        threads.append(threading.current_thread().name)
        return {"n": n}

    first = yield SlotCall("planner", lambda: call(1))
    second = yield SlotCall("action", lambda: call(first["n"] + 1))
    return {"sum": first["n"] + second["n"]}


def recovering() -> Steps:
    try:
        yield SlotCall("planner", fail)
    except ZeroDivisionError as error:
        message = str(error)
    else:
        raise AssertionError("the slot's failure did not reach the route")
    return (yield SlotCall("action", lambda: {"after": message}))


def failing() -> Steps:
    return (yield SlotCall("action", fail))


async def test_both_drivers_hand_each_reply_to_the_next_step(workers: dict[Slot, SlotWorker]) -> None:
    threads: list[str] = []
    assert run(two_slots([])) == await run_on(workers, two_slots(threads), origin()) == {"sum": 3}
    assert threads == ["planner-slot", "action-slot"]


async def test_both_drivers_let_the_route_decide_what_a_failure_means(workers: dict[Slot, SlotWorker]) -> None:
    assert run(recovering()) == await run_on(workers, recovering(), origin()) == {"after": "slot"}
    with pytest.raises(ZeroDivisionError):
        run(failing())
    with pytest.raises(ZeroDivisionError):
        await run_on(workers, failing(), origin())


async def test_a_route_that_refuses_at_once_calls_no_slot(workers: dict[Slot, SlotWorker]) -> None:
    called: list[Any] = []
    route = action_route(EchoPolicy(called.append))
    with pytest.raises(ModeError):
        run(route({"mode": "x"}))
    with pytest.raises(ModeError):
        await run_on(workers, route({"mode": "x"}), origin())
    assert called == []


@pytest.mark.parametrize("obs", [{}, {"mode": None}, {"mode": ""}, {"mode": "default"}])
def test_default_mode(obs: dict[str, Any]) -> None:
    assert request_mode(obs, frozenset({"default"})) == "default"


@pytest.mark.parametrize("mode", ["subtask_only", "action_only"])
def test_other_modes(mode: Any) -> None:
    assert request_mode({"mode": mode}, frozenset({"default", mode})) == mode


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("Default", "mode: got 'Default', expected one of default, subtask_only, action_only"),
        ("x" * 5000, f"mode: got '{'x' * 59}…', expected one of default, subtask_only, action_only"),
        (7, "mode: got int, expected one of default, subtask_only, action_only"),
        (b"default", "mode: got bytes, expected one of default, subtask_only, action_only"),
        (["default"], "mode: got list, expected one of default, subtask_only, action_only"),
        (np.array(["default"]), "mode: got ndarray, expected one of default, subtask_only, action_only"),
        ("subtask_only", "mode: subtask_only is not served on this endpoint, which has no planner"),
        ("action_only", "mode: action_only is not served on this endpoint, which has no action policy"),
    ],
)
def test_wrong_modes(mode: Any, message: str) -> None:
    with pytest.raises(ModeError) as error:
        request_mode({"mode": mode}, frozenset({"default"}))
    assert str(error.value) == message


def test_policies_do_not_see_the_mode_and_the_observation_stays_as_it_was() -> None:
    obs = {"mode": "default", "prompt": "x", b"odd": 1}
    assert without_mode(obs) == {"prompt": "x", b"odd": 1}
    assert obs["mode"] == "default"


def test_action_route_serves_the_policys_own_reply_and_no_planner() -> None:
    seen: list[Any] = []
    route = action_route(EchoPolicy(seen.append))
    assert run(route({"prompt": "x", "mode": "action_only"}))["asked"] == {"prompt": "x"}
    assert seen == [{"prompt": "x"}]
    with pytest.raises(ModeError, match="has no planner"):
        run(route({"mode": "subtask_only"}))


def test_planner_route_takes_the_settings_in_force_when_the_request_comes() -> None:
    live = LiveSettings(PromptSettings(max_generation_tokens=3))
    route = planner_route(EchoPlanner(), live)
    steps = route({"prompt": "x", "mode": "subtask_only"})
    call = next(steps)  # the request has come; a change is for the next one
    live.update(generation_prompt_format="New {task}", max_generation_tokens=9)
    subtask = call.call()["subtask"]
    assert (subtask["text"], subtask["format"], subtask["limit"]) == ("first step of x", "Task: {task}. Subtask: ", 3)
    subtask = run(route({"prompt": "x"}))["subtask"]
    assert (subtask["format"], subtask["limit"]) == ("New {task}", 9)
    with pytest.raises(ModeError, match="has no action policy"):
        run(route({"mode": "action_only"}))


def test_the_planner_endpoint_reports_what_decoding_took_where_the_planner_tells() -> None:
    class Steps(Observer):
        seen: list[PlannerWork] = []  # noqa: RUF012 - of this test

        def planned(self, work: PlannerWork) -> None:
            self.seen.append(work)

    planner, observer = EchoPlanner(), Steps()
    route = planner_route(planner, LiveSettings(PromptSettings()), observer)
    run(route({"prompt": "x"}))
    planner.infer = lambda obs, **settings: {"subtask": {"text": "y", "decode_steps": 4}}  # type: ignore[method-assign]
    run(planner_route(planner, LiveSettings(PromptSettings()), observer)({"prompt": "x"}))
    assert observer.seen == [PlannerWork(decode_steps=4)]


def test_each_row_of_a_batch_comes_with_what_was_said_before() -> None:
    class Remembering(EchoPlanner):
        def infer(self, obs: Any, /, *, previous: str | None = None, **settings: Any) -> Reply:
            return {"subtask": {"text": f"{obs['prompt']} after {previous}"}}

        def infer_batch(self, observations: Any, /, *, previous: Any = None, **settings: Any) -> list[Reply]:
            return [self.infer(obs, previous=before, **settings) for obs, before in zip(observations, previous, strict=True)]

    call = PlannerCalls(Remembering())
    one, two = call({"prompt": "x"}, previous="a"), call({"prompt": "y"})
    assert one.together is not None and two.together is not None and one.together.key == two.together.key
    together = one.together.serve([one.together.row, two.together.row])
    assert together == [one.call(), two.call()] == [{"subtask": {"text": "x after a"}}, {"subtask": {"text": "y after None"}}]


def test_a_list_to_choose_from_makes_another_question() -> None:
    call = PlannerCalls(EchoPlanner())
    image = np.zeros((4, 4, 3), np.uint8)
    questions = [call({"prompt": "x", "images": {"cam_high": image}, **more}).question for more in ({}, {"subtasks": ["a"]}, {"subtasks": ["b"]})]
    assert len({question.key for question in questions if question is not None}) == 3
    same = [call({"prompt": "x", "images": {"cam_high": image}, "subtasks": listed}).question for listed in (["a"], ("a",), np.array(["a"]))]
    assert len({question.key for question in same if question is not None}) == 1
    assert call({"prompt": "x", "images": {"cam_high": image}, "subtasks": "a"}).question is None, "the planner says what is wrong with it"


def test_what_a_planner_tells_wrongly_of_its_work_is_not_counted() -> None:
    class Work(Observer):
        seen: list[PlannerWork] = []  # noqa: RUF012 - of this test

        def planned(self, work: PlannerWork) -> None:
            self.seen.append(work)

    observer = Work()
    report_work(observer, {"text": "x", "decode_steps": None, "accepted_tokens": 2})
    report_work(observer, {"text": "x", "decode_steps": None})
    assert observer.seen == [PlannerWork(accepted_tokens=2)]


class BatchedPolicy(EchoPolicy):
    """Serves rows together; notes what came."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def infer(self, obs: Any, /, *, seed: int | None = None) -> Reply:
        self.calls.append((obs["prompt"], seed))
        if obs["prompt"] == "bad":
            raise ObservationError("prompt: is bad")
        return {"prompt": obs["prompt"], "seed": seed}

    def infer_batch(self, observations: Any, /, *, seeds: Any = None) -> list[Reply]:
        self.calls.append(([obs["prompt"] for obs in observations], seeds))
        if any(obs["prompt"] == "bad" for obs in observations):
            raise ObservationError("one of them is bad")
        return [{"prompt": obs["prompt"], "seed": seed} for obs, seed in zip(observations, seeds or [None] * len(observations), strict=True)]


class BatchedPlanner(EchoPlanner):
    def __init__(self, hook: Callable[[Any], None] = lambda obs: None) -> None:
        super().__init__(hook)
        self.calls: list[list[str]] = []

    def infer_batch(self, observations: Any, /, *, generation_prompt_format: Any = None, max_generation_tokens: Any = None) -> list[Reply]:
        self.calls.append([obs["prompt"] for obs in observations])
        return [self.infer(obs) for obs in observations]


class TestTogether:
    async def test_one_call_serves_all_rows(self, workers: dict[Slot, SlotWorker]) -> None:
        policy = BatchedPolicy()
        route = action_route(policy)
        replies = await together(workers, [route({"prompt": "a"}), route({"prompt": "b"}, seed=3)])
        assert replies == [{"prompt": "a", "seed": None}, {"prompt": "b", "seed": 3}]
        assert policy.calls == [(["a", "b"], [None, 3])]
        assert await together(workers, [route({"prompt": "a"}), route({"prompt": "b"})]) == [{"prompt": p, "seed": None} for p in "ab"]
        assert policy.calls[-1] == (["a", "b"], None)

    async def test_a_single_row_is_served_alone(self, workers: dict[Slot, SlotWorker]) -> None:
        policy = BatchedPolicy()
        assert await together(workers, [action_route(policy)({"prompt": "a"}, seed=1)]) == [{"prompt": "a", "seed": 1}]
        assert policy.calls == [("a", 1)]

    async def test_planner_and_policy_each_serve_all_rows(self, workers: dict[Slot, SlotWorker]) -> None:
        planner, policy = BatchedPlanner(), BatchedPolicy()
        combined = CombinedPolicy(planner, policy, action_prompt_template="{subtask}")
        replies = await together(workers, [combined.steps({"prompt": task}) for task in ("tidy", "sweep")])
        assert planner.calls == [["tidy", "sweep"]] and policy.calls == [(["first step of tidy", "first step of sweep"], None)]
        assert [reply["subtask"]["text"] for reply in replies] == ["first step of tidy", "first step of sweep"]

    async def test_modes_may_differ_between_rows(self, workers: dict[Slot, SlotWorker]) -> None:
        planner, policy = BatchedPlanner(), BatchedPolicy()
        combined = CombinedPolicy(planner, policy, action_prompt_template="{subtask}")
        rows = [{"prompt": "tidy", "mode": mode} for mode in ("default", "action_only", "subtask_only")]
        replies = await together(workers, [combined.steps(row) for row in rows])
        assert [sorted(reply) for reply in replies] == [["prompt", "seed", "subtask"], ["prompt", "seed"], ["subtask"]]
        assert planner.calls == [["tidy", "tidy"]]

    async def test_when_the_planner_fails_every_row_decides_for_itself(self, workers: dict[Slot, SlotWorker]) -> None:
        def fail_on_a(obs: Any) -> None:
            if obs["prompt"] == "a":
                raise ZeroDivisionError

        policy = BatchedPolicy()
        combined = CombinedPolicy(BatchedPlanner(fail_on_a), policy, action_prompt_template="{subtask}")
        a, b = await together(workers, [combined.steps({"prompt": task}) for task in ("a", "b")])
        assert a["subtask"]["error"].startswith("internal error") and b["subtask"]["text"] == "first step of b"
        assert policy.calls == [(["a", "first step of b"], None)]

    async def test_a_bad_row_is_named(self, workers: dict[Slot, SlotWorker]) -> None:
        route = action_route(BatchedPolicy())
        with pytest.raises(ObservationError, match=r"^batch\[2\]: prompt: is bad$"):
            await together(workers, [route({"prompt": prompt}) for prompt in ("a", "b", "bad")])
        with pytest.raises(ModeError, match=r"^batch\[1\]: mode: got 'x'"):
            await together(workers, [route({"prompt": "a"}), route({"prompt": "a", "mode": "x"})])

    async def test_a_failure_holds_no_memory_and_needs_no_garbage_collector(self, workers: dict[Slot, SlotWorker]) -> None:
        class Image(np.ndarray[Any, Any]):
            """An array that can be watched."""

        images = [np.zeros(3).view(Image) for _ in range(3)]
        held = [weakref.ref(image) for image in images]
        route = action_route(BatchedPolicy())
        rows = [route({"prompt": prompt, "image": image}) for prompt, image in zip(("a", "bad", "b"), images, strict=True)]
        gc.collect()
        gc.disable()
        try:
            images.clear()
            with pytest.raises(ObservationError):
                await together(workers, rows)
            rows.clear()
            await workers["action"].run(lambda: None)
            await asyncio.sleep(0)
            assert [image() for image in held] == [None, None, None]
        finally:
            gc.enable()

    async def test_policies_without_batches_are_asked_row_by_row(self, workers: dict[Slot, SlotWorker]) -> None:
        route = action_route(EchoPolicy())
        replies = await together(workers, [route({"prompt": prompt}) for prompt in "ab"])
        assert [reply["asked"]["prompt"] for reply in replies] == ["a", "b"]


def test_a_seed_for_a_policy_that_takes_none_is_refused() -> None:
    with pytest.raises(ObservationError, match=r"^seed: the policy that is loaded takes none; leave it out$"):
        run(action_route(EchoPolicy())({"prompt": "x"}, seed=1))
    assert run(action_route(BatchedPolicy())({"prompt": "x"}, seed=1))["seed"] == 1


def test_the_planner_endpoint_flags_what_is_done() -> None:
    class Done(Observer):
        count = 0

        def subtask_done(self) -> None:
            self.count += 1

    live, observer = LiveSettings(PromptSettings()), Done()
    route = planner_route(EchoPlanner(), live, observer, done_subtasks=["First step of x."])
    assert run(route({"prompt": "x"}))["subtask"]["done"] is True
    assert run(route({"prompt": "y"}))["subtask"]["done"] is False and observer.count == 1
    assert "done" not in run(planner_route(EchoPlanner(), live)({"prompt": "x"}))["subtask"]
