"""Who may use the admin port: holders of its API key, and no web page that someone's browser has open.

Without a key the port is open to this machine, which includes every page that a browser on it shows. Such a page can send requests, but
neither read their answers (there are no CORS headers) nor change anything (:func:`from_another_site`), nor pass for a page of this port by
having its own name resolve to a loopback address (DNS rebinding): only names that mean this machine are answered to.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hosting.api_keys import CHALLENGE, UNAUTHORIZED_TEXT, authorized
from hosting.config import is_loopback

PROBES: Final = frozenset({"/health", "/ready", "/v2/health/live", "/v2/health/ready"})
"""Paths that need no key: what supervisors and load balancers ask."""

_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
_HOST: Final = re.compile(r"(?:\[(?P<ipv6>[^\]]*)\]|(?P<name>[^:]*))(?::[0-9]*)?")


class AccessMiddleware:
    """Refuses what may not be asked, before anything is routed. HEAD is taken for GET, as some probes send it; the server leaves the body out.

    Args:
        app: what answers the rest.
        api_key: what all but the ``PROBES`` need; None: no key is asked for, and the port is a loopback one.
        public: further paths that need no key.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, public: Collection[str] = ()) -> None:
        self._app = app
        self._api_key = api_key
        self._public = PROBES | frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if scope.get("method") == "HEAD":  # FastAPI's routes have GET alone
            scope = {**scope, "method": "GET"}
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        # A page that rebinds a name does not have the key, and behind a proxy, names are the proxy's business.
        if self._api_key is None and not _names_this_machine(headers.get("host")):
            text = f"Host: this port answers to localhost and loopback addresses, got {headers['host'] or 'nothing'}; use these, or set admin.api_key"
            return JSONResponse({"detail": text}, 421)
        if scope["path"] not in self._public and not authorized(headers, self._api_key):
            return JSONResponse({"detail": UNAUTHORIZED_TEXT}, 401, CHALLENGE)
        if scope["method"] not in _SAFE and from_another_site(headers):
            return JSONResponse({"detail": "Origin: a page of another site may not change settings; use this port's own /docs, or a program"}, 403)
        return None


def _names_this_machine(host: str | None) -> bool:
    if host is None:  # HTTP/1.0; a browser always sends it
        return True
    match = _HOST.fullmatch(host)
    return match is not None and is_loopback((match["ipv6"] or match["name"] or "").lower())


def from_another_site(headers: Mapping[str, str]) -> bool:
    """Whether a browser sent the request for a page that this port did not serve: ``Sec-Fetch-Site`` says so, or else ``Origin``. Programs
    send neither."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc != headers.get("host")
    except ValueError:
        return True
