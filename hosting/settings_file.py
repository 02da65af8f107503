"""The prompt settings on disk: read at the start, written whole after every change, so that edits survive a restart."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from hosting import strict_json
from hosting.config_problems import shown
from hosting.templates import EDITABLE, HISTORY, PromptSettings, Revision
from pi0.errors import ConfigError, TandemError

logger = logging.getLogger(__name__)

FORMAT: Final = "tandem-prompt-settings/1"

_TYPES: Final[Mapping[str, type]] = {
    "revision": int,
    "changed_at": str,
    "source": str,
    "generation_prompt_format": str,
    "action_prompt_template": str,
    "max_generation_tokens": int,
}
_SOURCE: Final = re.compile("start|update|rollback to [0-9]+")
_KINDS: Final = {int: "an integer", str: "a string"}
_REMEDY: Final = "correct it, or move it away to begin with the configuration's values"


class SettingsFileError(TandemError):
    """The settings cannot be written; what the file held before is still in it. The message is one line that says why."""


class SettingsFile:
    """A JSON file with the history of the prompt settings, the revision in force last. Nobody else may write it while the service runs.

    Args:
        path: the file, ``~`` for the user's home; it need not exist, its directory must.
        field: the configuration's name of the path.
    """

    def __init__(self, path: Path, *, field: str = "admin.settings_file") -> None:
        self.path = Path(os.path.expanduser(path))
        self._field = field
        self._known: tuple[int, int, int] | None = None

    def load(self) -> tuple[Revision, ...]:
        """The history, the oldest revision first; empty where there is no file yet.

        Raises:
            ConfigError: there is no directory for it that this process can write, or the file cannot be read or is not one of ours.
        """
        target = self._target()
        if not target.parent.is_dir():
            raise ConfigError(f"{self._field}: {self.path}: there is no directory {target.parent}; create it, or choose another path")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise ConfigError(f"{self._field}: {self.path}: {target.parent} cannot be written; choose a directory that this user can write")
        if target.exists() and not target.is_file():
            raise ConfigError(f"{self._field}: {self.path} is a directory or a device; give the path of a file")
        try:
            content = target.read_bytes()
            self._known = _identity(target)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise ConfigError(f"{self._field}: {self.path} cannot be read ({error.strerror}); give a file that this user can read") from error
        try:
            return _parsed(content)
        except (ValueError, ConfigError) as error:
            reason = "; ".join(str(error).splitlines())
            raise ConfigError(f"{self._field}: {self.path} is no file of prompt settings: {reason}; {_REMEDY}") from error

    def save(self, revisions: Sequence[Revision]) -> None:
        """Replace the file's content, on the disk when this returns; the file is readable by its owner only.

        Raises:
            SettingsFileError: it cannot be written, or something else has written it since.
        """
        target = self._target()
        document = {"format": FORMAT, "revisions": [_entry(revision) for revision in revisions]}
        content = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            if (found := _identity(target)) is not None and found != self._known:
                raise SettingsFileError(
                    f"{self.path} has been written by something else since this process read it; nothing is changed. "
                    "Restart the service to take its values, or move it away"
                )
            with contextlib.ExitStack() as stack:
                directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
                stack.callback(os.close, directory)
                temporary.unlink(missing_ok=True)
                stack.callback(temporary.unlink, missing_ok=True)
                with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                    replacing = os.fstat(file.fileno())
                temporary.replace(target)
                self._known = (replacing.st_ino, replacing.st_size, replacing.st_mtime_ns)
                _sync_directory(directory, target)
        except OSError as error:
            raise SettingsFileError(f"{self.path} cannot be written ({error.strerror or error}); nothing is changed") from error

    def _target(self) -> Path:
        """The file itself where the path is a link to it: a rename would replace the link."""
        return Path(os.path.realpath(self.path))


def _sync_directory(directory: int, target: Path) -> None:
    # The new content is in place: what is left is only whether the rename survives a power cut, which some file systems cannot be asked for.
    try:
        os.fsync(directory)
    except OSError as error:
        logger.warning("%s: the change may not survive a power cut (%s)", target, error.strerror)


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _entry(revision: Revision) -> dict[str, Any]:
    return {
        "revision": revision.settings.revision,
        "changed_at": revision.changed_at,
        "source": revision.source,
        **revision.settings.values,
    }


def _parsed(content: bytes) -> tuple[Revision, ...]:
    """The history in ``content``.

    Raises:
        ValueError: it is not ours, or a value is of the wrong type.
        ConfigError: a setting is wrong.
    """
    try:
        document = strict_json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(document, dict) or document.keys() != {"format", "revisions"}:
        raise ValueError(f'expected an object with "format" and "revisions", got {shown(document)}')
    if document["format"] != FORMAT:
        raise ValueError(f'format: expected "{FORMAT}", got {shown(document["format"])}')
    entries = document["revisions"]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"revisions: expected a list with at least one entry, got {shown(entries)}")
    revisions: list[Revision] = []
    for index, entry in enumerate(entries):
        try:
            revisions.append(_revision(entry))
        except (ValueError, ConfigError) as error:
            raise ValueError("; ".join(f"revisions[{index}]: {line}" for line in str(error).splitlines())) from None
        if index and revisions[-1].settings.revision <= (before := revisions[-2].settings.revision):
            raise ValueError(f"revisions[{index}]: revision: expected more than {before}, which is before it, got {entry['revision']}")
    return tuple(revisions[-HISTORY:])


def _revision(entry: object) -> Revision:
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, got {shown(entry)}")
    for name in entry.keys() - _TYPES.keys():
        raise ValueError(f"{name}: unknown field; known here: {', '.join(_TYPES)}")
    for name, kind in _TYPES.items():
        if name not in entry:
            raise ValueError(f"{name}: missing")
        if type(entry[name]) is not kind:
            raise ValueError(f"{name}: expected {_KINDS[kind]}, got {shown(entry[name])}")
    if entry["revision"] < 1:
        raise ValueError(f"revision: expected an integer of at least 1, got {entry['revision']}")
    try:
        datetime.fromisoformat(entry["changed_at"])
    except ValueError:
        raise ValueError(f'changed_at: expected an ISO 8601 time such as "2026-01-31T12:00:00.000Z", got {shown(entry["changed_at"])}') from None
    if not _SOURCE.fullmatch(entry["source"]):
        raise ValueError(f'source: expected "start", "update" or "rollback to" and a number, got {shown(entry["source"])}')
    settings = PromptSettings(**{name: entry[name] for name in EDITABLE}, revision=entry["revision"])
    return Revision(settings, entry["changed_at"], entry["source"])
