"""The record that Tandem leaves in every directory it fetched: where it came from, and the size and hash of each file.

It answers two questions without a network: is the directory complete, and is every file in it one that we put there (only
then may the directory ever be removed)?
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pi0.errors import CheckpointError
from pi0.progress import Progress, no_progress

MANIFEST = "manifest.json"
"""The record's name in a prepared checkpoint."""

CACHE_MANIFEST = ".tandem-manifest.json"
"""The record's name in a cached remote directory, which may well have a ``manifest.json`` of its own."""

_FORMAT = "tandem-manifest/1"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and lower-case hex SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a directory was made from (``source``) and what is in it (``files``, by path relative to the directory, with ``/``)."""

    source: Mapping[str, str]
    files: Mapping[str, FileRecord]
    created_by: str

    @property
    def total_bytes(self) -> int:
        """Sum of the sizes of all files."""
        return sum(record.size for record in self.files.values())

    def problems(self, directory: Path) -> list[str]:
        """The files that are missing from ``directory`` or have another size, each with what is wrong with it."""
        found = []
        for name, record in self.files.items():
            path = directory / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size != record.size:
                found.append(f"{name} has {path.stat().st_size} bytes, expected {record.size}")
        return found

    def covers(self, directory: Path, name: str) -> bool:
        """Whether every file in ``directory`` is listed here with its size; the record itself, called ``name``, aside."""
        return all(
            relative == name or (relative in self.files and path.stat().st_size == self.files[relative].size) for relative, path in _files(directory)
        )

    def save(self, directory: Path, name: str) -> None:
        """Writes the record as ``<directory>/<name>``."""
        content = {
            "format": _FORMAT,
            "created_by": self.created_by,
            "source": dict(self.source),
            "files": {path: asdict(record) for path, record in sorted(self.files.items())},
        }
        (directory / name).write_text(json.dumps(content, indent=1) + "\n")


def load_manifest(directory: Path, name: str) -> Manifest | None:
    """The record ``<directory>/<name>``; ``None`` when there is none or the file is not one of ours."""
    try:
        content = json.loads((directory / name).read_text())
        if content["format"] != _FORMAT:
            return None
        files = {str(path): FileRecord(int(record["size"]), str(record["sha256"])) for path, record in content["files"].items()}
        return Manifest(dict(content["source"]), files, str(content["created_by"]))
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None


def describe(directory: Path, source: Mapping[str, str], *, progress: Progress = no_progress) -> Manifest:
    """Hashes every file of ``directory``.

    Raises:
        CheckpointError: the directory holds something that is neither a file nor a directory.
    """
    entries = list(_files(directory))
    total = sum(path.stat().st_size for _, path in entries)
    done = 0
    files = {}
    for relative, path in entries:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                done += len(block)
                progress(done, total, "hashing")
        files[relative] = FileRecord(path.stat().st_size, digest.hexdigest())
    return Manifest(source, files, f"tandem-vla {_version()}")


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path} is neither a file nor a directory, so {directory} is not something Tandem fetched")
        if path.is_file():
            yield path.relative_to(directory).as_posix(), path


def _version() -> str:
    try:
        return importlib.metadata.version("tandem-vla")
    except importlib.metadata.PackageNotFoundError:
        return "(source tree, not installed)"
