"""A small Google Cloud Storage on loopback: enough of its JSON interface for ``gcsfs`` to list and fetch objects.

Point ``STORAGE_EMULATOR_HOST`` at its ``url``. Every request is counted, and faults can be put in the way of downloads.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

Fault = Literal["404", "short", "tamper"]
"""What happens to one download: it is gone, it ends early but looks whole, or it has other bytes of the right number."""


@dataclass
class Buckets:
    url: str
    objects: dict[str, bytes] = field(default_factory=dict)
    """Content by ``<bucket>/<object name>``."""
    denied: set[str] = field(default_factory=set)
    """Buckets that anonymous callers may not read."""
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def add_directory(self, prefix: str, directory: Path) -> None:
        """Every file below ``directory`` as an object ``<prefix>/<relative path>``."""
        for path in directory.rglob("*"):
            if path.is_file():
                self.objects[f"{prefix}/{path.relative_to(directory).as_posix()}"] = path.read_bytes()


@contextmanager
def bucket_stand_in() -> Iterator[Buckets]:
    """A running server without objects."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    buckets = Buckets(f"http://127.0.0.1:{server.server_address[1]}")
    server.buckets = buckets  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield buckets
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        return None

    def do_GET(self) -> None:
        buckets: Buckets = self.server.buckets  # type: ignore[attr-defined]
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        buckets.requests.append(unquote(url.path))
        parts = url.path.removeprefix("/download").strip("/").split("/")  # storage/v1/b/<bucket>/o[/<object>]
        bucket = unquote(parts[3]) if len(parts) > 3 else ""
        name = f"{bucket}/{unquote('/'.join(parts[5:]))}"
        if bucket in buckets.denied:
            self._json({"error": {"code": 401, "message": "Anonymous caller does not have storage.objects.list access"}}, 401)
        elif len(parts) == 5:
            prefix = f"{bucket}/{query.get('prefix', [''])[0]}"
            items = [_item(key, content) for key, content in sorted(buckets.objects.items()) if key.startswith(prefix)]
            self._json({"kind": "storage#objects", "items": items})
        elif name not in buckets.objects:
            self._json({"error": {"code": 404, "message": "Not Found"}}, 404)
        elif query.get("alt") == ["media"]:
            self._content(buckets, name)
        else:
            self._json(_item(name, buckets.objects[name]))

    def _content(self, buckets: Buckets, name: str) -> None:
        body = buckets.objects[name]
        fault = buckets.faults[name].pop(0) if buckets.faults.get(name) else None
        if fault == "404":
            self._json({"error": {"code": 404, "message": "Not Found"}}, 404)
            return
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "tamper":
            body = bytes(255 - byte for byte in body)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _json(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _item(key: str, content: bytes) -> dict[str, Any]:
    bucket, _, name = key.partition("/")
    md5 = hashlib.md5(content, usedforsecurity=False)
    generation = str(int(md5.hexdigest()[:12], 16))
    return {
        "kind": "storage#object",
        "name": name,
        "bucket": bucket,
        "size": str(len(content)),
        "generation": generation,
        "md5Hash": base64.b64encode(md5.digest()).decode(),
        "updated": "2025-01-01T00:00:00.000Z",
        "timeCreated": "2025-01-01T00:00:00.000Z",
    }
