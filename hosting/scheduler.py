"""The only door to a model: one worker thread per slot that owns it, one bounded queue in front.

The event loop never runs a model, so pings and health checks are answered whatever a model does; and a model never runs on two
threads, so it needs no lock. What is served next, and with what, is decided on the event loop by :class:`~hosting.request_queue.RequestQueue`
each time the thread is free; the thread just runs what it is handed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np

from hosting.calls import Background, Origin, Question, Served, Slot, SlotCall, Together
from hosting.observer import Observer
from hosting.policy import DeadlineError, DrainingError, OverloadedError, PlannerError, PolicyError, Reply, SupersededError
from hosting.request_queue import RequestQueue, Ticket

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SAMPLE_STEP = 997
"""Two arrays are compared in full only if every so many of their values are equal."""

_SUSPECT_S = 10.0
"""How long a flow whose call made a batch fail is served by itself: everybody in such a batch is served twice."""

_ASIDE_S = 0.5
"""How long a call of such a flow gives way to others: long enough for theirs to be over, short enough for its good ones."""

_MAX_SUSPECTS = 1024

_CLOCK_STEP_S = 1e-4
"""A deadline is over when the clock is beyond it."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """What a ticket stands for."""

    call: SlotCall
    answer: asyncio.Future[Reply]
    begun: Callable[[], None] | None


@dataclass(slots=True, eq=False)
class _Row:
    """One row of a batch, and everybody who gets its reply."""

    call: SlotCall
    tickets: list[Ticket] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """A row's reply or error; the model took ``infer_s`` for all ``rows`` that were served with it."""

    result: Reply | _Raised
    infer_s: float
    rows: int


@dataclass(frozen=True)
class Watch:
    """When a model call that does not return is given up.

    Attributes:
        stuck_after_s: seconds until the slot counts as stuck; None: never.
        fatal_after_s: seconds until its requests fail and ``on_fatal`` is called; None: never.
        on_fatal: gets the slot.
    """

    stuck_after_s: float | None = None
    fatal_after_s: float | None = None
    on_fatal: Callable[[Slot], None] = lambda slot: None


_NO_WATCH = Watch()


