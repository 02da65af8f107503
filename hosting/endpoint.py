"""One slot's door as its transports see it: closed while the slot loads, open, then draining."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hosting import __version__
from hosting.cadence import SessionPlan
from hosting.calls import Origin, Served, Slot
from hosting.done_subtasks import done_rows
from hosting.observer import Observer
from hosting.policy import DrainingError, MessageError, Observation, Reply, RequestError
from hosting.protocol import jpeg
from hosting.protocol.requests import InferRequest, Row
from hosting.routing import Route, of_row, run_on, run_together_on
from hosting.scheduler import SlotWorker
from hosting.sessions import ClientSessions, Session, SessionStore

SERVER_NAME = "tandem"

_DECODERS = 2
"""Threads that decode JPEG images."""

_DEFAULT_MAX_IMAGE_BYTES = 128 << 20


@dataclass(slots=True)
class _Asking:
    """One observation, and whose it is.

    Attributes:
        observation: as it came; its JPEG images are decoded before it is served.
        instruction: an operator's, in place of its prompt.
        session: None: a row of a batch that names none.
    """

    observation: Observation
    origin: Origin
    instruction: str | None
    session: Session | None

    def instructed(self) -> Observation:
        """The observation as it is served."""
        return self.observation if self.instruction is None else {**self.observation, "prompt": self.instruction}

    def told(self, reply: Reply) -> Reply:
        """The reply, which says whose instruction it is for where that is not the robot's own prompt."""
        return reply if self.instruction is None else {**reply, "instruction": self.instruction}


