"""What a client asks, typed: an observation map's own keys taken apart from those that speak to the server (reference/peers.md §1.3, §1.12).

==================  ========================================================================================
``endpoint``        ``infer`` (also when absent) or ``reset``
``session_id``      the robot's session, text or a number; ``session_ids`` (list or None: all) goes with ``reset``
``reset``           true: this observation begins the session anew
``replan``          true: the planner is asked for a new subtask, whatever its cadence
``seed``            the action noise is drawn from it; also as ``sampling_params.seed``
``deadline_ms``     work that has not begun that long after the request's arrival is not begun
``request_id``, ``obs_index``  come back in the reply
``batch``           as the only key: a list of observations for one batched reply
==================  ========================================================================================

``mode`` stays in the observation: routes read it. Two observation keys of other projects become openpi's (:func:`openpi_keys`).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pi0.errors import MessageError

MAX_BATCH = 256
"""Observations that one request may hold."""

MAX_SESSION_ID_CHARS = 256

_FIRST_EXTERNAL = "observation/exterior_image_0_left"
_EXTERNAL = re.compile(r"(observation/exterior_image_)(\d)(_(?:left|right))")

_ECHOED = ("request_id", "obs_index")
_OWN = frozenset({"endpoint", "session_id", "session_ids", "reset", "replan", "seed", "sampling_params", "deadline_ms", *_ECHOED})


@dataclass(frozen=True, slots=True)
class Row:
    """One observation to act on.

    Attributes:
        observation: what the policy gets; may still have ``mode``.
        session_id: None: the connection's own, anonymous session.
        begins: whether the session begins anew with it.
        replan: whether it needs a new subtask.
        seed: of the action noise; None: fresh noise.
        deadline_ms: from the request's arrival; None: no deadline.
        echo: what the reply repeats.
    """

    observation: dict[str, Any]
    session_id: str | None = None
    begins: bool = False
    replan: bool = False
    seed: int | None = None
    deadline_ms: float | None = None
    echo: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One observation, or (``batched``) a list of them for one reply with a leading batch axis."""

    rows: tuple[Row, ...]
    batched: bool = False


@dataclass(frozen=True, slots=True)
class ResetRequest:
    """Forget what is remembered of these sessions; None: of the connection's own."""

    session_ids: tuple[str, ...] | None = None
    echo: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MetadataRequest:
    """Asks who serves."""


Request = InferRequest | ResetRequest | MetadataRequest


def parse_request(value: Any) -> InferRequest | ResetRequest:
    """One decoded message → its request.

    Raises:
        MessageError: it is no map, or one of the server's own keys is wrong.
    """
    if not isinstance(value, dict):
        raise MessageError(f"the request is a {type(value).__name__}, expected a map of observation keys to values")
    if len(value) == 1 and isinstance(value.get("batch"), list):
        return InferRequest(tuple(_batch_rows(value["batch"])), batched=True)
    if value.keys().isdisjoint(_OWN):
        return InferRequest((Row(openpi_keys(value)),))
    endpoint = value.get("endpoint", "infer")
    if _is_text(endpoint, "reset"):
        return ResetRequest(_reset_sessions(value), _echo(value))
    if not _is_text(endpoint, "infer"):
        raise MessageError(f"endpoint: got {_short(endpoint)}, expected infer or reset")
    return InferRequest((_row(value),))


def openpi_keys(observation: dict[str, Any]) -> dict[str, Any]:
    """``observation`` with the names that openpi's policies know; the same object where nothing has to change.

    RoboArena's clients count external cameras from 0, openpi's only one is number 1: where there is a camera 0, every number grows by
    one, or the policy would see through the wrong camera. A ``task`` without a ``prompt`` is the prompt (molmospaces), or a
    default prompt would be done instead of it.
    """
    counts_from_zero = _FIRST_EXTERNAL in observation
    if not counts_from_zero and ("prompt" in observation or "task" not in observation):
        return observation
    renamed: dict[str, Any] = {}
    for key, value in observation.items():
        if counts_from_zero and isinstance(key, str) and (match := _EXTERNAL.fullmatch(key)):
            key = f"{match[1]}{int(match[2]) + 1}{match[3]}"
        elif key == "task" and "prompt" not in observation:
            key = "prompt"
        renamed[key] = value
    return renamed


def _batch_rows(rows: list[Any]) -> list[Row]:
    if not 0 < len(rows) <= MAX_BATCH:
        remedy = "; split it into several requests" if rows else ""
        raise MessageError(f"batch: has {len(rows)} observations, expected 1 to {MAX_BATCH}{remedy}")
    parsed = []
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise MessageError(f"batch[{index}]: is a {type(row).__name__}, expected a map of observation keys to values")
        if not _is_text(row.get("endpoint", "infer"), "infer"):
            raise MessageError(f"batch[{index}].endpoint: got {_short(row['endpoint'])}, expected infer; send a reset by itself")
        try:
            parsed.append(_row(row))
        except MessageError as error:
            raise MessageError(f"batch[{index}].{error}") from None
    return parsed