class SlotWorker:
    """One slot's thread and the calls that wait for it.

    An executor would do the same in twice the time: its two futures and their locks cost more than the change of threads.
    All methods are the event loop's; the thread only runs what it is handed.

    Args:
        slot: whose thread it is.
        queue: what waits, and by which rules; the worker's own.
        watch: what happens when a model call does not return.
        observer: is told what happens.
        clock: deadlines are its readings.
    """

    def __init__(
        self,
        slot: Slot,
        queue: RequestQueue | None = None,
        *,
        watch: Watch = _NO_WATCH,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.slot: Slot = slot
        self._queue = queue if queue is not None else RequestQueue()  # an empty one is false
        self._watch = watch
        self._observer = observer or Observer()
        self._clock = clock
        self._closed = False
        self._free = True
        self._due = False
        self._jobs: deque[tuple[Callable[[], None], asyncio.Future[Any]]] = deque()
        self._rows: list[_Row] = []  # of the batch that runs
        self._begun_s = 0.0
        self._suspects: dict[Hashable, float] = {}  # flow → until when
        self._stuck = False
        self._watching: asyncio.TimerHandle | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A model cannot be interrupted: as a daemon it does not keep a process that has to end from ending.
        self._thread = threading.Thread(target=_run_all, args=[self._work], name=f"{slot}-slot", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """Calls that wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Rows that the model works on."""
        return len(self._rows)

    @property
    def running_s(self) -> float:
        """Seconds since the model was last called; 0 where it is idle."""
        return self._clock() - self._begun_s if self._rows else 0.0

    @property
    def stuck(self) -> bool:
        """Whether a model call has not returned for ``stuck_after_s``."""
        return self._stuck

    async def run(self, job: Callable[[], T]) -> T:
        """``job()`` on the slot's thread, before every call that waits: for loading a model, not for requests. It may take any time.

        Raises:
            DrainingError: the worker was closed.
        """
        self._refuse_if_closed()
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[T] = loop.create_future()
        self._jobs.append((lambda: _post(loop, self._done, outcome, _attempt(job)), outcome))
        self._next()
        return await outcome

    async def serve(self, call: SlotCall, origin: Origin) -> Reply:
        """``call`` in its turn, perhaps in one batch with others. A caller that is cancelled while it waits takes its call out of the queue.

        Raises:
            DeadlineError: ``origin.deadline_s`` passed before its turn came.
            SupersededError: a newer call of the same flow came before its turn.
            OverloadedError: the queue is full.
            DrainingError: the worker was closed.
            PolicyError: no answer came within ``call.timeout_s``, or the model is stuck for good; a PlannerError if it is the planner.
            Exception: whatever the model raises.
        """
        ticket = self._submit(call, origin, None)
        answer = _waiting(ticket).answer
        try:
            if call.timeout_s is None:
                return await answer
            done, _ = await asyncio.wait([answer], timeout=call.timeout_s)
            if not done:
                raise self._failure(f"the {self.slot} gave no answer within {call.timeout_s:g} s")
            return answer.result()
        finally:
            if not answer.done() or answer.cancelled():
                answer.cancel()
                if self._queue.remove(ticket):
                    self._next()  # the others may have been held for it
            else:
                answer.exception()  # heard of, also where the caller was cancelled just then
            # An error's frames hold the observation; where they hold the error too, only the garbage collector lets go of it.
            del ticket, answer

    def serve_beside(self, background: Background, origin: Origin) -> None:
        """``background.call`` in its turn, behind everything that a robot waits for; where the queue is full, it makes room. Returns at once."""
        # The rows of a batched request are one flow but many sessions, and a session's refresh gives way to none but its own next one.
        beside = dataclasses.replace(origin, flow=origin.plan, deadline_s=None, newest_wins=True, background=True, places=1, served=[])
        try:
            ticket = self._submit(background.call, beside, background.begun)
        except (OverloadedError, DrainingError) as error:
            background.done(error)
        else:
            _waiting(ticket).answer.add_done_callback(lambda answer: background.done(_result(answer)))

    def close(self) -> None:
        """Take no new calls; returns at once. What waits is cancelled, what runs is left to finish."""
        if self._closed:
            return
        self._closed = True
        for ticket in self._queue.clear():
            _waiting(ticket).answer.cancel()
        while self._jobs:
            self._jobs.popleft()[1].cancel()
        for timer in (self._watching, self._alarm):
            if timer is not None:
                timer.cancel()
        self._work.put(None)

    def _submit(self, call: SlotCall, origin: Origin, begun: Callable[[], None] | None) -> Ticket:
        self._refuse_if_closed()
        waiting = _Waiting(call, asyncio.get_running_loop().create_future(), begun)
        now_s = self._clock()
        ticket = Ticket(origin, call.together.key if call.together else None, waiting, now_s)
        if self._suspects.get(origin.flow, 0.0) > now_s:
            ticket.key, ticket.aside_until_s = None, now_s + _ASIDE_S
        if row := _asking_the_same(self._rows, call.question):
            self._observer.shared()
            _begin(ticket, row)
            return ticket
        if (refresh := self._queue.make_room(ticket)) is not None:
            self._observer.overloaded(self.slot)
            _settle(refresh, OverloadedError(f"the {self.slot} is overloaded: a refresh made room for a request that a robot waits for"))
        try:
            given_way = self._queue.offer(ticket)
        except OverloadedError as error:
            self._observer.overloaded(self.slot)
            raise OverloadedError(f"the {self.slot} is {error}") from None
        if given_way is not None:
            self._observer.superseded(self.slot)
            _settle(
                given_way,
                SupersededError(
                    f"superseded: a newer observation of the same session came before the {self.slot}'s turn; nothing was computed "
                    "(robots that share a connection each need a session_id of their own)"
                ),
            )
        if not self._due:
            # Not at once: the other rows of a batched request, and whatever else came with it, are just about to be submitted.
            self._due = True
            asyncio.get_running_loop().call_soon(self._next)
        return ticket

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise DrainingError(f"the server is shutting down; the {self.slot} takes no new requests")

    def _next(self) -> None:
        """Answer what is late; give the thread something to do if it is free; come again when time alone changes what that is."""
        self._due = False
        if self._closed:
            return
        now_s = self._clock()
        for ticket in self._queue.expire(now_s):
            self._observer.expired(self.slot)
            late_ms = (now_s - (ticket.origin.deadline_s or now_s)) * 1e3
            text = f"deadline_ms: passed {late_ms:.0f} ms before the {self.slot}'s turn came; nothing was computed"
            _settle(ticket, DeadlineError(text))
        if self._free:
            if self._jobs:
                self._free = False
                self._work.put(self._jobs.popleft()[0])
            elif tickets := self._queue.take(now_s):
                self._start(tickets, now_s)
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if len(self._queue) and (wake_s := self._queue.wake_s(now_s)) is not None:
            self._alarm = asyncio.get_running_loop().call_later(max(0.0, wake_s - now_s) + _CLOCK_STEP_S, self._next)

    def _start(self, tickets: Sequence[Ticket], now_s: float) -> None:
        rows: list[_Row] = []
        for ticket in tickets:
            call = _waiting(ticket).call
            row = _asking_the_same(rows, call.question)
            if row is None:
                rows.append(row := _Row(call))
            else:
                self._observer.shared()
            _begin(ticket, row)
        for ticket in self._queue.waiting():
            if row := _asking_the_same(rows, _waiting(ticket).call.question):
                self._queue.remove(ticket)
                self._observer.shared()
                _begin(ticket, row)
        self._free, self._rows, self._begun_s = False, rows, now_s
        loop = asyncio.get_running_loop()
        if self._watch.stuck_after_s is not None:
            self._watching = loop.call_later(self._watch.stuck_after_s, self._late)
        calls = [row.call for row in rows]

        def work() -> None:
            _post(loop, self._finished, _serve(calls, self._clock))
            calls.clear()

        self._work.put(work)

    def _finished(self, outcomes: Sequence[_Outcome]) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        if self._stuck:
            logger.warning("%s: the model call that was stuck has returned after %.1f s", self.slot, self.running_s)
            self._stuck = False
        rows, self._rows, self._free = self._rows, [], True
        now_s = self._clock()
        for count in [len(rows)] if outcomes[0].rows == len(rows) else [1] * len(rows):
            self._observer.batch(self.slot, count)
        flows = []
        for row, outcome in zip(rows, outcomes, strict=True):
            for ticket in row.tickets:
                served = Served(self.slot, max(0.0, self._begun_s - ticket.queued_s), outcome.infer_s, outcome.rows)
                ticket.origin.served.append(served)
                self._observer.served(served)
                if not ticket.origin.background:  # nobody asks again because of it
                    flows.append(ticket.origin.flow)
                if isinstance(outcome.result, _Raised):
                    origin = ticket.origin
                    if (len(rows) > 1 or origin.flow in self._suspects) and origin.newest_wins and not origin.background:
                        self._suspect(ticket.origin.flow, now_s)
                    _settle(ticket, outcome.result.error)
                else:
                    _settle(ticket, outcome.result)
        self._queue.answered(flows, now_s)
        self._next()

    def _suspect(self, flow: Hashable, now_s: float) -> None:
        if len(self._suspects) >= _MAX_SUSPECTS:
            self._suspects = {suspect: until_s for suspect, until_s in self._suspects.items() if until_s > now_s}
        if len(self._suspects) < _MAX_SUSPECTS:
            self._suspects[flow] = now_s + _SUSPECT_S

    def _done(self, outcome: asyncio.Future[Any], result: Any) -> None:
        """What :meth:`run` was given is done."""
        self._free = True
        if not outcome.done():
            if isinstance(result, _Raised):
                outcome.set_exception(result.error)
            else:
                outcome.set_result(result)
        self._next()

    def _late(self) -> None:
        """The model has not returned for too long."""
        watch = self._watch
        assert watch.stuck_after_s is not None
        if not self._stuck:
            self._stuck = True
            logger.error("%s: a model call has not returned for %g s; the slot counts as stuck", self.slot, watch.stuck_after_s)
            if watch.fatal_after_s is not None:
                left_s = max(0.0, watch.fatal_after_s - watch.stuck_after_s)
                self._watching = asyncio.get_running_loop().call_later(left_s, self._late)
            return
        logger.critical("%s: a model call has not returned for %g s; its requests fail", self.slot, watch.fatal_after_s)
        error = self._failure(f"the {self.slot} is stuck: a model call has not returned for {watch.fatal_after_s:g} s")
        for ticket in [*(ticket for row in self._rows for ticket in row.tickets), *self._queue.clear()]:
            _settle(ticket, error)
        self.close()
        watch.on_fatal(self.slot)

    def _failure(self, text: str) -> PolicyError:
        return PlannerError(text) if self.slot == "planner" else PolicyError(text)


@dataclass(frozen=True, slots=True)
class _Raised:
    error: Exception


def _run_all(work: SimpleQueue[Callable[[], None] | None]) -> None:
    """The slot's thread."""
    while (piece := work.get()) is not None:
        piece()
        # Not held while waiting for the next one: an observation is half a megabyte.
        del piece


def _post(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: Any) -> None:
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        logger.debug("a call finished after its event loop had been closed")


def _attempt(job: Callable[[], T]) -> T | _Raised:
    try:
        return job()
    except BaseException as error:  # noqa: BLE001 - handed to the caller; the thread serves the next call
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            return _Raised(error)
        # On the event loop a SystemExit would end the process and a CancelledError look like a client that leaves; no future holds a StopIteration.
        raised = RuntimeError(f"{type(error).__name__} was raised where it means nothing")
        raised.__cause__ = error
        return _Raised(raised)


def _serve(calls: Sequence[SlotCall], clock: Callable[[], float]) -> list[_Outcome]:
    """All calls in one model call, or, where that fails, one by one: what is wrong with one of them is its own matter."""
    together = calls[0].together
    if together is not None and len(calls) > 1:
        begun_s = clock()
        replies = _attempt(partial(_serve_together, together, [call.together.row for call in calls if call.together]))
        infer_s = clock() - begun_s
        if not isinstance(replies, _Raised):
            return [_Outcome(reply, infer_s, len(calls)) for reply in replies]
        logger.info("a batch of %d failed (%s); serving its requests one by one", len(calls), type(replies.error).__name__)
        del replies  # as below
    return [_serve_alone(call, clock) for call in calls]


def _serve_alone(call: SlotCall, clock: Callable[[], float]) -> _Outcome:
    begun_s = clock()
    # No name for the outcome here or in the callers: an error keeps their frames, and in a circle with it they would keep the observation.
    return _Outcome(_attempt(call.call), clock() - begun_s, 1)


def _serve_together(together: Together, rows: Sequence[Any]) -> Sequence[Reply]:
    replies = together.serve(rows)
    if len(replies) != len(rows):
        raise PolicyError(f"the policy gave {len(replies)} replies to a batch of {len(rows)}")
    return replies


def _asking_the_same(rows: Sequence[_Row], question: Question | None) -> _Row | None:
    """The row that is called with the same question."""
    if question is None:
        return None
    return next((row for row in rows if row.call.question is not None and _same(row.call.question, question)), None)


def _same(one: Question, other: Question) -> bool:
    if one.key != other.key or one.arrays.keys() != other.arrays.keys():
        return False
    pairs = [(np.asarray(array), np.asarray(other.arrays[name])) for name, array in one.arrays.items()]
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return False
    return all(np.array_equal(a.flat[::_SAMPLE_STEP], b.flat[::_SAMPLE_STEP]) for a, b in pairs) and all(np.array_equal(a, b) for a, b in pairs)


def _begin(ticket: Ticket, row: _Row) -> None:
    row.tickets.append(ticket)
    if begun := _waiting(ticket).begun:
        begun()


def _waiting(ticket: Ticket) -> _Waiting:
    waiting: _Waiting = ticket.item
    return waiting


def _settle(ticket: Ticket, result: Reply | BaseException) -> None:
    answer = _waiting(ticket).answer
    if answer.done():
        return
    if isinstance(result, BaseException):
        answer.set_exception(result)
    else:
        answer.set_result(result)


def _result(answer: asyncio.Future[Reply]) -> Reply | BaseException:
    if answer.cancelled():
        return asyncio.CancelledError()
    return answer.exception() or answer.result()