class Endpoint:
    """What every transport of one slot shares.

    Clients may connect at once; they wait in :meth:`opened` until the slot is ready.

    Args:
        slot: which slot answers here.
        workers: the threads of all slots that a route of this endpoint may visit.
        sessions: what is remembered of robots, on all endpoints of a service.
        deadline_ms: of requests that bring none; None: they have none.
        max_image_bytes: how much the JPEG images of one request may decode to.
        observer: is told what conversations with this endpoint do.
    """

    def __init__(
        self,
        slot: Slot,
        workers: Mapping[Slot, SlotWorker],
        *,
        sessions: SessionStore | None = None,
        deadline_ms: float | None = None,
        max_image_bytes: int = _DEFAULT_MAX_IMAGE_BYTES,
        observer: Observer | None = None,
    ) -> None:
        self.slot: Slot = slot
        self.sessions = sessions if sessions is not None else SessionStore()
        self.observer = observer or Observer()
        self._workers = workers
        self._deadline_ms = deadline_ms
        self._orders = itertools.count()
        self._max_image_bytes = max_image_bytes
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix=f"{slot}-jpeg")  # starts no thread before the first image
        self._channels_first: frozenset[jpeg.Path] = frozenset()
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
        self._channels_first = jpeg.channels_first(metadata.get("image_specs", []))
        self._opened.set()

    async def opened(self) -> None:
        """Returns when the slot is ready, or never will be because the endpoint was closed."""
        await self._opened.wait()

    async def serve(self, request: InferRequest, arrived_s: float, sessions: ClientSessions, served: list[Served]) -> tuple[Reply, float]:
        """One request → its reply and the time it took in ms, the wait for the slot's thread included.

        A batched request's reply has a leading axis in every array, ``policy_timing`` once, and lists of everything else. Where nothing is left to
        do for some of its rows, arrays are lists too, with None for those.

        Args:
            arrived_s: when it came, as :func:`time.perf_counter`; its deadline runs from there.
            sessions: of the connection that it came over.
            served: gets the calls that were made for it, however it ends.

        Raises:
            DrainingError: the server is shutting down.
            DeadlineError: the deadline passed before the slot's turn came.
            SupersededError: a newer observation of its session came before the slot's turn.
            OverloadedError: too many requests wait already.
            Exception: whatever the route raises.
        """
        if not self._opened.is_set():
            await self.opened()
        if self.draining or self._route is None:
            raise DrainingError(f"the server is shutting down; the {self.slot} endpoint takes no new requests")
        started_s = time.perf_counter()
        count = len(request.rows)
        with contextlib.ExitStack() as under_way:
            under_way.enter_context(self._accepted())
            asking = [under_way.enter_context(self._asking(request, index, arrived_s, sessions, served)) for index in range(count)]
            try:
                routes = []
                decoded_bytes = 0
                for index, asked in enumerate(asking):
                    if paths := jpeg.jpeg_paths(asked.observation):
                        try:
                            asked.observation = await self._with_images(asked.observation, paths, decoded_bytes)
                        except RequestError as error:
                            raise of_row(error, index, count) from None
                        decoded_bytes += jpeg.image_bytes(asked.observation, paths)
                    routes.append((self._route(asked.instructed(), seed=request.rows[index].seed, origin=asked.origin), asked.origin))
                if request.batched:
                    replies = await run_together_on(self._workers, routes)
                else:
                    replies = [await run_on(self._workers, *routes[0])]
                replies = [asked.told(reply) for asked, reply in zip(asking, replies, strict=True)]
                reply = _stacked(replies) if request.batched else replies[0]
            except Exception as error:
                for asked in asking:
                    if asked.session is not None:
                        self.observer.refused(self.slot, asked.session, asked.observation, error)
                raise
            ms = (time.perf_counter() - started_s) * 1e3
            for asked, answer in zip(asking, replies, strict=True):
                if asked.session is not None:
                    self.observer.answered(self.slot, asked.session, asked.observation, answer, ms)
        return reply, ms

    async def ask(self, observation: Observation, *, deadline_s: float) -> tuple[Reply, float]:
        """One observation of no robot, such as a person's try-out → its reply and the time it took in ms. Gives way to every robot's request.

        Args:
            observation: with its images as arrays.
            deadline_s: from now on; where its turn has not come by then, it never will.

        Raises:
            DrainingError: the slot is still loading, or the server is shutting down.
            DeadlineError, OverloadedError: robots leave it no room.
            Exception: whatever the route raises.
        """
        if not self.ready or self._route is None:
            state = "shutting down" if self.draining else "still loading"
            raise DrainingError(f"the {self.slot} is {state}; ask again when it is ready")
        started_s = time.perf_counter()
        origin = Origin(
            SessionPlan(),
            flow=(self.slot, "ask"),
            order=next(self._orders),
            arrived_s=started_s,
            deadline_s=started_s + deadline_s,
            newest_wins=False,
            background=True,
        )
        with self._accepted():
            reply = await run_on(self._workers, self._route(observation, origin=origin), origin)
        return reply, (time.perf_counter() - started_s) * 1e3

    @contextlib.contextmanager
    def _accepted(self) -> Iterator[None]:
        """A drain waits for what is in here."""
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    @contextlib.contextmanager
    def _asking(self, request: InferRequest, index: int, arrived_s: float, sessions: ClientSessions, served: list[Served]) -> Iterator[_Asking]:
        """Whose observation a row of ``request`` is; its session is not forgotten meanwhile."""
        row = request.rows[index]
        passing = None
        if request.batched and row.session_id is None:
            # Rows without a name are different robots as a rule: none of them may get another one's subtask.
            passing = self.sessions.client()
        session = (passing or sessions).observe(row.session_id, begins=row.begins)
        deadline_ms = self._deadline_ms if row.deadline_ms is None else row.deadline_ms
        place_in_session = session.next_index()
        session.in_flight += 1
        try:
            origin = Origin(
                session.plan,
                # A client that sends many robots' observations in one request takes turns with others as one client.
                flow=(self.slot, sessions) if request.batched else (self.slot, session.key),
                order=next(self._orders),
                arrived_s=arrived_s,
                deadline_s=None if deadline_ms is None else arrived_s + deadline_ms / 1e3,
                index=_index(row, place_in_session),
                replan=row.replan,
                newest_wins=not request.batched,
                places=0 if index else 1,
                served=served,
            )
            yield _Asking(row.observation, origin, session.instruction, session if passing is None else None)
        finally:
            session.in_flight -= 1
            if passing is not None:
                passing.close()

    async def _with_images(self, obs: Observation, paths: Sequence[jpeg.Path], taken_bytes: int) -> Observation:
        """``obs`` with its JPEG images decoded, on a thread of their own."""
        decode = partial(jpeg.decoded, obs, paths, chw=self._channels_first, max_bytes=self._max_image_bytes, taken_bytes=taken_bytes)
        return await asyncio.get_running_loop().run_in_executor(self._decoders, decode)

    def close(self) -> None:
        """Take nothing new, and let those go who still wait for the slot."""
        self.draining = True
        self._opened.set()

    async def drain(self) -> None:
        """Close; returns when what was accepted is done."""
        self.close()
        await self._idle.wait()
        self._decoders.shutdown(wait=False)


def _index(row: Row, place_in_session: int) -> int:
    """The observation's number as its client counts, else as the server does."""
    own = row.echo.get("obs_index")
    return own if isinstance(own, int) and not isinstance(own, bool) else place_in_session


def _stacked(replies: Sequence[Reply]) -> Reply:
    """Replies of one batch as one.

    A row for which nothing is left to do has no arrays. It must not fail the others, nor get numbers that somebody might act on, nor move them up.

    Raises:
        MessageError: they do not have the same arrays, because their requests had different modes.
    """
    stacked: Reply = {}
    done = {index for index, reply in enumerate(replies) if done_rows(reply)}
    for key, value in {key: value for reply in reversed(replies) for key, value in reply.items()}.items():
        rows = [reply.get(key) for reply in replies]
        if isinstance(value, np.ndarray):
            absent = [index for index, row in enumerate(rows) if row is None]
            if unexplained := [index for index in absent if index not in done]:
                raise MessageError(f"batch[{unexplained[0]}]: its reply has no {key}, as others of the batch do; send one mode per batch")
            stacked[key] = rows if absent else np.stack(rows)  # type: ignore[arg-type]
        else:
            stacked[key] = value if key == "policy_timing" else rows
    return stacked
