"""What all tests share."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

_CACHE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """What servers keep for their next start, compiled programs above all, is kept for the tests after them, and not in the user's home:
    one home for each of pytest-xdist's workers, with the programs of all.

    JAX reads its options when it is first imported, which is while tests are collected.
    """
    worker = getattr(config, "workerinput", None)
    config.stash[_CACHE] = directory = worker["cache"] if worker else tempfile.mkdtemp(prefix="tandem-tests-")
    home, compiled = Path(directory, worker["workerid"] if worker else "home"), Path(directory, "compiled")
    (home / "tandem").mkdir(parents=True)
    compiled.mkdir(exist_ok=True)
    (home / "tandem" / "compiled").symlink_to(compiled)
    os.environ["OPENPI_DATA_HOME"] = str(home)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """A worker of pytest-xdist is about to start."""
    node.workerinput["cache"] = node.config.stash[_CACHE]


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


def pytest_collection_finish() -> None:
    """Two frameworks and five thousand tests are loaded by now: the garbage collector need not look at them again and again, as in a service."""
    gc.collect()
    gc.freeze()
