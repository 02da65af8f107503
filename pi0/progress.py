"""How long transfers tell what they have done so far: a callback, and two ways of showing it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

logger = logging.getLogger(__name__)

_UNKNOWN_TOTAL_STEP = 1 << 30
"""Without a known total, a log line is written for every so many bytes."""


class Progress(Protocol):
    """Called as work goes on; from several threads, one call at a time."""

    def __call__(self, done_bytes: int, total_bytes: int | None, label: str) -> None:
        """``done_bytes`` of ``total_bytes`` (``None``: not known) of the step called ``label`` are done."""
        ...


def no_progress(done_bytes: int, total_bytes: int | None, label: str) -> None:
    """A :class:`Progress` that shows nothing."""


@contextmanager
def show_progress() -> Iterator[Progress]:
    """A progress bar when stderr is a terminal, else a log line for every tenth of a step."""
    if not sys.stderr.isatty():
        yield LoggedProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(done_bytes: int, total_bytes: int | None, label: str) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total_bytes)
            bars.update(tasks[label], completed=done_bytes, total=total_bytes)

        yield show


class LoggedProgress:
    """A :class:`Progress` for logs: one line when a step begins, one for every tenth of it."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def __call__(self, done_bytes: int, total_bytes: int | None, label: str) -> None:
        step = done_bytes * 10 // total_bytes if total_bytes else done_bytes // _UNKNOWN_TOTAL_STEP
        if self._last.get(label) == step:
            return
        self._last[label] = step
        if total_bytes:
            logger.info("%s: %d %% of %s", label, step * 10, readable_size(total_bytes))
        else:
            logger.info("%s: %s", label, readable_size(done_bytes))


def readable_size(size: float) -> str:
    """``size`` bytes for people, e.g. ``12.4 GB`` (powers of 1000)."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
