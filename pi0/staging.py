"""Puts a finished directory in place of another one so that no moment of failure loses or half-writes either.

Around a target ``<name>`` there may be, all beside it and on the same volume:

- ``<name>.lock``: held while anyone works on the target, so that several processes fetch once. It stays (it is empty).
- ``<name>.partial-tandem``: work in progress, ours to throw away. A killed run leaves it; the next one reuses what is whole.
- ``<name>.partial-ready``: the finished directory just before the swap; ours as well.
- ``<name>.replaced-tandem``: the old target between the swap and its removal. A killed run leaves it; the next one sorts it out.
- ``<name>.bak-<time>``: an old target in which something is not ours. Never removed by us.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pi0.errors import CheckpointError
from pi0.manifest import load_manifest
from pi0.progress import readable_size

logger = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the lock of ``target``, whose directory is made when missing, and cleans up after a run that was killed.

    Raises:
        CheckpointError: the directory that should hold ``target`` cannot be written.
    """
    import filelock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The whole name plus a suffix: replacing the suffix would make x.v1 and x.v2 share one lock.
        lock = filelock.FileLock(beside(target, "lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.info("another process is fetching %s; waiting for it", target)
            lock.acquire()
    except OSError as error:
        raise CheckpointError(f"cannot write beside {target}: {error.strerror or error}; choose a directory you may write to") from error
    try:
        yield
    finally:
        lock.release()


def beside(target: Path, suffix: str) -> Path:
    """``<target>.<suffix>``."""
    return target.with_name(f"{target.name}.{suffix}")


def partial(target: Path) -> Path:
    """Where work on ``target`` goes on. Whoever holds the lock owns it."""
    return beside(target, "partial-tandem")


def content(target: Path) -> Path:
    """The directory inside :func:`partial` that is to become the target."""
    return partial(target) / "content"


def tidy(target: Path, manifest_name: str) -> None:
    """Removes what a killed run left beside a complete ``target``, unless another process is at work on it."""
    import filelock

    if not any(path.exists() for path in (partial(target), _ready(target), _replaced(target))):
        return
    try:
        with filelock.FileLock(beside(target, "lock"), timeout=0):
            recover(target, manifest_name)
            _remove(partial(target))
    except filelock.Timeout:
        return
    except OSError as error:
        # The checkpoint itself is fine, and it may well be on a volume that this user can only read.
        logger.warning("cannot remove what an interrupted run left beside %s: %s", target, error)


def recover(target: Path, manifest_name: str) -> None:
    """Finishes the swap of a run that was killed in the middle of :func:`publish`. Needs the lock."""
    _remove(_ready(target))
    replaced = _replaced(target)
    if replaced.exists():
        if target.exists():
            _dispose(replaced, target, manifest_name)
        else:
            replaced.rename(target)


def publish(target: Path, manifest_name: str) -> None:
    """Makes :func:`content` the target and removes :func:`partial`. Needs the lock.

    An old target is removed if it holds nothing but files listed in its own record ``manifest_name``, else it is kept as
    ``<name>.bak-<time>``. Where the system can exchange two directories in one step (Linux), there is no moment without a
    target; elsewhere :func:`recover` puts the old one back after a crash between the two renames.
    """
    new, replaced = _ready(target), _replaced(target)
    content(target).rename(new)
    _remove(partial(target))
    if not target.exists():
        new.rename(target)
        return
    new.rename(replaced)
    if not exchange(replaced, target):
        replaced.rename(new)
        target.rename(replaced)
        try:
            new.rename(target)
        except BaseException:
            replaced.rename(target)
            raise
    _dispose(replaced, target, manifest_name)


def exchange(first: Path, second: Path) -> bool:
    """Swaps two paths in one atomic step; ``False`` where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        renameat2: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def require_space(directory: Path, needed_bytes: int) -> None:
    """Requires that many free bytes on the volume of ``directory``.

    Raises:
        CheckpointError: there are fewer.
    """
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{directory} has {readable_size(free)} free, but {readable_size(needed_bytes)} are needed; free some space or choose another directory"
        )


def set_aside(path: Path, target: Path) -> None:
    """Keeps ``path`` as ``<target>.bak-<time>``."""
    backup = beside(target, f"bak-{datetime.now(UTC):%Y%m%dT%H%M%S%f}")
    path.rename(backup)
    logger.warning("kept the old %s as %s, because it holds files that Tandem did not fetch or that have changed", target, backup)


def _dispose(replaced: Path, target: Path, manifest_name: str) -> None:
    if _is_ours(replaced, manifest_name):
        # Under this name it may be removed whatever is left of it, so a run killed during the removal leaves no riddle.
        trash = partial(target)
        _remove(trash)
        replaced.rename(trash)
        _remove(trash)
    elif replaced.is_dir() and not any(replaced.iterdir()):
        replaced.rmdir()
    else:
        set_aside(replaced, target)


def _ready(target: Path) -> Path:
    return beside(target, "partial-ready")


def _replaced(target: Path) -> Path:
    return beside(target, "replaced-tandem")


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def _is_ours(directory: Path, manifest_name: str) -> bool:
    manifest = load_manifest(directory, manifest_name)
    if manifest is None:
        return False
    try:
        return manifest.covers(directory, manifest_name)
    except CheckpointError:
        return False
