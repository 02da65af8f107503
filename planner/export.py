"""Writes a parameter tree as an Orbax ``params/`` directory that openpi, openpi-flash and this project can restore."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint
from numpy.typing import NDArray


def write_params(directory: Path, leaves: Mapping[str, NDArray[np.floating[Any]]]) -> None:
    """``leaves`` (``/``-joined names, reference/model.md §8) → ``directory``, which must not exist yet.

    Raises:
        ValueError: ``directory`` exists.
    """
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *branches, leaf = name.split("/")
        at = tree
        for branch in branches:
            at = at.setdefault(branch, {})
        at[leaf] = value
    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(directory.resolve(), {"params": tree})
