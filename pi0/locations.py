"""Where a checkpoint is: a local directory as it is, or a remote one as a verified copy in the local cache.

The cache keeps openpi's layout for buckets (``<data home>/<bucket>/<path>``), so checkpoints that openpi fetched are found.
A hub directory is kept as ``<data home>/hf/<organisation>/<name>@<revision>/<folder>``; no bucket name is as short as ``hf``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import urllib.parse
from collections.abc import Callable, Iterable
from pathlib import Path

from pi0.archive import safe_parts
from pi0.errors import CheckpointError, DownloadError
from pi0.hub import DEFAULT_REVISION, hub_tree
from pi0.manifest import CACHE_MANIFEST, describe, load_manifest
from pi0.orbax import OrbaxParams
from pi0.progress import Progress, no_progress
from pi0.remote import BUCKET_SCHEMES, Bucket, RemoteFile, Source, download, verify_digest
from pi0.staging import content, locked, partial, publish, recover, set_aside, tidy

logger = logging.getLogger(__name__)

TOKENIZER_URI = "gs://big_vision/paligemma_tokenizer.model"
TOKENIZER_SHA256 = "8986bb4f423f07f8c7f70d0dbe3526fb2316056c17bae71b1ea975e77a168fc6"  # reference/model.md §7.1
WEIGHTS = "model.safetensors"

_TRAINING_ONLY = "train_state/"
"""Optimizer state beside ``params/`` in training output, twice its size and of no use for inference."""


def default_data_home() -> Path:
    """The cache root: ``OPENPI_DATA_HOME``, else ``~/.cache/openpi`` (openpi's own default)."""
    return Path(os.environ.get("OPENPI_DATA_HOME") or "~/.cache/openpi").expanduser()


def resolve(uri: str | Path, *, data_home: Path, force_download: bool = False, progress: Progress = no_progress) -> Path:
    """The local directory of the checkpoint at ``uri``: a path, ``gs://``, ``s3://`` or ``hf://<org>/<name>[@revision][/folder]``.

    A complete cached copy is returned at once, without a network. Otherwise the files are fetched beside the cache entry,
    checked against the remote sizes and hashes, and moved into place; several processes fetch once. ``train_state/`` of
    training output is left out. ``force_download`` fetches again; the old copy stays until the new one is complete.

    Raises:
        CheckpointError: no such local directory, an unknown scheme, or what is there is not a checkpoint.
        DownloadError: fetching failed. The cache is as it was before.
    """
    scheme = _scheme(uri)
    if not scheme:
        path = Path(uri).expanduser().absolute()
        if not path.is_dir():
            raise CheckpointError(f"no such directory {path}" + (" (it is a file)" if path.exists() else "") + "; check the path of the checkpoint")
        return path
    target = cached_path(str(uri), data_home).resolve()
    if not force_download and cache_problem(target) is None:
        tidy(target, CACHE_MANIFEST)
        return target
    with locked(target):
        recover(target, CACHE_MANIFEST)
        problem = cache_problem(target)
        if problem is None and not force_download:
            return target
        if target.exists():
            reason = "as asked" if problem is None else f"the cached copy in {target} is not complete ({problem})"
            logger.warning("fetching %s again: %s", uri, reason)
        _fetch_checkpoint(str(uri), target, progress)
    return target


def cached_path(uri: str, data_home: Path) -> Path:
    """Where the cache keeps ``uri``, whether or not it is there yet.

    Raises:
        CheckpointError: the URI has an unknown scheme, no bucket or repository, or leaves the cache.
    """
    scheme, _, rest = uri.partition("://")
    rest = rest.strip("/")
    parts = safe_parts(rest, f"location {uri}")
    if scheme == "hf":
        repo, revision, folder = _hub_parts(uri)
        organisation, name = repo.split("/")
        return data_home.joinpath("hf", organisation, f"{name}@{urllib.parse.quote(revision, safe='')}", *safe_parts(folder, uri))
    if scheme not in BUCKET_SCHEMES:
        raise CheckpointError(f"{uri}: unknown scheme {scheme}://; expected a local path, gs://, s3:// or hf://")
    if not parts:
        raise CheckpointError(f"{uri} names no bucket; expected {scheme}://<bucket>/<path>")
    return data_home.joinpath(*parts)


def fetch_file(uri: str, *, data_home: Path, sha256: str | None = None, force_download: bool = False, progress: Progress = no_progress) -> Path:
    """The local copy of the single bucket object ``uri``, fetched on first use; its content must hash to ``sha256`` if given.

    Raises:
        CheckpointError: the URI is not that of a bucket object.
        DownloadError: fetching failed, or the hash is another one.
    """
    if _scheme(uri) not in BUCKET_SCHEMES:
        raise CheckpointError(f"{uri}: expected a gs:// or s3:// file")
    target = cached_path(uri, data_home).resolve()
    if not force_download and target.is_file() and _has_digest(target, sha256):
        return target
    with locked(target):
        if not force_download and target.is_file() and _has_digest(target, sha256):
            return target
        source = Bucket(uri)
        if [file.path for file in source.files] != [""]:
            raise CheckpointError(f"{uri} is a directory, expected a file")
        file = RemoteFile(target.name, source.files[0].size, source.files[0].digest, source.files[0].version)
        download(_OneFile(source, file), [file], content(target), progress=progress, label=target.name)
        if sha256 is not None:
            try:
                verify_digest(content(target) / target.name, ("sha256", sha256), uri)
            except DownloadError:
                shutil.rmtree(partial(target))
                raise
        if target.exists():
            set_aside(target, target)
        (content(target) / target.name).replace(target)
        shutil.rmtree(partial(target))
    return target


def cached_tokenizer(data_home: Path, *, progress: Progress = no_progress) -> Path:
    """The PaliGemma SentencePiece model, fetched on first use (4.3 MB, reference/model.md §7.1).

    Raises:
        DownloadError: it is not cached and cannot be fetched.
    """
    try:
        return fetch_file(TOKENIZER_URI, data_home=data_home, sha256=TOKENIZER_SHA256, progress=progress)
    except DownloadError as error:
        raise DownloadError(
            f"{error} (needed for the tokenizer; without a network, put paligemma_tokenizer.model into the checkpoint directory)"
        ) from error


def checkpoint_problem(directory: Path) -> str | None:
    """Why ``directory`` is not a complete checkpoint, ``None`` when it is. Opens every leaf but reads no weights."""
    try:
        if (directory / WEIGHTS).is_file():
            check_safetensors(directory / WEIGHTS)
        else:
            OrbaxParams(directory).shapes()
    except CheckpointError as error:
        return str(error)
    return None


def check_safetensors(path: Path) -> None:
    """Requires a safetensors file to have all the bytes that its header speaks of. Reads the header only.

    Raises:
        CheckpointError: it does not, or has no readable header.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            if not 0 < header_size <= size - 8:
                raise ValueError(f"a header of {header_size} bytes in a file of {size}")
            header = json.loads(stream.read(header_size))
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error})") from error
    if size != 8 + header_size + end:
        raise CheckpointError(f"{path} has {size} bytes, but its header describes {8 + header_size + end}: it is incomplete")


def cache_problem(target: Path) -> str | None:
    """Why a cache entry cannot be used, ``None`` when it can: its record fits, or (made by openpi, without one) it is a complete checkpoint."""
    if not target.is_dir():
        return "not there"
    manifest = load_manifest(target, CACHE_MANIFEST)
    if manifest is None:
        return checkpoint_problem(target)
    return next(iter(manifest.problems(target)), None)


class _OneFile:
    """The single object of ``source`` under the name it gets locally."""

    def __init__(self, source: Bucket, file: RemoteFile) -> None:
        self._source = source
        self.files = (file,)

    def __str__(self) -> str:
        return str(self._source)

    def fetch(self, file: RemoteFile, scratch: Path, on_bytes: Callable[[int], None]) -> Path:
        return self._source.fetch(self._source.files[0], scratch, on_bytes)


def _fetch_checkpoint(uri: str, target: Path, progress: Progress) -> None:
    source: Source
    provenance = {"uri": uri}
    if _scheme(uri) == "hf":
        source, provenance["commit"] = hub_tree(*_hub_parts(uri))
    else:
        source = Bucket(uri)
    wanted = [file for file in source.files if not file.path.startswith(_TRAINING_ONLY)]
    _require_checkpoint(uri, [file.path for file in wanted])
    work = content(target)
    download(source, wanted, work, progress=progress, label=uri)
    # Killed right before the swap, an earlier run has left its record here.
    (work / CACHE_MANIFEST).unlink(missing_ok=True)
    manifest = describe(work, provenance, progress=progress)
    problem = checkpoint_problem(work)
    if problem is not None:
        shutil.rmtree(partial(target))
        raise DownloadError(f"{uri} was fetched, but is not a usable checkpoint: {problem.replace(str(work), uri)}")
    manifest.save(work, CACHE_MANIFEST)
    publish(target, CACHE_MANIFEST)


def _require_checkpoint(uri: str, paths: Iterable[str]) -> None:
    """Fails before gigabytes are fetched for nothing."""
    names = set(paths)
    if names & {"params/_METADATA", "_METADATA", WEIGHTS}:
        return
    archives = sorted(name for name in names if name.endswith((".tar", ".tar.gz", ".tgz")))
    hint = f"; it has the archive {archives[0]}: fetch it with prepare-planner-checkpoint" if archives else ""
    if f"{WEIGHTS}.index.json" in names:
        hint = f"; its weights are split into several files, which is not supported: merge them into one {WEIGHTS}"
    shown = ", ".join(sorted({name.split("/")[0] for name in names})[:8])
    raise CheckpointError(f"{uri} is not a checkpoint: expected params/_METADATA or {WEIGHTS}, found {shown or 'nothing'}{hint}")


def _scheme(uri: str | Path) -> str:
    return uri.partition("://")[0] if isinstance(uri, str) and "://" in uri else ""


def _hub_parts(uri: str) -> tuple[str, str, str]:
    """``hf://<org>/<name>[@revision][/folder]`` → (org/name, revision, folder). A ``/`` in a revision is written ``%2F``."""
    parts = safe_parts(uri.partition("://")[2].strip("/"), f"location {uri}")
    if len(parts) < 2:
        raise CheckpointError(f"{uri} names no repository; expected hf://<organisation>/<name>[@revision][/folder]")
    name, _, revision = parts[1].partition("@")
    return f"{parts[0]}/{name}", urllib.parse.unquote(revision) or DEFAULT_REVISION, "/".join(parts[2:])


def _has_digest(path: Path, sha256: str | None) -> bool:
    if sha256 is None:
        return True
    try:
        verify_digest(path, ("sha256", sha256), str(path))
    except DownloadError as error:
        logger.warning("fetching %s again: %s", path, error)
        return False
    return True
