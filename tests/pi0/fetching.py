"""What the tests of fetching share: golden checkpoints as archives, and children that die at a chosen moment."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.golden_data import CHECKPOINTS

ROOT = Path(__file__).parents[2]
ORBAX = CHECKPOINTS / "pi05_orbax"
LEROBOT = CHECKPOINTS / "pi05_lerobot"


def tar_of(directory: Path, wrapper: str = "99") -> bytes:
    """A tar of ``directory`` under one wrapper directory, as the subtask checkpoint is published."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(directory, wrapper)
    return buffer.getvalue()


def directory_files(directory: Path) -> dict[str, bytes]:
    """Content by path relative to ``directory``."""
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def leftovers(directory: Path) -> set[str]:
    """Names in ``directory`` other than lock files."""
    return {path.name for path in directory.iterdir() if path.suffix != ".lock"}


def start_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A child that runs ``code`` in the repository with this process's environment."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
