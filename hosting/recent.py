"""What the page of the admin port shows of each robot: its newest pictures and chunk, its last states, subtasks and timings.

Kept in memory only, and bounded: so many sessions, so many entries of each, so many bytes of pictures in all. Pictures are kept as references to
the arrays that were served, never copied or encoded here; states and chunks are copied, a few kilobytes at most, because a view of them would
keep a whole message. Pure: no threads, no I/O; the clock comes in. All of it belongs to the event loop's thread.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hosting.calls import Served, Slot
from hosting.logs import one_line
from hosting.observer import Observer
from hosting.policy import Observation, Reply, RequestError, SupersededError, UnavailableError
from hosting.sessions import Session, SessionStore
from pi0.cameras import camera_images
from pi0.prompt import prompt_text

MAX_SESSIONS: Final = 16
MAX_IMAGE_BYTES: Final = 64 << 20
"""What the pictures of all sessions may hold, the messages that they are views of included."""
LINGER_S: Final = 60.0
"""How long a session that has ended is still shown."""

SUBTASKS: Final = 100
STATES: Final = 240
CHUNKS: Final = 12
TIMINGS: Final = 512
MAX_CAMERAS: Final = 8
MAX_STATE_DIMS: Final = 64
MAX_CHUNK_NUMBERS: Final = 1 << 13
"""Also what the chunks of one answer to the page have in all, older ones left out: more would take a millisecond of the event loop and more."""
MAX_TEXT_CHARS: Final = 2000

_RATE_WINDOW_S: Final = 10.0
_SPARK: Final = 90
_NOT_INFERENCE: Final = frozenset({"reset", "metadata", "unknown"})

Floats = NDArray[np.floating[Any]]


@dataclass(slots=True, eq=False)
class _Subtask:
    """One subtask, from the first reply that rests on it to the last.

    Attributes:
        fields: what makes it another one where it changes.
        told: the last reply's own map.
    """

    id: int
    version: int
    began_s: float
    fields: dict[str, Any]
    told: Mapping[str, Any]
    last_s: float = 0.0
    requests: int = 0


@dataclass(slots=True, eq=False)
class _Record:
    """What is known of one session.

    Attributes:
        version: grows with every request; entries have the one that they came or last changed with.
        images: of the newest observation, by camera.
        held: the buffers that ``images`` are views of: id → size in bytes.
        dropped: whether pictures were given up because they do not fit.
    """

    session: Session
    epoch: int
    last_s: float
    slot: Slot
    version: int = 0
    image_version: int = 0
    images: dict[str, NDArray[Any]] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    dropped: bool = False
    prompt: str | None = None
    applied: str | None = None
    ms: float | None = None
    refusals: int = 0
    refusal: dict[str, Any] | None = None
    subtasks: deque[_Subtask] = field(default_factory=lambda: deque(maxlen=SUBTASKS))
    states: deque[tuple[int, float, Floats]] = field(default_factory=lambda: deque(maxlen=STATES))
    chunks: deque[tuple[int, float, Floats]] = field(default_factory=lambda: deque(maxlen=CHUNKS))
    answered_s: deque[float] = field(default_factory=lambda: deque(maxlen=32))


class Recent(Observer):
    """Remembers what was served lately.

    Args:
        sessions: tells which sessions have ended.
        max_sessions: how many are shown; one more takes the place of the one that was not heard of for longest.
        max_image_bytes: what their pictures may hold in all; beyond it, the pictures of the one that was not heard of for longest go.
        linger_s: how long a session that has ended is still shown.
        clock: in seconds; times of entries are its readings.
    """

    def __init__(
        self,
        sessions: SessionStore,
        *,
        max_sessions: int = MAX_SESSIONS,
        max_image_bytes: int = MAX_IMAGE_BYTES,
        linger_s: float = LINGER_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._sessions = sessions
        self._max_sessions = max_sessions
        self._max_image_bytes = max_image_bytes
        self._linger_s = linger_s
        self._clock = clock
        self._records: OrderedDict[int, _Record] = OrderedDict()  # the one that was not heard of for longest comes first
        self._buffers: dict[int, list[int]] = {}  # id of a buffer → how many sessions hold it, its size
        self._held_bytes = 0
        self._ids = itertools.count()
        self._requests: deque[tuple[float, float, bool]] = deque(maxlen=TIMINGS)
        self._calls: dict[Slot, deque[Served]] = {"planner": deque(maxlen=TIMINGS), "action": deque(maxlen=TIMINGS)}

    @property
    def held_bytes(self) -> int:
        """What the pictures hold."""
        return self._held_bytes

    def request(self, slot: Slot, mode: str, outcome: str, seconds: float) -> None:
        if mode not in _NOT_INFERENCE:
            self._requests.append((self._clock(), seconds, outcome == "ok"))

    def served(self, served: Served) -> None:
        self._calls[served.slot].append(served)

    def answered(self, slot: Slot, session: Session, observation: Observation, reply: Reply, ms: float) -> None:
        now_s = self._clock()
        record = self._record(slot, session, now_s)
        record.version += 1
        record.answered_s.append(now_s)
        record.ms = ms
        instruction = reply.get("instruction")
        record.applied = instruction if isinstance(instruction, str) else None
        self._observed(record, observation)
        if (state := _state(observation)) is not None:
            record.states.append((record.version, now_s - ms / 1e3, state))
        if (chunk := _chunk(reply.get("actions"))) is not None:
            record.chunks.append((record.version, now_s, chunk))
        subtask = reply.get("subtask")
        if isinstance(subtask, Mapping):
            self._subtask(record, subtask, now_s)

    def refused(self, slot: Slot, session: Session, observation: Observation, error: Exception) -> None:
        if isinstance(error, SupersededError):
            return  # a newer observation of the same robot is on its way
        now_s = self._clock()
        record = self._record(slot, session, now_s)
        record.version += 1
        record.refusals += 1
        known = isinstance(error, RequestError | UnavailableError)
        text = one_line(str(error)) if known else "internal error; the server's log has the details"
        record.refusal = {"at": now_s, "text": text[:MAX_TEXT_CHARS]}
        self._observed(record, observation)

    def sweep(self) -> None:
        """Forget the sessions that ended a while ago."""
        now_s = self._clock()
        for key, record in list(self._records.items()):
            if now_s - record.last_s >= self._linger_s and self._ended(record):
                self._forget(key)

    def overview(self) -> dict[str, Any]:
        """Every session in brief, those that are active first, and how long requests take; plain values, times in seconds of the clock."""
        self.sweep()
        now_s = self._clock()
        records = sorted(self._records.values(), key=lambda record: _place(record, now_s))
        return {"now": round(now_s, 4), "sessions": [self._described(record, now_s) for record in records], "latency": self._latency(now_s)}

    def details(self, key: int, since: int | None = None) -> dict[str, Any] | None:
        """What came of one session after version ``since`` (None: all that is remembered); None where it is not known.

        ``subtasks`` are those that began or changed; ``states`` are pairs of time and ``[d]``, ``chunks`` of the answer's time and ``[H, d]``.
        :func:`plain` makes JSON of it, which may take a while and any thread.
        """
        record = self._records.get(key)
        if record is None:
            return None
        if since is None or since > record.version:
            since = -1
        return {
            "key": key,
            "version": record.version,
            "since": since,
            "epoch": record.epoch,
            "cameras": [{"name": name, "version": record.image_version, **_size(image)} for name, image in record.images.items()],
            "images_dropped": record.dropped,
            "subtasks": [_shown_subtask(subtask) for subtask in _newer(record.subtasks, since, lambda subtask: subtask.version)],
            "states": [(at_s, state) for _, at_s, state in _newer(record.states, since, _version)],
            "chunks": _newest([(at_s, chunk) for _, at_s, chunk in _newer(record.chunks, since, _version)]),
        }

    def image(self, key: int, camera: str) -> tuple[int, NDArray[Any]] | None:
        """The newest picture of a camera and its version; None where there is none."""
        record = self._records.get(key)
        if record is None or camera not in record.images:
            return None
        return record.image_version, record.images[camera]

    def _record(self, slot: Slot, session: Session, now_s: float) -> _Record:
        record = self._records.get(session.key)
        if record is None:
            while len(self._records) >= self._max_sessions:
                self._forget(next(iter(self._records)))
            record = self._records[session.key] = _Record(session, session.epoch, now_s, slot)
        if record.epoch != session.epoch:  # a new episode: what was seen and done before it is no part of its plots
            record.epoch = session.epoch
            record.states.clear()
            record.chunks.clear()
        record.last_s, record.slot = now_s, slot
        self._records.move_to_end(session.key)
        return record

    def _forget(self, key: int) -> None:
        self._release(self._records.pop(key))

    def _ended(self, record: _Record) -> bool:
        return not self._sessions.remembers(record.session)

    def _observed(self, record: _Record, observation: Observation) -> None:
        record.prompt = _prompt(observation)
        images = _pictures(observation)
        if not images:
            return
        self._release(record)
        held = dict(_buffer(image) for image in images.values())
        if sum(held.values()) > self._max_image_bytes:
            record.dropped = True
            return
        record.images, record.held, record.dropped = images, held, False
        record.image_version = record.version
        for buffer, size in held.items():
            entry = self._buffers.setdefault(buffer, [0, size])
            if not entry[0]:
                self._held_bytes += size
            entry[0] += 1
        for other in self._records.values():  # the one that was not heard of for longest first; this one comes last
            if self._held_bytes <= self._max_image_bytes:
                break
            if other is not record and other.images:
                self._release(other)
                other.dropped = True

    def _release(self, record: _Record) -> None:
        for buffer in record.held:
            entry = self._buffers[buffer]
            entry[0] -= 1
            if not entry[0]:
                self._held_bytes -= entry[1]
                del self._buffers[buffer]
        record.images, record.held = {}, {}

    def _subtask(self, record: _Record, subtask: Mapping[str, Any], now_s: float) -> None:
        task = subtask.get("task")
        fields = {
            "text": _text(subtask.get("text")) or "",
            "task": _text(task) or record.applied or record.prompt,
            "done": subtask.get("done") is True,
            "failed": subtask.get("error") is not None,
            "template_revision": _number(subtask.get("template_revision")),
            "instructed": record.applied is not None,
            "epoch": record.epoch,
        }
        current = record.subtasks[-1] if record.subtasks else None
        if current is None or current.fields != fields:
            current = _Subtask(next(self._ids), record.version, now_s, fields, subtask)
            record.subtasks.append(current)
        current.version = record.version
        current.last_s = now_s
        current.requests += 1
        current.told = subtask

    def _described(self, record: _Record, now_s: float) -> dict[str, Any]:
        session, subtask = record.session, record.subtasks[-1] if record.subtasks else None
        return {
            "key": session.key,
            "id": session.id,
            "ended": self._ended(record),
            "idle_s": round(now_s - record.last_s, 2),
            "requests": session.requests,
            "hz": _rate(record.answered_s, now_s),
            "ms": None if record.ms is None else round(record.ms, 1),
            "slot": record.slot,
            "prompt": record.prompt,
            "instruction": session.instruction,
            "applied": record.applied,
            "subtask": subtask.fields["text"] if subtask else None,
            "done": bool(subtask and subtask.fields["done"]),
            "failed": bool(subtask and subtask.fields["failed"]),
            "refusals": record.refusals,
            "refusal": record.refusal,
        }

    def _latency(self, now_s: float) -> dict[str, Any]:
        failed = sum(not ok for _, _, ok in self._requests)
        return {
            "request": _percentiles([seconds for _, seconds, ok in self._requests if ok]),
            "planner": _percentiles([served.infer_s for served in self._calls["planner"]]),
            "action": _percentiles([served.infer_s for served in self._calls["action"]]),
            "planner_wait": _percentiles([served.queue_s for served in self._calls["planner"]]),
            "action_wait": _percentiles([served.queue_s for served in self._calls["action"]]),
            "window": len(self._requests),
            "failed": failed,
            "rate": _rate([at_s for at_s, _, _ in self._requests], now_s) or 0.0,
            "recent": [round(seconds * 1e3, 1) for _, seconds, ok in itertools.islice(reversed(self._requests), _SPARK) if ok][::-1],
        }


def plain(details: Mapping[str, Any]) -> dict[str, Any]:
    """What :meth:`Recent.details` gave, as JSON has it: arrays are nested lists, rounded to what a plot can show."""
    return {**details, **{name: [[round(at_s, 4), _numbers(array)] for at_s, array in details[name]] for name in ("states", "chunks")}}


def _newest(chunks: list[tuple[float, Floats]]) -> list[tuple[float, Floats]]:
    """As many of the newest as have ``MAX_CHUNK_NUMBERS`` in all, the oldest first."""
    sizes = itertools.accumulate(chunk.size for _, chunk in reversed(chunks))
    count = sum(size <= MAX_CHUNK_NUMBERS for size in sizes)
    return chunks[len(chunks) - count :]


def _place(record: _Record, now_s: float) -> tuple[float, int]:
    """Robots that are at work keep their places on the page, the newest first; then those that are not, by when they last were."""
    idle_s = now_s - record.last_s
    return (0.0 if idle_s < 5 else idle_s, -record.session.key)


def _version(entry: tuple[int, float, Floats]) -> int:
    return entry[0]


def _newer(entries: deque[Any], since: int, version: Callable[[Any], int]) -> list[Any]:
    """The entries after ``since``, the oldest first. Versions grow along ``entries``."""
    newer = list(itertools.takewhile(lambda entry: version(entry) > since, reversed(entries)))
    return newer[::-1]


def _shown_subtask(subtask: _Subtask) -> dict[str, Any]:
    return {
        "id": subtask.id,
        "began": round(subtask.began_s, 3),
        "last": round(subtask.last_s, 3),
        "requests": subtask.requests,
        **subtask.fields,
        **{name: _number(subtask.told.get(name)) for name in ("ms", "age_ms", "revision", "source_index")},
        "waited": subtask.told["waited"] is True if "waited" in subtask.told else None,
        "error": _text(subtask.told.get("error")),
    }


def _rate(times: Iterable[float], now_s: float) -> float | None:
    """How many a second there were lately; None: none."""
    recent = [at_s for at_s in times if now_s - at_s <= _RATE_WINDOW_S]
    if len(recent) < 2 or recent[-1] <= recent[0]:
        return None
    # Between two of them rather than over the window: a robot that came a second ago has its rate at once, one that stops loses it in the window.
    return round((len(recent) - 1) / max(recent[-1] - recent[0], now_s - recent[0] if now_s - recent[-1] > 1 else 0.0), 2)


def _percentiles(seconds: Sequence[float]) -> dict[str, Any] | None:
    """50th, 95th and 99th percentile by nearest rank, in ms."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    ranks = {f"p{percent}": ordered[min(len(ordered) - 1, -(-len(ordered) * percent // 100) - 1)] for percent in (50, 95, 99)}
    return {**{name: round(value * 1e3, 2) for name, value in ranks.items()}, "n": len(ordered)}


