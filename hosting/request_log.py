"""One log line per request: whose it was, how long it waited and ran, with how many others, and what came of it.

::

    action default session=robot-1 queue=0.2 ms infer=18.3 ms batch=4 total=19.1 ms ok
    action default session=robot-1 planner_queue=0.1 ms planner_infer=310.4 ms planner_batch=2 queue=0.2 ms infer=18.3 ms batch=1 total=329.8 ms ok
    action default session=- total=0.4 ms refused: observation: state: missing, …
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from hosting.calls import Served, Slot
from hosting.logs import one_line

logger = logging.getLogger("hosting.requests")

_PLAIN = re.compile(r"[\w.:@/+-]+", re.ASCII)
_SHOWN_CHARS = 80
"""How much of a name that a client made up is repeated."""


def log_request(
    *,
    slot: Slot,
    mode: str,
    session: str | None,
    transport: str,
    served: Sequence[Served],
    total_s: float,
    outcome: str,
    detail: str | None = None,
    request_id: str | float | None = None,
) -> None:
    """One line at INFO on ``hosting.requests``; as JSON, with ``slot``, ``mode``, ``session``, ``transport``, ``queue_ms``, ``infer_ms``, ``batch``,
    ``total_ms``, ``outcome``, ``detail`` and ``request_id`` beside the message; those that do not apply are left out.

    Args:
        slot: the endpoint that it came to.
        mode: as for :meth:`hosting.observer.Observer.request`, or the client's own words.
        session: its id; None: the connection's own session.
        served: its calls. Those of another slot have that one's name before theirs (``planner_queue_ms``). Where a slot served several, as for
            the rows of a batched request, the longest wait, the longest model call and the largest batch are told.
        total_s: from its arrival to its answer.
        outcome: ``ok``, ``cancelled``, or a failure's code.
        detail: what the client was told of the failure.
        request_id: the client's own name for it.
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    mode = _cut(mode)  # nobody has bounded it yet
    fields: dict[str, Any] = {"slot": slot, "mode": mode, "session": session, "transport": transport}
    words = [slot, _name(mode), "session=-" if session is None else f"session={_name(session)}"]
    # The endpoint's own calls last: they are what the planner's were made for.
    for place in ("planner", "action") if slot == "action" else ("action", "planner"):
        calls = [call for call in served if call.slot == place]
        if not calls:
            continue
        prefix = "" if place == slot else f"{place}_"
        queue_ms, infer_ms = max(call.queue_s for call in calls) * 1e3, max(call.infer_s for call in calls) * 1e3
        batch = max(call.batch for call in calls)
        fields |= {f"{prefix}queue_ms": round(queue_ms, 3), f"{prefix}infer_ms": round(infer_ms, 3), f"{prefix}batch": batch}
        words.append(f"{prefix}queue={queue_ms:.1f} ms {prefix}infer={infer_ms:.1f} ms {prefix}batch={batch}")
    fields |= {"total_ms": round(total_s * 1e3, 3), "outcome": outcome}
    words.append(f"total={total_s * 1e3:.1f} ms")
    if request_id is not None:
        fields["request_id"] = str(request_id)
        words.append(f"request_id={_name(str(request_id))}")
    if detail is None:
        words.append(outcome)
    else:
        fields["detail"] = detail
        words.append(f"{'failed' if outcome == 'internal' else 'refused'}: {outcome}: {one_line(detail)}")
    logger.info("%s", " ".join(words), extra={"fields": fields})


def _name(text: str) -> str:
    """A word that a client made up, quoted unless it could be nothing but one word of the line."""
    short = _cut(text)
    return short if _PLAIN.fullmatch(short) else repr(short)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
