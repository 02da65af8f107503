"""openpi-client as openpi's repository has it (0.1.0); the package on PyPI (0.1.2) is driven for real by ``test_openpi_client.py``."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from websockets.sync.client import ClientConnection

from tests.e2e.peers import openpi_codec
from tests.e2e.peers.dialing import dial


class OpenPIClient:
    """Base of most clients: binary metadata first, one map per request, a text frame is an error.

    A server that refuses connections is tried again for ever; the package on PyPI fails at once.
    """

    ping: ClassVar[dict[str, Any]] = {}
    """Keepalive settings; the library's own (20 s, 20 s) where a client has none."""

    retry_s = 5.0

    def __init__(self, host: str = "0.0.0.0", port: int | None = None, api_key: str | None = None) -> None:
        self._uri = host if host.startswith("ws") else f"ws://{host}"
        if port is not None:
            self._uri += f":{port}"
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._ws, self._metadata = self._wait_for_server()

    def get_server_metadata(self) -> dict[str, Any]:
        return self._metadata

    def infer(self, obs: dict[str, Any]) -> Any:
        self._ws.send(openpi_codec.pack(obs))
        response = self._ws.recv()
        if isinstance(response, str):
            raise RuntimeError(f"Error in inference server:\n{response}")
        return openpi_codec.unpack(response)

    def reset(self) -> None:
        """The protocol has none."""

    def close(self) -> None:
        self._ws.close()

    def _wait_for_server(self) -> tuple[ClientConnection, dict[str, Any]]:
        while True:
            try:
                return self._connect(self._uri)
            except ConnectionRefusedError:
                time.sleep(self.retry_s)

    def _connect(self, uri: str) -> tuple[ClientConnection, dict[str, Any]]:
        connection = dial(uri, compression=None, max_size=None, additional_headers=self._headers, **self.ping)
        return connection, openpi_codec.unpack(connection.recv())
