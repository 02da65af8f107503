"""What is remembered of each robot between its requests: one session per ``session_id``, or an anonymous one per connection.

Sessions with an id belong to the server, not to a connection: they survive reconnects until nothing was heard of them for ``ttl_s``. Their
number is bounded; the memory of each is bounded by what :mod:`hosting.cadence` keeps. All of it belongs to the event loop's thread.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hosting.cadence import SessionPlan
from hosting.policy import OverloadedError

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOGS = 60.0


@dataclass(slots=True, eq=False)
class Session:
    """One robot, as far as the server can tell.

    Attributes:
        id: None: a connection's anonymous session.
        key: unique in the process; a session that comes back after its time has another.
        created_s: when it began, on its store's clock; ``last_used_s``: when something was last heard of it.
        epoch: grows with every reset.
        observations: those taken since it began or was reset.
        in_flight: requests under way, counted by whoever serves them; a session that has some is neither swept nor evicted.
        requests: those that came, across resets.
        plan: what the planner said; a new one after every reset.
        instruction: an operator's, which takes the place of the robot's own prompt until it is withdrawn or the session is reset.
    """

    id: str | None
    key: int
    created_s: float
    last_used_s: float
    epoch: int = 0
    observations: int = 0
    in_flight: int = 0
    requests: int = 0
    plan: SessionPlan = field(default_factory=SessionPlan)
    instruction: str | None = None

    def reset(self) -> None:
        """Begin anew: what was planned is forgotten, and what is being planned will be. A new episode follows the robot's own prompt."""
        if self.instruction is not None:
            logger.info("session %s: was reset; the operator's instruction has ended", self.id if self.id is not None else f"#{self.key}")
            self.instruction = None
        self.epoch += 1
        self.observations = 0
        self.plan = self.plan.renewed()

    def next_index(self) -> int:
        """The number of the observation that came now, from 0."""
        index = self.observations
        self.observations += 1
        return index


class SessionStore:
    """All sessions of a service.

    Args:
        ttl_s: how long a session with an id is remembered after it was last used.
        max_sessions: how many of them; one more takes the place of the one that was not used for longest.
        clock: when things happen, in seconds. Plans are as old as their observations' arrival on this clock.

    Attributes:
        evicted: how many sessions made room for others before their time.
    """

    def __init__(self, *, ttl_s: float = 600.0, max_sessions: int = 1024, clock: Callable[[], float] = time.perf_counter) -> None:
        self.ttl_s = ttl_s
        self.max_sessions = max_sessions
        self.evicted = 0
        self._clock = clock
        self._keys = itertools.count()
        self._named: OrderedDict[str, Session] = OrderedDict()  # the one that was not used for longest comes first
        self._anonymous: dict[int, Session] = {}
        self._logged_s = -math.inf

    def client(self) -> ClientSessions:
        """For one connection."""
        return ClientSessions(self)

    def __len__(self) -> int:
        """Sessions with an id, and the anonymous ones of open connections."""
        return len(self._named) + len(self._anonymous)

    def sweep(self) -> int:
        """Forget the sessions that were not used for ``ttl_s``; returns how many."""
        now_s = self._clock()
        swept = 0
        while self._named:
            session = next(iter(self._named.values()))
            if now_s - session.last_used_s < self.ttl_s:
                break
            if session.in_flight:
                self._use(session, now_s)
            else:
                del self._named[_name(session)]
                swept += 1
        return swept

    def snapshot(self, limit: int | None = None) -> list[dict[str, Any]]:
        """Sessions as plain values, those with ids before anonymous ones, of the former those used last first; at most ``limit``."""
        now_s = self._clock()
        sessions = itertools.chain(reversed(self._named.values()), self._anonymous.values())
        return [_described(session, now_s) for session in itertools.islice(sessions, limit)]

    def remembers(self, session: Session) -> bool:
        """Whether it has neither ended nor made room for another."""
        if session.id is None:
            return session.key in self._anonymous
        return self._find(session.id, self._clock()) is session

    def by_key(self, key: int) -> Session | None:
        """The session of that key, while it is remembered."""
        if key in self._anonymous:
            return self._anonymous[key]
        session = next((session for session in self._named.values() if session.key == key), None)
        return None if session is None else self._find(_name(session), self._clock())

    def _find(self, session_id: str, now_s: float) -> Session | None:
        """The session of that id, unless its time is over."""
        session = self._named.get(session_id)
        if session is not None and not session.in_flight and now_s - session.last_used_s >= self.ttl_s:
            del self._named[session_id]
            return None
        return session

    def _use(self, session: Session, now_s: float) -> None:
        session.last_used_s = now_s
        if session.id is not None:
            self._named.move_to_end(session.id)

    def _named_session(self, session_id: str, now_s: float) -> Session:
        session = self._find(session_id, now_s)
        if session is None:
            self._make_room(now_s)
            session = self._named[session_id] = self._new(session_id, now_s)
        return session

    def _new(self, session_id: str | None, now_s: float) -> Session:
        return Session(session_id, next(self._keys), now_s, now_s)

    def _make_room(self, now_s: float) -> None:
        if len(self._named) < self.max_sessions or self.sweep():
            return
        for _ in range(len(self._named)):
            session = next(iter(self._named.values()))
            if not session.in_flight:
                break
            self._use(session, now_s)
        else:
            raise OverloadedError(
                f"session_id: all {self.max_sessions} sessions that the server remembers have requests under way; "
                "try again once one of them is answered, or raise sessions.max_sessions"
            )
        del self._named[_name(session)]
        self.evicted += 1
        if now_s - self._logged_s >= _SECONDS_BETWEEN_LOGS:
            self._logged_s = now_s
            logger.info(
                "sessions: %d are remembered, as many as may be; the one that was not used for longest (%.0f s) made room, as did %d before",
                self.max_sessions,
                now_s - session.last_used_s,
                self.evicted - 1,
            )


