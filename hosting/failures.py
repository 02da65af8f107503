"""What a client is told when its request fails, and what the log gets. No traceback leaves the process."""

from __future__ import annotations

import logging
import re
import secrets
from dataclasses import dataclass

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
    """What the client is told of ``error``; logs it."""
    passing = isinstance(error, RequestError | UnavailableError)
    code = re.sub("(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower() if passing else "internal"
    return Failure(code, client_text(error, slot=slot))


def client_text(error: BaseException, *, slot: str) -> str:
    """One line for the client: the message of an error that is its own or passing, else an id under which the log has the rest."""
    if isinstance(error, RequestError | UnavailableError):
        # A message may repeat a stranger's keys: no line breaks or terminal escapes of theirs get into the log or to the client.
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(error).split()))
        logger.info("%s: refused a request: %s", slot, text)
        return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 3] + "..."
    error_id = secrets.token_hex(4)
    logger.error("%s: a request failed, error id %s", slot, error_id, exc_info=error)
    return f"internal error {error_id}: the {slot} failed on this request; the server's log has the details under this id"
