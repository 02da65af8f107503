"""The only door to a model: one worker thread per slot that owns it, one bounded queue in front.

The event loop never runs a model, so pings and health checks are answered whatever a model does; and a model never runs on two
threads, so it needs no lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from hosting.policy import DrainingError, OverloadedError

T = TypeVar("T")

DEFAULT_MAX_QUEUE = 64


class SlotWorker:
    """One slot's thread and its queue, first come first served.

    Args:
        slot: name of the slot, for messages and the thread's name.
        max_queue: how many calls may wait or run at once.
    """

    def __init__(self, slot: str, *, max_queue: int = DEFAULT_MAX_QUEUE) -> None:
        self.slot = slot
        self._max_queue = max_queue
        self._unfinished = 0
        self._closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{slot}-slot")

    async def run(self, call: Callable[[], T]) -> T:
        """``call()`` on the slot's thread, in turn. A caller that is cancelled while it waits takes its call out of the queue.

        Raises:
            OverloadedError: ``max_queue`` calls are unfinished already.
            DrainingError: the worker was closed.
        """
        if self._closed:
            raise DrainingError(f"the server is shutting down; the {self.slot} takes no new requests")
        if self._unfinished >= self._max_queue:
            raise OverloadedError(f"the {self.slot} is overloaded: {self._unfinished} requests are waiting; try again later")
        self._unfinished += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, _outcome, call)
        finally:
            self._unfinished -= 1

    def close(self) -> None:
        """Take no new calls; returns at once, the one that runs is left to finish."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)


def _outcome(call: Callable[[], T]) -> T:
    try:
        return call()
    except StopIteration as error:
        # No future can hold it: its caller would wait for ever.
        raise RuntimeError("StopIteration was raised where nothing iterates") from error
