"""Remote directories as one thing: a list of files with sizes, fetched in parallel, verified, nothing left half-written."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pi0.archive import safe_parts
from pi0.errors import CheckpointError, DownloadError
from pi0.progress import Progress, no_progress, readable_size
from pi0.staging import require_space

logger = logging.getLogger(__name__)

OnBytes = Callable[[int], None]

BUCKET_SCHEMES = {"gs": "gcs", "s3": "s3"}
"""Scheme → the extra of this distribution that brings its client."""

_PARALLEL = 8
_BLOCK = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """One file of a remote directory.

    Attributes:
        path: relative to the directory, with ``/``.
        size: bytes.
        digest: (``sha256`` or ``md5``, lower-case hex) of the content, where the remote side tells it.
        version: changes when the content does (ETag, generation, blob id).
    """

    path: str
    size: int
    digest: tuple[str, str] | None
    version: str


class Source(Protocol):
    """Where :func:`download` gets files from; ``str()`` of it is shown in errors."""

    @property
    def files(self) -> Sequence[RemoteFile]: ...

    def fetch(self, file: RemoteFile, scratch: Path, on_bytes: OnBytes) -> Path:
        """Downloads ``file`` to some path under ``scratch`` and returns it; raises :class:`DownloadError`."""
        ...


class Bucket:
    """The files below a ``gs://`` or ``s3://`` URI, or in a local directory, through fsspec.

    Public buckets need no credentials: ``gs://`` is read anonymously first and with the default credentials when that is
    denied, ``s3://`` the other way round.

    Raises:
        CheckpointError: the client package is not installed.
        DownloadError: there is nothing at the URI, no access, or no connection.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        denied: list[str] = []
        logger.info("looking up %s", self.uri)
        for options in _credentials(self.uri.partition("://")[0]):
            try:
                self._fs = _filesystem(self.uri, options)
                self._root = str(self._fs._strip_protocol(self.uri)).rstrip("/")
                listing = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                listing = {}
            except CheckpointError:
                raise
            except Exception as error:
                if not _is_denied(error):
                    raise DownloadError(f"cannot list {self.uri}: {_first_line(error)}; check the network, then run it again") from error
                denied.append(_first_line(error))
                continue
            # Consoles represent a folder by an empty object whose name ends in a slash.
            objects = {name: info for name, info in sorted(listing.items()) if info["type"] == "file" and not name.endswith("/")}
            self.files = tuple(self._remote_file(name, info) for name, info in objects.items())
            if not self.files:
                raise DownloadError(f"nothing at {self.uri}; check the bucket and the path")
            return
        raise DownloadError(f"no access to {self.uri}, neither anonymously nor with this machine's credentials ({denied[-1]})")

    def __str__(self) -> str:
        return self.uri

    def fetch(self, file: RemoteFile, scratch: Path, on_bytes: OnBytes) -> Path:
        """Downloads ``file`` to a path of its own under ``scratch``."""
        from fsspec.callbacks import Callback

        class Reporting(Callback):  # type: ignore[misc]
            def relative_update(self, inc: int = 1) -> None:
                on_bytes(inc)

        destination = scratch / hashlib.sha256(file.path.encode()).hexdigest()
        try:
            # A URI that names one object lists that object, under an empty relative path.
            self._fs.get_file(f"{self._root}/{file.path}" if file.path else self._root, str(destination), callback=Reporting())
        except Exception as error:
            # The backends raise types of a dozen libraries. None may pass for a finished transfer.
            raise DownloadError(f"cannot fetch {self.uri}/{file.path}: {_first_line(error)}; run it again") from error
        return destination

    def _remote_file(self, name: str, info: dict[str, Any]) -> RemoteFile:
        relative = name.removeprefix(self._root).lstrip("/")
        safe_parts(relative, f"{self.uri}: object {name!r}")
        version = next((str(info[key]) for key in ("generation", "etag", "ETag", "mtime", "created") if info.get(key)), "")
        return RemoteFile(relative, int(info["size"]), _md5(info.get("md5Hash")), version)


