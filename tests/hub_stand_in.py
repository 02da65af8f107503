"""A small Hugging Face hub on loopback: enough of its HTTP interface for ``huggingface_hub`` to list and fetch models.

Every request is counted, and faults can be put in the way of the next downloads of a file.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

Fault = Literal["500", "403", "drop", "truncate", "short", "tamper"]
"""What happens to one GET of a file: an error status, the connection closed before or in the middle of the answer, an answer
that ends early but looks whole, or one with other bytes of the right number."""

LARGE = 1 << 12
"""Files of this size and more are stored as the hub stores large files: with their SHA-256 as ETag."""


@dataclass
class Repo:
    files: dict[str, bytes]
    private: bool = False
    gated: bool = False

    @property
    def commit(self) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()


@dataclass
class Hub:
    url: str
    repos: dict[str, Repo] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    hold: dict[str, threading.Event] = field(default_factory=dict)
    """Downloads of these files send their first half, then wait for the event."""
    reached: threading.Event = field(default_factory=threading.Event)
    """Set when a held download has sent its first half."""

    def gets(self, path: str) -> int:
        """Downloads of the file ``path`` so far."""
        return sum(request.startswith("GET ") and request.endswith(f"/{path}") and "/resolve/" in request for request in self.requests)


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """A running hub without repositories; its ``url`` is what ``HF_ENDPOINT`` should be."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        for event in hub.hold.values():
            event.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        return None

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        if api:
            parts = parts[2:]
        name, rest = "/".join(parts[:2]), parts[2:]
        repo = hub.repos.get(name)
        authorised = self.headers.get("Authorization") == "Bearer hf_right"
        if repo is None or (repo.private and not authorised):
            # The real hub does not tell strangers which repositories exist.
            self._error(404 if authorised else 401, "RepoNotFound")
        elif repo.gated and not authorised:
            self._error(403, "GatedRepo")
        elif len(rest) >= 2 and rest[1] not in ("main", repo.commit):
            self._error(404, "RevisionNotFound")
        elif api and (not rest or rest[0] == "revision"):
            self._json({"id": name, "modelId": name, "sha": repo.commit, "private": repo.private, "tags": [], "siblings": []})
        elif api and rest[0] == "tree":
            folder = "/".join(rest[2:])
            entries = [_entry(path, content) for path, content in sorted(repo.files.items()) if not folder or path.startswith(f"{folder}/")]
            if entries:
                self._json(entries)
            else:
                self._error(404, "EntryNotFound")
        elif rest[:1] == ["resolve"]:
            self._file(hub, repo, "/".join(rest[2:]))
        else:
            self._error(404, "EntryNotFound")

    def _file(self, hub: Hub, repo: Repo, path: str) -> None:
        if path not in repo.files:
            self._error(404, "EntryNotFound")
            return
        content = repo.files[path]
        fault = hub.faults[path].pop(0) if hub.faults.get(path) and (self.command == "GET" or hub.faults[path][0] in ("500", "403")) else None
        if fault in ("500", "403"):
            self._error(int(fault), "")
            return
        if fault == "drop":
            self.close_connection = True
            return
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        body = content[start:]
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "tamper":
            body = bytes(255 - byte for byte in body)
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", repo.commit)
        self.send_header("ETag", f'"{_etag(content)}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Linked-ETag", f'"{_etag(content)}"')
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if path in hub.hold:
            self.wfile.write(body[: len(body) // 2])
            hub.reached.set()
            hub.hold[path].wait()
            body = body[len(body) // 2 :]
        if fault == "truncate":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if len(content) >= LARGE else hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content, usedforsecurity=False).hexdigest()}
    if len(content) >= LARGE:
        entry["lfs"] = {"oid": _etag(content), "size": len(content), "pointerSize": 134}
    return entry