def _row(value: dict[str, Any]) -> Row:
    if "session_ids" in value:
        raise MessageError("session_ids: goes with endpoint reset; an observation has one session_id")
    return Row(
        observation=openpi_keys({key: item for key, item in value.items() if key not in _OWN}),
        session_id=_session_id(value.get("session_id")),
        begins=_flag(value, "reset"),
        replan=_flag(value, "replan"),
        seed=_seed(value),
        deadline_ms=_deadline_ms(value.get("deadline_ms")),
        echo=_echo(value),
    )


def _reset_sessions(value: dict[str, Any]) -> tuple[str, ...] | None:
    listed = value.get("session_ids")
    if listed is not None and not isinstance(listed, list):
        raise MessageError(f"session_ids: got {_short(listed)}, expected a list of session ids, or null for all of this connection")
    ids = [] if listed is None else [_session_id(item, f"session_ids[{index}]") for index, item in enumerate(listed)]
    if None in ids:
        raise MessageError(f"session_ids[{ids.index(None)}]: is null, expected a session id")
    single = _session_id(value.get("session_id"))
    known = [id_ for id_ in (*ids, single) if id_ is not None]
    return None if listed is None and single is None else tuple(dict.fromkeys(known))


def _session_id(value: Any, key: str = "session_id") -> str | None:
    if value is None:
        return None
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()  # RoboArena's own client sends an array of one number
    try:
        if _is_bool(value):
            raise TypeError
        text = value if isinstance(value, str) else str(operator.index(value))
    except TypeError:
        raise MessageError(f"{key}: got {_short(value)}, expected text or a whole number") from None
    if not 0 < len(text) <= MAX_SESSION_ID_CHARS:
        raise MessageError(f"{key}: has {len(text)} characters, expected 1 to {MAX_SESSION_ID_CHARS}")
    return text


def _flag(value: dict[str, Any], key: str) -> bool:
    flag = value.get(key, False)
    if not _is_bool(flag):
        raise MessageError(f"{key}: got {_short(flag)}, expected true or false")
    return bool(flag)


def _seed(value: dict[str, Any]) -> int | None:
    params = value.get("sampling_params")
    if params is None:
        return _whole("seed", value.get("seed"))
    if not isinstance(params, dict):
        raise MessageError(f"sampling_params: got {_short(params)}, expected a map")
    if unknown := [key for key in params if key != "seed"]:
        raise MessageError(f"sampling_params: {_short(unknown[0])} cannot be set per request; only seed can")
    given = {_whole("seed", value.get("seed")), _whole("sampling_params.seed", params.get("seed"))} - {None}
    if len(given) > 1:
        raise MessageError("seed: differs from sampling_params.seed; send one of them")
    return next(iter(given), None)


def _whole(key: str, value: Any) -> int | None:
    if value is None:
        return None
    try:
        if _is_bool(value):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise MessageError(f"{key}: got {_short(value)}, expected a whole number from 0 to 2**63 - 1") from None
    if not 0 <= number < 1 << 63:
        raise MessageError(f"{key}: got {_short(number)}, expected a whole number from 0 to 2**63 - 1")
    return number


def _deadline_ms(value: Any) -> float | None:
    if value is None:
        return None
    try:
        if isinstance(value, str | bytes) or _is_bool(value):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise MessageError(f"deadline_ms: got {_short(value)}, expected a number of milliseconds above 0")
    return number


def _echo(value: dict[str, Any]) -> dict[str, Any]:
    echo = {key: value[key] for key in _ECHOED if value.get(key) is not None}
    for key, item in echo.items():
        if isinstance(item, np.generic):
            echo[key] = item = item.item()
        if not isinstance(item, str | int | float) or (isinstance(item, str) and len(item) > MAX_SESSION_ID_CHARS):
            raise MessageError(f"{key}: got {_short(item)}, expected a number or a text of at most {MAX_SESSION_ID_CHARS} characters")
    return echo


def _is_text(value: Any, text: str) -> bool:
    return isinstance(value, str) and value == text  # an array compares its elements


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")  # NumPy's, by its name in NumPy 2 and 1, is none of Python's


def _short(value: object) -> str:
    text = " ".join((repr(value) if isinstance(value, str | bytes | int | float) else type(value).__name__).split())
    return text if len(text) <= 60 else text[:57] + "..."
