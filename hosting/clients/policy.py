"""A work-alike of openpi-client's ``WebsocketClientPolicy``: change the import, keep the program."""

from __future__ import annotations

import math
from typing import Any

from hosting.clients.client import Client


class WebsocketClientPolicy(Client):
    """openpi's constructor and methods over :class:`~hosting.clients.client.Client`, so with reconnecting and typed errors.

    Args:
        host: a name or an address, or a whole ``ws://`` or ``wss://`` URL; ``0.0.0.0`` means this machine.
        port: appended to ``host`` unless None.
        api_key: the server's key.
        wait_s: how long a server that refuses connections is tried, every 5 s; for ever unless told otherwise, as openpi's
            repository does it (its package gives up at once: ``wait_s=0``).
        options: as :class:`~hosting.clients.client.Client`.

    Raises:
        ConnectError: any other reason why there is no server.
    """

    def __init__(
        self, host: str = "0.0.0.0", port: int | None = None, api_key: str | None = None, *, wait_s: float = math.inf, **options: Any
    ) -> None:
        url = host if host.startswith(("ws://", "wss://")) else f"ws://{host}"
        if port is not None:
            url = f"{url}:{port}"
        super().__init__(url.replace("://0.0.0.0", "://127.0.0.1", 1), api_key=api_key, wait_s=wait_s, **options)