def _pictures(observation: Observation) -> dict[str, NDArray[Any]]:
    """The observation's images that can be shown: ``[h, w, c]`` or ``[c, h, w]``, uint8 or float, one or three channels."""
    try:
        images = camera_images(observation)
    except RequestError:
        return {}
    shown = ((name, image) for name, image in images.items() if _is_picture(image))
    return dict(itertools.islice(shown, MAX_CAMERAS))


def _is_picture(image: Any) -> bool:
    return (
        isinstance(image, np.ndarray)
        and image.ndim == 3
        and image.size > 0
        and (image.shape[2] in (1, 3) or image.shape[0] in (1, 3))
        and (image.dtype == np.uint8 or image.dtype.kind == "f")
    )


def _buffer(array: NDArray[Any]) -> tuple[int, int]:
    """What an array keeps alive: the id of the buffer that it is a view of, in the end, and its size in bytes."""
    owner: Any = array
    while isinstance(owner, np.ndarray | memoryview):
        base = owner.base if isinstance(owner, np.ndarray) else owner.obj
        if base is None:
            break
        if not isinstance(base, np.ndarray | memoryview | bytes | bytearray):
            return id(base), max(owner.nbytes, array.nbytes)
        owner = base
    return id(owner), len(owner) if isinstance(owner, bytes | bytearray) else owner.nbytes


