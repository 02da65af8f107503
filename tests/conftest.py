"""What all tests share."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Two frameworks and five thousand tests are loaded by now: the garbage collector need not look at them again and again, as in a service."""
    gc.collect()
    gc.freeze()
