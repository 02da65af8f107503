"""What a client is told when its request fails, and what the log gets. No traceback leaves the process."""

from __future__ import annotations

import logging
import re
import secrets
from dataclasses import dataclass

from hosting.logs import one_line
from hosting.policy import RequestError, UnavailableError

logger = logging.getLogger(__name__)

_MAX_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed request as its client sees it.

    Attributes:
        code: the kind of failure: the error's class in lower case without ``Error`` (``observation``, ``prompt_too_long``, ``overloaded``,
            ``deadline``, …), or ``internal``.
        text: one line for people.
    """

    code: str
    text: str


def failure(error: BaseException, *, slot: str) -> Failure:
    """What the client is told of ``error``. One that is the server's fault is logged; a refusal is part of the request's own line."""
    if not isinstance(error, RequestError | UnavailableError):
        return Failure("internal", client_text(error, slot=slot))
    code = re.sub("(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower()
    return Failure(code, _refusal(error))


def client_text(error: BaseException, *, slot: str) -> str:
    """One line for the client: the message of an error that is its own or passing, else an id under which the log has the rest. Logs it."""
    if isinstance(error, RequestError | UnavailableError):
        text = _refusal(error)
        logger.info("%s: refused: %s", slot, text)
        return text
    error_id = secrets.token_hex(4)
    logger.error("%s: a request failed, error id %s", slot, error_id, exc_info=error)
    return f"internal error {error_id}: the {slot} failed on this request; the server's log has the details under this id"


def _refusal(error: BaseException) -> str:
    # A message may repeat a stranger's keys: no line breaks or terminal escapes of theirs get into the log or to the client.
    text = one_line(str(error))
    return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 3] + "..."
