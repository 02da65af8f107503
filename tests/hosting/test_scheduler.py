"""The slot's worker: order, the bound of its queue, cancellation, closing."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from hosting.policy import DrainingError, OverloadedError
from hosting.scheduler import SlotWorker


class Gate:
    """A call that waits to be let go; ``entered`` says that it runs."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.entered.set()
        assert self.released.wait(30)
        return threading.current_thread().name


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.released.set()


async def occupy(worker: SlotWorker, gate: Gate) -> asyncio.Task[str]:
    """A task whose call runs on the worker's thread now."""
    task = asyncio.create_task(worker.run(gate))
    assert await asyncio.to_thread(gate.entered.wait, 30)
    return task


async def test_calls_run_on_one_thread_of_the_slot_in_the_order_they_came(gate: Gate) -> None:
    worker, order, names = SlotWorker("action"), [], set()

    def call(i: int) -> int:
        order.append(i)
        names.add(threading.current_thread().name)
        return i * i

    first = await occupy(worker, gate)
    waiting = [asyncio.create_task(worker.run(lambda i=i: call(i))) for i in range(20)]
    await asyncio.sleep(0)
    assert order == []
    gate.released.set()
    assert await asyncio.gather(*waiting) == [i * i for i in range(20)]
    assert order == list(range(20)) and names == {await first} and await first == "action-slot"
    worker.close()


async def test_the_event_loop_goes_on_while_a_call_runs(gate: Gate) -> None:
    worker = SlotWorker("action")
    task = await occupy(worker, gate)
    for _ in range(100):
        await asyncio.sleep(0)
    assert not task.done()
    gate.released.set()
    await task
    worker.close()


async def test_what_a_call_raises_is_raised_to_its_caller_only(gate: Gate) -> None:
    worker = SlotWorker("action")

    def fail() -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        await worker.run(fail)
    # A future cannot hold a StopIteration; its caller would wait for ever.
    with pytest.raises(RuntimeError, match="StopIteration"):
        await asyncio.wait_for(worker.run(lambda: next(iter(()))), 30)
    assert await worker.run(lambda: 7) == 7
    worker.close()


async def test_a_full_queue_refuses_and_takes_again_when_there_is_room(gate: Gate) -> None:
    worker = SlotWorker("planner", max_queue=2)
    running = await occupy(worker, gate)
    queued = asyncio.create_task(worker.run(lambda: "queued"))
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match=r"^the planner is overloaded: 2 requests are waiting; try again later$"):
        await worker.run(lambda: "refused")
    gate.released.set()
    assert [await running, await queued, await worker.run(lambda: "again")][1:] == ["queued", "again"]
    worker.close()


async def test_a_caller_that_gives_up_takes_its_call_out_of_the_queue(gate: Gate) -> None:
    worker, ran = SlotWorker("action", max_queue=2), []
    running = await occupy(worker, gate)
    queued = asyncio.create_task(worker.run(lambda: ran.append("queued")))
    await asyncio.sleep(0)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    after = asyncio.create_task(worker.run(lambda: ran.append("after")))
    gate.released.set()
    await asyncio.gather(running, after)
    assert ran == ["after"]
    worker.close()


async def test_a_call_that_was_given_up_holds_no_memory_while_the_slot_is_busy(gate: Gate) -> None:
    worker = SlotWorker("action")
    running = await occupy(worker, gate)
    observation = Gate()
    held = weakref.ref(observation)
    queued = asyncio.create_task(worker.run(observation))
    await asyncio.sleep(0)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    del observation, queued
    await asyncio.sleep(0)  # the loop lets go of the task that has just ended
    gc.collect()
    assert held() is None
    gate.released.set()
    assert await running == "action-slot"
    worker.close()


async def test_a_closed_worker_refuses_drops_its_queue_and_lets_the_running_call_finish(gate: Gate) -> None:
    worker, ran = SlotWorker("action"), []
    running = await occupy(worker, gate)
    queued = asyncio.create_task(worker.run(lambda: ran.append("queued")))
    await asyncio.sleep(0)
    worker.close()
    with pytest.raises(DrainingError, match=r"^the server is shutting down; the action takes no new requests$"):
        await worker.run(lambda: None)
    with pytest.raises(asyncio.CancelledError):
        await queued
    assert not running.done()
    gate.released.set()
    assert await running == "action-slot" and ran == []
