"""Log lines for people or for machines."""

from __future__ import annotations

import json
import logging
import sys
from typing import Literal


class JSONFormatter(logging.Formatter):
    """One JSON object per line: ``time``, ``level``, ``logger``, ``message``, the record's ``fields`` if any, and, with an exception, ``traceback``.

    All ASCII: what strangers sent can neither end the line nor reach a terminal as an escape sequence.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def one_line(text: str) -> str:
    """``text`` as it may be shown to people: on one line, and nothing in it that a terminal would obey."""
    joined = " ".join(text.split())
    return joined if joined.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in joined)


def configure(log_format: Literal["plain", "json"], *, level: int = logging.INFO, requests: bool = True) -> None:
    """Send this process's logs to standard error; ``requests``: with a line for each request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JSONFormatter() if log_format == "json" else logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Their start-up chatter says nothing that our own lines do not.
    for noisy in ("uvicorn", "httpx", "httpx2", "httpcore", "jax", "absl", "fsspec", "asyncio"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))
    logging.getLogger("hosting.requests").setLevel(level if requests else max(level, logging.WARNING))
