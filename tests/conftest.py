"""What all tests share."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile

import pytest

_CACHE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """What servers keep for their next start, compiled programs above all, is kept for the tests after them, and not in the user's home.

    JAX reads its options when it is first imported, which is while tests are collected.
    """
    config.stash[_CACHE] = directory = tempfile.mkdtemp(prefix="tandem-tests-")
    os.environ["OPENPI_DATA_HOME"] = directory
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(directory, "tandem", "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


def pytest_collection_finish() -> None:
    """Two frameworks and five thousand tests are loaded by now: the garbage collector need not look at them again and again, as in a service."""
    gc.collect()
    gc.freeze()
