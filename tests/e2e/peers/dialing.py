"""How the stand-ins connect."""

from __future__ import annotations

from typing import Any

from websockets.sync.client import ClientConnection, connect


def dial(uri: str, **options: Any) -> ClientConnection:
    """A connection that stays until it is closed. The originals call ``connect`` alone, which websockets 17 warns about."""
    return connect(uri, **options).__enter__()
