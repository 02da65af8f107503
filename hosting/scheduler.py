"""The only door to a model: one worker thread per slot that owns it, one bounded queue in front.

The event loop never runs a model, so pings and health checks are answered whatever a model does; and a model never runs on two
threads, so it needs no lock.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from hosting.policy import DeadlineError, DrainingError, OverloadedError

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_MAX_QUEUE = 64


@dataclass(slots=True)
class _Queued:
    """A call that waits; without ``work`` it was given up, and only its place in the queue is left."""

    work: tuple[Callable[[], Any], asyncio.Future[Any]] | None
    deadline_s: float | None
    loop: asyncio.AbstractEventLoop


class SlotWorker:
    """One slot's thread and its queue, first come first served.

    An executor would do the same in twice the time: its two futures and their locks cost more than the change of threads.

    Args:
        slot: name of the slot, for messages and the thread's name.
        max_queue: how many calls may wait or run at once.
    """

    def __init__(self, slot: str, *, max_queue: int = DEFAULT_MAX_QUEUE) -> None:
        self.slot = slot
        self._max_queue = max_queue
        self._unfinished = 0
        self._closed = False
        self._queue: SimpleQueue[_Queued | None] = SimpleQueue()
        # A model cannot be interrupted: as a daemon it does not keep a process that has to end from ending.
        self._thread = threading.Thread(target=self._work, name=f"{slot}-slot", daemon=True)
        self._thread.start()

    async def run(self, call: Callable[[], T], *, deadline_s: float | None = None) -> T:
        """``call()`` on the slot's thread, in turn. A caller that is cancelled while it waits takes its call out of the queue.

        Args:
            deadline_s: reading of :func:`time.perf_counter` after which the call is not begun any more.

        Raises:
            DeadlineError: its turn came after ``deadline_s``.
            OverloadedError: ``max_queue`` calls are unfinished already.
            DrainingError: the worker was closed.
        """
        if self._closed:
            raise DrainingError(f"the server is shutting down; the {self.slot} takes no new requests")
        if self._unfinished >= self._max_queue:
            raise OverloadedError(f"the {self.slot} is overloaded: {self._unfinished} requests are waiting; try again later")
        self._unfinished += 1
        try:
            loop = asyncio.get_running_loop()
            outcome: asyncio.Future[T] = loop.create_future()
            queued = _Queued((call, outcome), deadline_s, loop)
            self._queue.put(queued)
            try:
                return await outcome
            except asyncio.CancelledError:
                # It stays in the queue until the thread comes to it, but the observation must not (nor the future: its error's frames hold it).
                queued.work = None
                raise
        finally:
            self._unfinished -= 1

    def close(self) -> None:
        """Take no new calls; returns at once, the one that runs is left to finish. For the event loop's thread."""
        self._closed = True
        while True:
            try:
                queued = self._queue.get_nowait()
            except Empty:
                break
            if queued is not None and queued.work is not None:
                queued.work[1].cancel()
        self._queue.put(None)

    def _work(self) -> None:
        while (queued := self._queue.get()) is not None:
            work, queued.work = queued.work, None
            if work is None or work[1].cancelled():
                continue
            call, outcome = work
            result: Any = None
            error: BaseException | None = None
            try:
                if queued.deadline_s is not None and (late_s := time.perf_counter() - queued.deadline_s) > 0:
                    raise DeadlineError(f"deadline_ms: passed {late_s * 1e3:.0f} ms before the {self.slot}'s turn came; nothing was computed")
                result = call()
            except StopIteration:
                # No future can hold it: its caller would wait for ever.
                error = RuntimeError("StopIteration was raised where nothing iterates")
            except BaseException as raised:  # noqa: BLE001 - handed to the caller; this thread serves the next call
                error = raised
            try:
                queued.loop.call_soon_threadsafe(_settle, outcome, result, error)
            except RuntimeError:
                logger.debug("%s: a call finished after its event loop had been closed", self.slot)
            # Not held while waiting for the next call: an observation is half a megabyte.
            del queued, work, call, outcome, result, error


def _settle(outcome: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if outcome.done():
        return
    if error is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(result)
