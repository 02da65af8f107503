"""The API key of a request over HTTP, or of a WebSocket's upgrade: where it stands, and what is answered where it is missing or wrong."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Final

UNAUTHORIZED_TEXT: Final = "unauthorized: send the server's API key as 'Authorization: Api-Key KEY' or 'Authorization: Bearer KEY'"
"""What a client is told, with status 401 and :data:`CHALLENGE`."""

CHALLENGE: Final[Mapping[str, str]] = {"WWW-Authenticate": "Api-Key, Bearer"}


def sent_key(headers: Mapping[str, str]) -> str:
    """The key that came, as ``Authorization: Api-Key …`` or ``Bearer …``, or as ``X-API-Key``; empty where there is none.

    Args:
        headers: a request's; looked up in lower case.
    """
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() not in ("api-key", "bearer"):
        key = headers.get("x-api-key", "")
    return key.strip()


def authorized(headers: Mapping[str, str], api_key: str | None) -> bool:
    """Whether the key that came is ``api_key``, compared in constant time; always where None is asked for."""
    return api_key is None or hmac.compare_digest(sent_key(headers).encode(), api_key.encode())
