"""The slot's worker: one thread, whose turn it is, batches, what happens to those who leave, and models that do not come back.

Which call is next is tests/hosting/test_request_queue.py's business.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from hosting.cadence import SessionPlan
from hosting.calls import Background, Origin, Question, Served, Slot, SlotCall, Together
from hosting.observer import Observer
from hosting.policy import DeadlineError, DrainingError, OverloadedError, PlannerError, PolicyError, SupersededError
from hosting.request_queue import RequestQueue
from hosting.scheduler import SlotWorker, Watch

ORDERS = itertools.count()


def origin(flow: Any = None, **fields: Any) -> Origin:
    """Of a robot of its own, or of the one that ``flow`` names."""
    order = next(ORDERS)
    return Origin(SessionPlan(), order if flow is None else flow, order, 0.0, **fields)


def alone(call: Callable[[], Any]) -> SlotCall:
    return SlotCall("action", call)


class Gate:
    """A call that waits to be let go; ``entered`` says that it runs."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()

    def __call__(self) -> dict[str, Any]:
        self.entered.set()
        assert self.released.wait(30)
        return {"thread": threading.current_thread().name}


class Model:
    """Serves rows together; remembers its calls, and fails on those that contain a row named in ``poison``."""

    def __init__(self, *poison: Any) -> None:
        self.batches: list[list[Any]] = []
        self.poison = poison

    def serve(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        self.batches.append(list(rows))
        for row in rows:
            if row in self.poison:
                raise ZeroDivisionError(f"of {row}")
        return [{"row": row} for row in rows]

    def call(self, row: Any, *, slot: Slot = "action", question: Question | None = None) -> SlotCall:
        return SlotCall(slot, lambda: self.serve([row])[0], Together("model", row, self.serve), question)


class Counts(Observer):
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def served(self, served: Served) -> None:
        self.seen.append(("served", served.slot, served.batch))

    def batch(self, slot: Slot, rows: int) -> None:
        self.seen.append(("batch", slot, rows))

    def superseded(self, slot: Slot) -> None:
        self.seen.append(("superseded", slot))

    def expired(self, slot: Slot) -> None:
        self.seen.append(("expired", slot))

    def overloaded(self, slot: Slot) -> None:
        self.seen.append(("overloaded", slot))

    def shared(self) -> None:
        self.seen.append(("shared",))


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.released.set()


async def occupy(worker: SlotWorker, gate: Gate) -> asyncio.Task[Any]:
    """A task whose call runs on the worker's thread now."""
    task = asyncio.create_task(worker.serve(alone(gate), origin()))
    assert await asyncio.to_thread(gate.entered.wait, 30)
    return task


async def waiting(*coroutines: Any) -> list[asyncio.Task[Any]]:
    """Tasks that have got as far as they can."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    await asyncio.sleep(0)
    return tasks


class TestThread:
    async def test_calls_run_on_one_thread_of_the_slot_in_the_order_they_came(self, gate: Gate) -> None:
        worker, order, names = SlotWorker("action"), [], set()

        def call(i: int) -> dict[str, Any]:
            order.append(i)
            names.add(threading.current_thread().name)
            return {"square": i * i}

        first = await occupy(worker, gate)
        tasks = await waiting(*(worker.serve(alone(lambda i=i: call(i)), origin()) for i in range(20)))
        assert order == [] and worker.depth == 20 and worker.running == 1
        gate.released.set()
        assert await asyncio.gather(*tasks) == [{"square": i * i} for i in range(20)]
        assert order == list(range(20)) and names == {(await first)["thread"]} == {"action-slot"}
        worker.close()

    async def test_the_event_loop_goes_on_while_a_call_runs(self, gate: Gate) -> None:
        worker = SlotWorker("action")
        task = await occupy(worker, gate)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not task.done() and worker.running_s > 0
        gate.released.set()
        await task
        assert worker.running == 0 and worker.running_s == 0
        worker.close()

    async def test_what_a_call_raises_is_raised_to_its_caller_only(self) -> None:
        worker = SlotWorker("action")
        with pytest.raises(ZeroDivisionError):
            await worker.serve(alone(lambda: {"x": 1 // 0}), origin())
        # A future cannot hold a StopIteration; its caller would wait for ever.
        with pytest.raises(RuntimeError, match="StopIteration"):
            await asyncio.wait_for(worker.serve(alone(lambda: next(iter(()))), origin()), 30)
        assert await worker.serve(alone(lambda: {"n": 7}), origin()) == {"n": 7}
        worker.close()

    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()], ids=repr)
    async def test_what_would_end_the_event_loop_or_look_like_a_departure_is_an_ordinary_failure(self, error: BaseException) -> None:
        worker = SlotWorker("action")

        def fail() -> Any:
            raise error

        with pytest.raises(RuntimeError, match=rf"^{type(error).__name__} was raised where it means nothing$") as caught:
            await worker.serve(alone(fail), origin())
        assert caught.value.__cause__ is error
        assert await worker.serve(alone(lambda: {"n": 7}), origin()) == {"n": 7}
        worker.close()

    async def test_a_job_comes_before_calls_that_wait_and_is_not_watched(self, gate: Gate) -> None:
        worker, order = SlotWorker("action", watch=Watch(stuck_after_s=0.0)), []
        job = asyncio.create_task(worker.run(gate))
        assert await asyncio.to_thread(gate.entered.wait, 30)
        tasks = await waiting(
            worker.serve(alone(lambda: {"n": order.append("call")}), origin()),  # type: ignore[func-returns-value]
            worker.run(lambda: order.append("job")),
        )
        for _ in range(10):
            await asyncio.sleep(0)
        assert not worker.stuck
        gate.released.set()
        await asyncio.gather(job, *tasks)
        assert order == ["job", "call"]
        with pytest.raises(ZeroDivisionError):
            await worker.run(lambda: 1 // 0)
        worker.close()


class TestWaiting:
    async def test_a_full_queue_refuses_at_once_and_takes_again_when_there_is_room(self, gate: Gate) -> None:
        counts = Counts()
        worker = SlotWorker("planner", RequestQueue(max_queue=1), observer=counts)
        running = await occupy(worker, gate)
        (queued,) = await waiting(worker.serve(alone(lambda: {"n": 1}), origin()))
        with pytest.raises(OverloadedError, match=r"^the planner is overloaded: 1 requests are waiting already; try again later$"):
            await worker.serve(alone(lambda: {"n": 2}), origin())
        assert ("overloaded", "planner") in counts.seen
        gate.released.set()
        await running
        assert [await queued, await worker.serve(alone(lambda: {"n": 3}), origin())] == [{"n": 1}, {"n": 3}]
        worker.close()

    async def test_a_newer_observation_takes_the_place_of_the_older_one_which_is_never_computed(self, gate: Gate) -> None:
        counts, model = Counts(), Model()
        worker = SlotWorker("action", observer=counts)
        running = await occupy(worker, gate)
        old, other, new = await waiting(
            worker.serve(model.call("old"), origin("robot")),
            worker.serve(model.call("other"), origin()),
            worker.serve(model.call("new"), origin("robot")),
        )
        with pytest.raises(SupersededError, match=r"^superseded: a newer observation of the same session came before the action's turn; nothing was"):
            await old
        gate.released.set()
        await asyncio.gather(running, other, new)
        assert model.batches == [["new"], ["other"]] and ("superseded", "action") in counts.seen
        worker.close()

    async def test_a_deadline_that_passes_is_answered_while_the_slot_is_busy(self, gate: Gate) -> None:
        counts, model, now = Counts(), Model(), [100.0]
        worker = SlotWorker("action", observer=counts, clock=lambda: now[0])
        running = await occupy(worker, gate)
        (late,) = await waiting(worker.serve(model.call("late"), origin(deadline_s=100.001)))
        now[0] = 100.5
        with pytest.raises(DeadlineError, match=r"^deadline_ms: passed 499 ms before the action's turn came; nothing was computed$"):
            await asyncio.wait_for(late, 30)
        assert not running.done() and ("expired", "action") in counts.seen
        gate.released.set()
        await running
        assert model.batches == []
        worker.close()

    async def test_a_caller_that_gives_up_takes_its_call_out_of_the_queue(self, gate: Gate) -> None:
        worker, model = SlotWorker("action", RequestQueue(max_queue=1)), Model()
        running = await occupy(worker, gate)
        (queued,) = await waiting(worker.serve(model.call("queued"), origin()))
        queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued
        after = asyncio.create_task(worker.serve(model.call("after"), origin()))
        gate.released.set()
        await asyncio.gather(running, after)
        assert model.batches == [["after"]]
        worker.close()

    async def test_a_call_that_was_given_up_holds_no_memory_while_the_slot_is_busy(self, gate: Gate) -> None:
        worker = SlotWorker("action")
        running = await occupy(worker, gate)
        observation = Gate()
        held = weakref.ref(observation)
        (queued,) = await waiting(worker.serve(alone(observation), origin()))
        queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued
        del observation, queued
        await asyncio.sleep(0)  # the loop lets go of the task that has just ended
        gc.collect()
        assert held() is None
        gate.released.set()
        await running
        worker.close()

    async def test_what_was_served_holds_no_memory(self) -> None:
        worker = SlotWorker("action")
        observation = Gate()
        observation.released.set()
        held = weakref.ref(observation)
        await worker.serve(alone(observation), origin())
        del observation
        await worker.run(gc.collect)
        assert held() is None
        worker.close()

    @pytest.mark.parametrize("end", ["raised", "superseded", "late"])
    async def test_what_failed_holds_no_memory_and_needs_no_garbage_collector(self, gate: Gate, end: str) -> None:
        def refuse(observation: Any) -> Any:
            raise ZeroDivisionError

        now = [0.0]
        worker = SlotWorker("action", RequestQueue(max_batch=8), clock=lambda: now[0])
        running = await occupy(worker, gate)
        observation = Gate()
        held = weakref.ref(observation)
        call = SlotCall("action", partial(refuse, observation), Together("k", observation, refuse))
        tasks = await waiting(worker.serve(call, origin("robot", deadline_s=1.0)), worker.serve(replace(call, call=dict), origin()))
        if end == "superseded":
            tasks += await waiting(worker.serve(alone(dict), origin("robot")))
        if end == "late":
            now[0] = 2.0
        gc.collect()
        gc.disable()
        try:
            del call, observation
            gate.released.set()
            await asyncio.wait([running, *tasks])
            assert tasks[0].exception() is not None
            tasks.clear()
            await worker.run(lambda: None)
            await asyncio.sleep(0)
            assert held() is None
        finally:
            gc.enable()
        worker.close()

    async def test_nothing_is_said_of_an_error_whose_caller_left_just_then(self, gate: Gate) -> None:
        said: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: said.append(context))
        worker = SlotWorker("action")
        running = await occupy(worker, gate)
        (old,) = await waiting(worker.serve(SlotCall("action", gate, timeout_s=30.0), origin("robot")))
        (new,) = await waiting(worker.serve(alone(lambda: {"n": 1}), origin("robot")))
        assert not old.done()  # its answer is there, and it has not looked yet
        old.cancel()
        with pytest.raises(asyncio.CancelledError):
            await old
        gate.released.set()
        await asyncio.gather(running, new)
        del old
        gc.collect()
        assert said == []
        worker.close()

    async def test_a_closed_worker_refuses_drops_its_queue_and_lets_the_running_call_finish(self, gate: Gate) -> None:
        worker, model = SlotWorker("action"), Model()
        running = await occupy(worker, gate)
        queued, job = await waiting(worker.serve(model.call("queued"), origin()), worker.run(lambda: None))
        worker.close()
        with pytest.raises(DrainingError, match=r"^the server is shutting down; the action takes no new requests$"):
            await worker.serve(model.call("refused"), origin())
        for task in (queued, job):
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 30)
        assert not running.done()
        gate.released.set()
        await running
        assert model.batches == []

    async def test_an_answer_that_takes_too_long_is_not_waited_for(self, gate: Gate) -> None:
        worker = SlotWorker("planner")
        call = SlotCall("planner", gate, timeout_s=0.001)
        with pytest.raises(PlannerError, match=r"^the planner gave no answer within 0\.001 s$"):
            await worker.serve(call, origin())
        gate.released.set()
        assert await worker.serve(SlotCall("planner", lambda: {"n": 1}, timeout_s=30.0), origin()) == {"n": 1}
        worker.close()


class TestBatches:
    async def test_calls_that_wait_together_are_one_model_call_and_each_gets_its_own_reply(self, gate: Gate) -> None:
        counts, model = Counts(), Model()
        worker = SlotWorker("action", RequestQueue(max_batch=4), observer=counts)
        running = await occupy(worker, gate)
        origins = [origin() for _ in range(6)]
        tasks = await waiting(*(worker.serve(model.call(i), origins[i]) for i in range(6)))
        gate.released.set()
        assert await asyncio.gather(*tasks) == [{"row": i} for i in range(6)]
        await running
        assert model.batches == [[0, 1, 2, 3], [4, 5]]
        assert [origin.served[0].batch for origin in origins] == [4, 4, 4, 4, 2, 2]
        assert [seen[2] for seen in counts.seen if seen[0] == "batch"] == [1, 4, 2]
        worker.close()

    async def test_the_poisoned_call_of_a_batch_is_found_and_the_others_succeed(self, gate: Gate) -> None:
        model = Model("bad")
        worker = SlotWorker("action", RequestQueue(max_batch=4))
        running = await occupy(worker, gate)
        tasks = await waiting(*(worker.serve(model.call(row), origin()) for row in ("a", "bad", "b")))
        gate.released.set()
        a, bad, b = await asyncio.gather(*tasks, return_exceptions=True)
        await running
        assert (a, b) == ({"row": "a"}, {"row": "b"}) and isinstance(bad, ZeroDivisionError)
        assert model.batches == [["a", "bad", "b"], ["a"], ["bad"], ["b"]]
        worker.close()

    async def test_whoever_made_a_batch_fail_is_served_by_itself_and_behind_the_others_for_a_while_but_not_for_ever(self) -> None:
        model, now = Model("bad"), [0.0]
        worker = SlotWorker("action", RequestQueue(max_batch=8), clock=lambda: now[0])

        async def together(*rows: str) -> None:
            await asyncio.gather(*(worker.serve(model.call(row), origin(row.strip("'"))) for row in rows), return_exceptions=True)
            model.batches.append([])

        await together("bad", "a")
        assert model.batches == [["bad", "a"], ["bad"], ["a"], []]
        await together("bad", "a", "b")
        assert model.batches[4:] == [["a", "b"], ["bad"], []]
        now[0] = 9.0  # it has failed again since
        await together("bad", "a", "b")
        assert model.batches[7:] == [["a", "b"], ["bad"], []]
        now[0] = 30.0
        await together("a", "b", "bad'")
        assert model.batches[10:] == [["a", "b", "bad'"], []]
        worker.close()

    async def test_a_model_that_forgets_a_row_is_asked_one_by_one(self, gate: Gate) -> None:
        model = Model()
        worker = SlotWorker("action", RequestQueue(max_batch=2))
        running = await occupy(worker, gate)
        forgetful = [SlotCall("action", lambda n=n: {"n": n}, Together("forgetful", n, lambda rows: [{"n": 0}])) for n in range(2)]
        tasks = await waiting(*(worker.serve(call, origin()) for call in forgetful))
        gate.released.set()
        assert await asyncio.gather(*tasks) == [{"n": 0}, {"n": 1}]
        await running
        assert model.batches == []
        worker.close()

    async def test_one_that_is_alone_is_served_at_once_and_one_of_many_is_held_for_those_just_answered(self, gate: Gate) -> None:
        model, now = Model(), [0.0]
        worker = SlotWorker("action", RequestQueue(max_batch=8, max_wait_s=3600.0), clock=lambda: now[0])
        assert await asyncio.wait_for(worker.serve(model.call("alone"), origin("a")), 30) == {"row": "alone"}
        assert await asyncio.wait_for(worker.serve(model.call("again"), origin("a")), 30) == {"row": "again"}
        (held,) = await waiting(worker.serve(model.call("b"), origin("b")))
        assert worker.depth == 1 and worker.running == 0
        (last,) = await waiting(worker.serve(model.call("a"), origin("a")))
        await asyncio.wait_for(asyncio.gather(held, last), 30)
        assert model.batches[-1] == ["b", "a"]
        worker.close()


class TestSharing:
    @staticmethod
    def question(value: int, *, key: str = "tidy") -> Question:
        return Question(key, {"cam": np.full((8, 8, 3), value, np.uint8)})

    async def test_equal_questions_in_one_batch_and_in_flight_are_computed_once(self, gate: Gate) -> None:
        counts, model = Counts(), Model()
        worker = SlotWorker("planner", RequestQueue(max_batch=8), observer=counts)
        running = await occupy(worker, gate)
        asked = [("a", self.question(1)), ("b", self.question(1)), ("c", self.question(2)), ("d", self.question(1, key="sweep")), ("e", None)]
        tasks = await waiting(*(worker.serve(model.call(row, slot="planner", question=question), origin()) for row, question in asked))
        gate.released.set()
        replies = await asyncio.gather(*tasks)
        await running
        assert model.batches == [["a", "c", "d", "e"]]
        assert [reply["row"] for reply in replies] == ["a", "a", "c", "d", "e"] and counts.seen.count(("shared",)) == 1
        worker.close()

    async def test_a_question_that_is_being_answered_is_not_asked_again(self, gate: Gate) -> None:
        worker = SlotWorker("planner")
        leader = asyncio.create_task(worker.serve(SlotCall("planner", gate, question=self.question(1)), origin()))
        assert await asyncio.to_thread(gate.entered.wait, 30)
        follower, other = await waiting(
            worker.serve(SlotCall("planner", lambda: {"n": 0}, question=self.question(1)), origin()),
            worker.serve(SlotCall("planner", lambda: {"n": 1}, question=self.question(3)), origin()),
        )
        leader.cancel()  # whoever asked first may leave: the answer is the other's, too
        gate.released.set()
        assert await follower == {"thread": "planner-slot"} and await other == {"n": 1}
        worker.close()

    async def test_one_that_has_no_room_in_the_batch_gets_its_answer_all_the_same(self, gate: Gate) -> None:
        counts, model = Counts(), Model()
        worker = SlotWorker("planner", RequestQueue(max_batch=2), observer=counts)
        running = await occupy(worker, gate)
        asked = [("a", self.question(1)), ("b", self.question(2)), ("c", self.question(3)), ("d", self.question(1)), ("e", self.question(2))]
        tasks = await waiting(*(worker.serve(model.call(row, slot="planner", question=question), origin()) for row, question in asked))
        gate.released.set()
        replies = await asyncio.gather(*tasks)
        await running
        assert model.batches == [["a", "b"], ["c"]]
        assert [reply["row"] for reply in replies] == ["a", "b", "c", "a", "b"] and counts.seen.count(("shared",)) == 2
        worker.close()


class TestBackground:
    async def test_it_gives_way_to_what_robots_wait_for_and_to_a_newer_one(self, gate: Gate) -> None:
        worker, model, ends = SlotWorker("planner"), Model(), []
        running = await occupy(worker, gate)
        begun: list[str] = []
        robot = origin("robot")
        for name in ("first", "second"):
            call = model.call(name, slot="planner")
            worker.serve_beside(Background(call, lambda name=name: begun.append(name), ends.append), robot)
        (foreground,) = await waiting(worker.serve(model.call("foreground", slot="planner"), origin("robot")))
        assert begun == []
        gate.released.set()
        await asyncio.gather(running, foreground)
        while len(ends) < 2:
            await asyncio.sleep(0)
        assert model.batches == [["foreground"], ["second"]] and begun == ["second"]
        assert isinstance(ends[0], SupersededError) and ends[1:] == [{"row": "second"}]
        assert robot.served == []
        worker.close()

    async def test_the_rows_of_a_batched_request_are_refreshed_each(self, gate: Gate) -> None:
        worker, model, ends = SlotWorker("planner"), Model(), []
        running = await occupy(worker, gate)
        for row in ("left", "right"):
            background = Background(model.call(row, slot="planner"), lambda: None, ends.append)
            worker.serve_beside(background, origin("one connection", newest_wins=False, places=0))
        gate.released.set()
        await running
        while len(ends) < 2:
            await asyncio.sleep(0)
        assert ends == [{"row": "left"}, {"row": "right"}]
        worker.close()

    async def test_in_a_full_queue_it_makes_room_for_what_robots_wait_for_but_not_in_vain(self, gate: Gate) -> None:
        worker, model, ends = SlotWorker("planner", RequestQueue(max_queue=3)), Model(), []
        running = await occupy(worker, gate)
        for row in ("first", "second"):
            worker.serve_beside(Background(model.call(row, slot="planner"), lambda: None, ends.append), origin())
        batch = origin("batch", newest_wins=False)
        (one,) = await waiting(worker.serve(model.call("one", slot="planner"), batch))
        with pytest.raises(OverloadedError):
            await worker.serve(model.call("two", slot="planner"), batch)
        await asyncio.sleep(0)
        assert ends == []
        robot, again = await waiting(*(worker.serve(model.call(row, slot="planner"), origin("robot")) for row in ("robot", "again")))
        await asyncio.sleep(0)
        assert [str(end) for end in ends] == ["the planner is overloaded: a refresh made room for a request that a robot waits for"]
        gate.released.set()
        await asyncio.wait([running, one, robot, again])
        while len(ends) < 2:
            await asyncio.sleep(0)
        assert model.batches == [["one"], ["again"], ["first"]] and worker.depth == 0
        worker.close()

    async def test_it_is_told_how_it_ended_whatever_that_is(self, gate: Gate) -> None:
        worker, ends = SlotWorker("planner", RequestQueue(max_queue=1)), []
        running = await occupy(worker, gate)
        (queued,) = await waiting(worker.serve(alone(lambda: {"n": 1}), origin()))
        background = Background(SlotCall("planner", lambda: {"x": 1 // 0}), lambda: None, ends.append)
        worker.serve_beside(background, origin())
        assert [type(end) for end in ends] == [OverloadedError]
        gate.released.set()
        await asyncio.gather(running, queued)
        worker.serve_beside(background, origin())
        while len(ends) < 2:
            await asyncio.sleep(0)
        worker.close()
        worker.serve_beside(background, origin())
        assert [type(end) for end in ends] == [OverloadedError, ZeroDivisionError, DrainingError]

    async def test_a_robot_that_is_alone_is_not_held_for_its_own_refresh(self) -> None:
        worker, model, ends = SlotWorker("planner", RequestQueue(max_batch=8, max_wait_s=3600.0)), Model(), []
        worker.serve_beside(Background(model.call("refresh", slot="planner"), lambda: None, ends.append), origin("robot"))
        while not ends:
            await asyncio.sleep(0)
        assert await asyncio.wait_for(worker.serve(model.call("next", slot="planner"), origin("robot")), 30) == {"row": "next"}
        worker.close()


class TestWatch:
    async def test_a_stuck_call_is_noticed_and_forgiven_when_it_returns(self, gate: Gate) -> None:
        worker = SlotWorker("action", watch=Watch(stuck_after_s=0.0))
        running = await occupy(worker, gate)
        while not worker.stuck:
            await asyncio.sleep(0)
        gate.released.set()
        await running
        assert not worker.stuck
        worker.close()

    async def test_one_that_does_not_come_back_fails_its_requests_and_says_so(self, gate: Gate) -> None:
        fatal = asyncio.get_running_loop().create_future()
        worker = SlotWorker("planner", watch=Watch(0.0, 0.01, fatal.set_result))
        running = await occupy(worker, gate)
        (queued,) = await waiting(worker.serve(alone(lambda: {"n": 1}), origin()))
        assert await asyncio.wait_for(fatal, 30) == "planner"
        for task in (running, queued):
            with pytest.raises(PolicyError, match=r"^the planner is stuck: a model call has not returned for 0\.01 s$"):
                await task
        with pytest.raises(DrainingError):
            await worker.serve(alone(lambda: {"n": 2}), origin())