def _size(image: NDArray[Any]) -> dict[str, int]:
    height, width = image.shape[:2] if image.shape[2] in (1, 3) else image.shape[1:]
    return {"width": int(width), "height": int(height)}


def _state(observation: Observation) -> Floats | None:
    """``[d]``: where the robot is, as its observation says."""
    for key in ("state", "observation/state"):
        if (state := _vector(observation.get(key))) is not None:
            return state
    joints, gripper = (_vector(observation.get(f"observation/{part}_position")) for part in ("joint", "gripper"))
    if joints is None or gripper is None:
        return joints
    return np.concatenate([joints, gripper])


def _vector(value: Any) -> Floats | None:
    if isinstance(value, list | tuple | int | float) and not isinstance(value, bool):
        if isinstance(value, list | tuple) and (len(value) > MAX_STATE_DIMS or not all(isinstance(item, int | float) for item in value)):
            return None
        try:
            value = np.asarray(value, np.float64)
        except (ValueError, OverflowError):
            return None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu" or value.ndim > 1 or not 0 < value.size <= MAX_STATE_DIMS:
        return None
    return np.array(value, np.float64).reshape(-1)


def _chunk(actions: Any) -> Floats | None:
    """``[H, d]``, a copy: a reply's own may be a view of what a whole batch was answered."""
    if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.dtype.kind not in "fiu" or not 0 < actions.size <= MAX_CHUNK_NUMBERS:
        return None
    return np.array(actions, np.float64)


def _prompt(observation: Observation) -> str | None:
    try:
        return prompt_text(observation)[:MAX_TEXT_CHARS]
    except RequestError:
        return None


def _text(value: Any) -> str | None:
    return value[:MAX_TEXT_CHARS] if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    """A finite number as JSON has it."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return round(value, 3)


def _numbers(array: Floats) -> Any:
    """Nested lists; null where JSON has no number."""
    with np.errstate(over="ignore", invalid="ignore"):  # of the largest numbers rounding makes infinities
        rounded = np.round(array, 4)
    if np.isfinite(rounded).all():
        return rounded.tolist()
    numbers = rounded.astype(object)
    numbers[~np.isfinite(rounded)] = None
    return numbers.tolist()