class ClientSessions:
    """The sessions that one connection has used; made by :meth:`SessionStore.client`."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self._used: dict[str, int] = {}  # id → key
        self._anonymous: Session | None = None
        self._closed = False

    def observe(self, session_id: str | None, *, begins: bool = False) -> Session:
        """The session that an observation is of, made where there is none.

        Args:
            session_id: None: the connection's own.
            begins: the session begins anew with this observation.

        Raises:
            OverloadedError: there is no room for one more session.
        """
        store = self._store
        now_s = store._clock()
        if session_id is None:
            session = self._own(now_s)
        else:
            session = store._named_session(session_id, now_s)
            self._remember(session_id, session.key)
        if begins and session.requests:
            session.reset()
        session.requests += 1
        store._use(session, now_s)
        return session

    def reset(self, session_ids: Sequence[str] | None) -> int:
        """Let sessions begin anew; returns how many there were.

        Args:
            session_ids: whoever uses them; None: all that this connection has used, its own included.
        """
        store = self._store
        now_s = store._clock()
        wanted = self._used if session_ids is None else dict.fromkeys(session_ids)
        sessions = [session for session_id in wanted if (session := store._find(session_id, now_s)) is not None]
        if session_ids is None:
            # Of the same name, but forgotten and made anew by somebody else, is another robot's.
            sessions = [session for session in sessions if self._used[_name(session)] == session.key]
            sessions += [self._anonymous] if self._anonymous is not None else []
        for session in sessions:
            session.reset()
            store._use(session, now_s)
        return len(sessions)

    def close(self) -> None:
        """The connection ended: its own session goes, those with an id stay for their time."""
        self._closed = True
        self._used.clear()
        if self._anonymous is not None:
            self._store._anonymous.pop(self._anonymous.key, None)
            self._anonymous = None

    def _own(self, now_s: float) -> Session:
        if self._anonymous is None:
            session = self._store._new(None, now_s)
            if self._closed:
                return session  # a request that was under way when the connection ended; nobody comes back to it
            self._anonymous = self._store._anonymous[session.key] = session
        return self._anonymous

    def _remember(self, session_id: str, key: int) -> None:
        if self._closed:
            return
        self._used[session_id] = key
        if len(self._used) > 2 * self._store.max_sessions:
            named = self._store._named
            self._used = {id_: key for id_, key in self._used.items() if id_ in named and named[id_].key == key}


def _name(session: Session) -> str:
    assert session.id is not None
    return session.id


def _described(session: Session, now_s: float) -> dict[str, Any]:
    plan = session.plan.current
    return {
        "id": session.id,
        "key": session.key,
        "anonymous": session.id is None,
        "age_s": now_s - session.created_s,
        "idle_s": now_s - session.last_used_s,
        "requests": session.requests,
        "observations": session.observations,
        "in_flight": session.in_flight,
        "epoch": session.epoch,
        "instruction": session.instruction,
        "task": plan.basis.task if plan is not None else None,
        "subtask": plan.subtask["text"] if plan is not None else None,
        "subtask_age_s": now_s - plan.basis.observed_s if plan is not None else None,
        "subtask_revision": plan.revision if plan is not None else None,
    }