def download(source: Source, files: Iterable[RemoteFile], into: Path, *, progress: Progress = no_progress, label: str) -> None:
    """Fetches ``files`` of ``source`` to ``into/<path>``. Files of an earlier, interrupted call that are whole are kept.

    Each file appears under its name only after size and, where the remote side tells it, hash are right. ``into`` and its
    siblings ``<into>.plan`` and ``<into>.scratch`` must be the caller's to throw away.

    Raises:
        DownloadError: a transfer failed or does not verify. What is complete stays in ``into`` for the next call.
        CheckpointError: there is not enough space.
    """
    wanted = sorted(files, key=lambda file: file.path)
    _start_or_resume(into, wanted)
    missing = [file for file in wanted if not _is_whole(into / file.path, file)]
    total = sum(file.size for file in wanted)
    done = total - sum(file.size for file in missing)
    require_space(into, total - done)
    scratch = into.with_name(f"{into.name}.scratch")
    scratch.mkdir(exist_ok=True)
    lock, stopped = threading.Lock(), threading.Event()
    progress(done, total, label)

    def on_bytes(count: int) -> None:
        nonlocal done
        if stopped.is_set():
            raise DownloadError(f"{source}: stopped, because another file failed")
        with lock:
            done += count
            progress(min(done, total), total, label)

    def fetch(file: RemoteFile) -> None:
        on_bytes(0)
        fetched = source.fetch(file, scratch, on_bytes)
        _verify(fetched, file, source)
        destination = into.joinpath(*safe_parts(file.path, f"{source}: file {file.path!r}"))
        destination.parent.mkdir(parents=True, exist_ok=True)
        fetched.replace(destination)

    with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="download") as pool:
        futures = [pool.submit(fetch, file) for file in missing]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failures = [error for future in finished if (error := future.exception()) is not None]
        finally:
            # An exception here is Ctrl-C: the transfers must end before the pool can.
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
    if failures:
        raise failures[0]
    shutil.rmtree(scratch)


def verify_digest(path: Path, digest: tuple[str, str], what: str) -> None:
    """Requires the content of ``path`` to have ``digest`` (algorithm, lower-case hex).

    Raises:
        DownloadError: it has another one.
    """
    algorithm, expected = digest
    actual = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            actual.update(block)
    if actual.hexdigest() != expected:
        raise DownloadError(f"{what} has {algorithm} {actual.hexdigest()}, expected {expected}: it was damaged on the way or is another file")


def _start_or_resume(into: Path, wanted: list[RemoteFile]) -> None:
    """Empties ``into`` unless it holds the beginning of exactly this download (same files, same versions)."""
    plan = json.dumps([[file.path, file.size, file.version] for file in wanted])
    note = into.with_name(f"{into.name}.plan")
    if not note.is_file() or note.read_text() != plan:
        if into.exists():
            shutil.rmtree(into)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(plan)
    into.mkdir(exist_ok=True)


def _is_whole(path: Path, file: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def _verify(path: Path, file: RemoteFile, source: Source) -> None:
    what = f"{source}: {file.path}"
    size = path.stat().st_size
    if size != file.size:
        path.unlink()
        raise DownloadError(f"{what} came with {size} bytes ({readable_size(size)}), expected {file.size}: the transfer was cut short; run it again")
    if file.digest is not None:
        try:
            verify_digest(path, file.digest, what)
        except DownloadError:
            path.unlink()
            raise


def _credentials(scheme: str) -> list[dict[str, Any]]:
    match scheme:
        case "gs":
            return [{"token": "anon"}, {"token": "google_default"}]
        case "s3":
            return [{"anon": False}, {"anon": True}]
        case _:
            return [{}]


def _filesystem(uri: str, options: dict[str, Any]) -> Any:
    scheme = uri.partition("://")[0] if "://" in uri else "file"
    try:
        import fsspec

        if scheme == "gs":
            # fsspec's own choice is a variant that first asks for the bucket's type over gRPC, for a minute where that is blocked.
            from gcsfs.core import GCSFileSystem

            # What it logs on its own is a traceback of the error that it then raises.
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
            return GCSFileSystem(skip_instance_cache=True, session_kwargs={"trust_env": True}, **options)
        # Not the cached instance: it would list what was there an hour ago.
        return fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError as error:
        extra = BUCKET_SCHEMES.get(scheme, "serve")
        raise CheckpointError(f'{scheme}:// locations need one more package: pip install "tandem-vla[{extra}]"') from error


def _is_denied(error: Exception) -> bool:
    return (
        isinstance(error, PermissionError)
        or getattr(error, "code", None) in (401, 403, "401", "403")
        or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
        or str(error).startswith("Forbidden")
    )


def _md5(encoded: object) -> tuple[str, str] | None:
    if not isinstance(encoded, str):
        return None
    try:
        return "md5", base64.b64decode(encoded, validate=True).hex()
    except binascii.Error:
        return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
