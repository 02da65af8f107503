"""An emulated link for a test, which is skipped where there can be none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.link.emulator import EmulatedLink, LinkUnavailableError, emulated_link


@contextmanager
def link_or_skip(
    *, rtt_ms: float = 1, loss_percent: float = 0, rate_mbit: float = 1000, queue_packets: int = 1000, seed: int = 1
) -> Iterator[EmulatedLink]:
    try:
        link = emulated_link(rtt_ms=rtt_ms, loss_percent=loss_percent, rate_mbit=rate_mbit, queue_packets=queue_packets, seed=seed)
        entered = link.__enter__()
    except LinkUnavailableError as error:
        pytest.skip(f"no emulated link: {error}")
    try:
        yield entered
    finally:
        link.__exit__(None, None, None)
