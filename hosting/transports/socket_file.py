"""The file of a Unix socket: claimed without harming anybody's, and removed when it is still ours."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from pathlib import Path

from hosting.policy import ConfigError

logger = logging.getLogger(__name__)

_there: set[SocketFile] = set()
"""Files of sockets that listen."""


class SocketFile:
    """A listening Unix socket at ``path``. What a server that is gone has left there is removed, nothing else.

    Args:
        path: its directory must exist.
        mode: permission bits from the moment the file exists. To connect takes write permission.
        backlog: how many clients may wait to be accepted.

    Raises:
        ConfigError: the path cannot be had; names it and the reason.
    """

    def __init__(self, path: Path, *, mode: int, backlog: int) -> None:
        self._path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _remove_if_stale(path)
            # Not chmod() afterwards: somebody else could connect in between.
            umask = os.umask(0o777 & ~mode)
            try:
                self.socket.bind(os.fspath(path))
            finally:
                os.umask(umask)
            self.socket.listen(backlog)
            self._identity = _identity(path)
            _there.add(self)
        except ConfigError:
            self.socket.close()
            raise
        except (OSError, ValueError) as error:  # the latter for a name that no file can have
            self.socket.close()
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"unix socket {path}: cannot listen there ({reason}); choose another unix_socket_path") from error

    def remove(self) -> None:
        """Remove the file, unless it is another's by now."""
        _there.discard(self)
        if self._identity is not None and _identity(self._path) == self._identity:
            self._path.unlink(missing_ok=True)
            self._identity = None  # the number may be given to another file


def remove_all() -> None:
    """Remove the files of all sockets of this process, which is about to end without closing them."""
    for file in list(_there):
        file.remove()


def _remove_if_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"unix socket {path}: there is something that is no socket; move it away or choose another unix_socket_path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        error = probe.connect_ex(os.fspath(path))
    if error == errno.ECONNREFUSED:
        logger.warning("unix socket %s: removed what a server that is gone had left", path)
        path.unlink(missing_ok=True)
    elif error in (0, errno.EAGAIN):  # the latter when its queue is full
        raise ConfigError(f"unix socket {path} is in use by another server; stop it or choose another unix_socket_path")
    elif error != errno.ENOENT:
        raise OSError(error, os.strerror(error))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
