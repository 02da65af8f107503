"""Files and trees on a Hugging Face hub, through ``huggingface_hub``, with one-line errors.

The endpoint (``HF_ENDPOINT``) is read at every call, the token (``HF_TOKEN``, or a login) as ``huggingface_hub`` does.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi0.errors import CheckpointError, DownloadError
from pi0.remote import OnBytes, RemoteFile

DEFAULT_REVISION = "main"


def hub_file(repo: str, path: str) -> tuple[RemoteFile, str]:
    """What the hub says of one file on the default branch, and the commit it is in. One request, nothing is downloaded.

    Raises:
        FileNotInRepoError: the repository exists but not the file.
        DownloadError: no such repository, no access, or no connection.
    """
    hub = _huggingface_hub()
    with _errors(repo, DEFAULT_REVISION, path):
        url = hub.hf_hub_url(repo, path, revision=DEFAULT_REVISION, endpoint=_endpoint())
        try:
            found = hub.get_hf_file_metadata(url, endpoint=_endpoint())
        except hub.errors.HfHubHTTPError as error:
            if error.response is None or error.response.status_code < 500:
                raise
            # The hub has hiccups; with no connection at all, retrying would only delay the message.
            found = hub.get_hf_file_metadata(url, endpoint=_endpoint(), retry_on_errors=True)
    if found.commit_hash is None or found.etag is None or found.size is None:
        raise DownloadError(
            f"{_shown_endpoint()} answered for {repo}/{path} without commit, ETag and size: it is not a Hugging Face hub; "
            "check HF_ENDPOINT and proxies"
        )
    # Large files carry the SHA-256 of their content as ETag, small ones a git hash.
    digest = ("sha256", found.etag) if len(found.etag) == 64 else None
    return RemoteFile(path, int(found.size), digest, str(found.etag)), str(found.commit_hash)


class FileNotInRepoError(DownloadError):
    """The repository is there, the file is not."""


@dataclass(frozen=True)
class HubFiles:
    """Some files of one repository at one revision; a source for :func:`pi0.remote.download`."""

    repo: str
    revision: str
    files: tuple[RemoteFile, ...]
    folder: str = ""
    """The part of the repository that the files' paths are relative to."""

    def __str__(self) -> str:
        return f"hf://{self.repo}@{self.revision}" + (f"/{self.folder}" if self.folder else "")

    def fetch(self, file: RemoteFile, scratch: Path, on_bytes: OnBytes) -> Path:
        """Downloads ``file`` somewhere under ``scratch``; a connection that drops is taken up again where it stopped."""
        path = f"{self.folder}/{file.path}" if self.folder else file.path
        with _errors(self.repo, self.revision, path):
            return Path(
                _huggingface_hub().hf_hub_download(
                    self.repo,
                    path,
                    revision=self.revision,
                    local_dir=scratch,
                    endpoint=_endpoint(),
                    tqdm_class=_reporting_bar(on_bytes),
                )
            )


def hub_tree(repo: str, revision: str, folder: str) -> tuple[HubFiles, str]:
    """All files below ``folder`` of ``repo``, pinned to the commit that ``revision`` is now, and that commit.

    Raises:
        DownloadError: no such repository, revision or folder, no access, or no connection.
    """
    hub = _huggingface_hub()
    with _errors(repo, revision, folder):
        api = hub.HfApi(endpoint=_endpoint())
        commit = str(api.model_info(repo, revision=revision).sha)
        listed = list(api.list_repo_tree(repo, folder or None, recursive=True, revision=commit))
    files = []
    for entry in listed:
        if not isinstance(entry, hub.hf_api.RepoFile):
            continue
        digest = ("sha256", str(entry.lfs.sha256)) if entry.lfs is not None else None
        path = entry.path.removeprefix(f"{folder}/") if folder else entry.path
        files.append(RemoteFile(path, int(entry.size), digest, str(entry.blob_id)))
    return HubFiles(repo, commit, tuple(files), folder), commit


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.hf_api
    except ImportError as error:
        raise CheckpointError('fetching from a Hugging Face hub needs the package huggingface-hub: pip install "tandem-vla[serve]"') from error
    return huggingface_hub


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _shown_endpoint() -> str:
    return _endpoint() or "the Hugging Face hub"


@contextmanager
def _errors(repo: str, revision: str, path: str) -> Iterator[None]:
    errors: Any = _huggingface_hub().errors
    where = f"{repo}/{path}" if path else repo
    try:
        yield
    except errors.HFValidationError as error:
        raise DownloadError(f"{repo!r} is not a repository id; expected <organisation>/<name>") from error
    except errors.GatedRepoError as error:
        raise DownloadError(f"{repo} on {_shown_endpoint()} is gated: accept its conditions on its web page, then set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(f"no repository {repo} on {_shown_endpoint()}; check the id, and set HF_TOKEN if it is private") from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(f"{repo} has no revision {revision!r}") from error
    except errors.RemoteEntryNotFoundError as error:
        raise FileNotInRepoError(f"{repo} (revision {revision}) has no {path or 'files'}") from error
    except errors.OfflineModeIsEnabled as error:
        raise DownloadError(f"cannot fetch {where}: HF_HUB_OFFLINE is set; unset it or use a local path") from error
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise DownloadError(
            f"cannot fetch {where} from {_shown_endpoint()}: {_reason(error)}; check the network and HF_ENDPOINT, then run it again"
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of the error that started it; the hub's own last error only says that something went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _reporting_bar(on_bytes: OnBytes) -> type[Any]:
    """A progress bar class for ``huggingface_hub`` that draws nothing and reports the bytes of one file."""
    tqdm: Any = importlib.import_module("tqdm").tqdm
    reported = 0

    class Reporting(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no watcher thread for a bar nobody sees

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"file": _Nowhere(), "disable": False}))

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal reported
            drawn: bool | None = super().update(n)
            # Some transfers keep two bars (received, written) and restarts move a bar back: the furthest one counts.
            if self.n > reported:
                on_bytes(int(self.n) - reported)
                reported = int(self.n)
            return drawn

    return Reporting


class _Nowhere:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return None
