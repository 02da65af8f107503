"""One slot's door as its transports see it: closed while the slot loads, open, then draining."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from hosting import __version__
from hosting.policy import DrainingError, Observation, Reply
from hosting.routing import Route, Slot, run_on
from hosting.scheduler import SlotWorker

SERVER_NAME = "tandem"


class Endpoint:
    """What every transport of one slot shares.

    Clients may connect at once; they wait in :meth:`opened` until the slot is ready.

    Args:
        slot: which slot answers here.
        workers: the threads of all slots that a route of this endpoint may visit.
    """

    def __init__(self, slot: Slot, workers: Mapping[Slot, SlotWorker]) -> None:
        self.slot: Slot = slot
        self._workers = workers
        self._route: Route | None = None
        self._metadata: dict[str, Any] = {}
        self._opened = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._in_flight = 0
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether a request would be served now."""
        return self._opened.is_set() and not self.draining

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What a client gets when it connects; complete once the endpoint is open."""
        return self._metadata

    def open(self, route: Route, metadata: Mapping[str, Any]) -> None:
        """The slot is warm: let the waiting clients in."""
        self._route = route
        self._metadata = {**metadata, "server_name": SERVER_NAME, "server_version": __version__, "slot": self.slot}
        self._opened.set()

    async def opened(self) -> None:
        """Returns when the slot is ready, or never will be because the endpoint was closed."""
        await self._opened.wait()

    async def infer(self, obs: Observation) -> tuple[Reply, float]:
        """One observation → its reply and the time it took in ms, the wait for the slot's thread included.

        Raises:
            DrainingError: the server is shutting down.
            Exception: whatever the route raises.
        """
        if self.draining or self._route is None:
            raise DrainingError(f"the server is shutting down; the {self.slot} endpoint takes no new requests")
        self._in_flight += 1
        self._idle.clear()
        started_s = time.perf_counter()
        try:
            reply = await run_on(self._workers, self._route(obs))
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()
        return reply, (time.perf_counter() - started_s) * 1e3

    def close(self) -> None:
        """Take nothing new, and let those go who still wait for the slot."""
        self.draining = True
        self._opened.set()

    async def drain(self) -> None:
        """Close; returns when what was accepted is done."""
        self.close()
        await self._idle.wait()
