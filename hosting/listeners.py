"""Where the process listens: every address is bound before anything is loaded, so that early clients wait instead of being refused."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp

from hosting.config import ServiceConfig, TLSConfig, WebSocketConfig
from hosting.policy import ConfigError
from hosting.transports.bulk_websocket import BulkWebSocketProtocol
from hosting.transports.prompt_http import PromptHTTPProtocol
from hosting.transports.websocket import WebSocketTransport

logger = logging.getLogger(__name__)

_GRACEFUL_S = 5


class Listener(Protocol):
    """One address."""

    def bind(self) -> None:
        """Take the address.

        Raises:
            ConfigError: it cannot be taken; names the field.
        """
        ...

    async def start(self) -> None:
        """Begin to accept clients."""
        ...

    async def close_idle(self) -> None:
        """The slot is draining: close the connections that wait for a request. The others close after their answer."""
        ...

    async def close(self) -> None:
        """Close everything and give the address back. Harmless before :meth:`start`."""
        ...


class HTTPListener:
    """An ASGI app on a TCP port: a slot's WebSocket endpoint, or the admin API.

    Args:
        field: the configuration's name of the port.
        websocket: the app's conversations, where it has any.
        tls: whether the configured certificate applies.
    """

    def __init__(
        self, field: str, host: str, port: int, app: ASGIApp, config: ServiceConfig, *, websocket: WebSocketTransport | None = None, tls: bool = False
    ) -> None:
        self._field = field
        self._address = (host, port)
        self._websocket = websocket
        self._congestion_control = config.websocket.congestion_control if websocket is not None else None
        self._tls = config.tls if tls else None
        self._config = config
        self._app = app
        self._server: _Server | None = None
        self._socket: socket.socket | None = None
        self._serving: asyncio.Task[None] | None = None

    def bind(self) -> None:
        config = self._config
        self._server = _Server(server_config(self._app, max_message_bytes=config.max_message_bytes, kept=config.websocket, tls=self._tls))
        self._socket = _listening(self._field, *self._address)
        if self._congestion_control is not None:
            _set_congestion_control(self._socket, self._congestion_control)

    @property
    def url(self) -> str:
        """Where it listens, once bound."""
        assert self._socket is not None, "bind() comes first"
        scheme = ("ws" if self._websocket is not None else "http") + ("s" if self._tls else "")
        return address_url(scheme, self._socket.getsockname())

    @property
    def congestion_control(self) -> str | None:
        """Of the connections that this listener accepts; None where the system does not tell."""
        assert self._socket is not None
        return _congestion_control(self._socket)

    async def start(self) -> None:
        assert self._server is not None
        assert self._socket is not None
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def close_idle(self) -> None:
        if self._websocket is not None:
            await self._websocket.close_idle()

    async def close(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        elif self._socket is not None:
            self._socket.close()


def server_config(app: ASGIApp, *, max_message_bytes: int, kept: WebSocketConfig, tls: TLSConfig | None = None) -> uvicorn.Config:
    """How uvicorn serves ``app``.

    Args:
        kept: how WebSocket connections are kept.

    Raises:
        ConfigError: the certificate cannot be used.
    """
    config = uvicorn.Config(
        app,
        http=PromptHTTPProtocol,
        ws=BulkWebSocketProtocol,
        ws_max_size=max_message_bytes,
        ws_per_message_deflate=False,
        ws_ping_interval=kept.ping_interval_s,
        ws_ping_timeout=kept.ping_timeout_s,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACEFUL_S,
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.private_key if tls else None,
    )
    if tls:
        try:
            # First, as uvicorn would have OpenSSL ask the terminal for the password of an encrypted key.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certificate, tls.private_key, password=_no_password)
            config.load()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"tls: cannot use certificate {tls.certificate} with private_key {tls.private_key} ({reason}); both are PEM files"
            ) from error
    return config


def _no_password() -> str:
    raise ValueError("the key is encrypted, and nobody is asked for its password; decrypt it with: openssl pkey -in KEY -out DECRYPTED")


def address_url(scheme: str, address: tuple[Any, ...]) -> str:
    """The URL of a bound socket's ``(host, port, …)``."""
    host, port = address[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn without signal handling: the service decides when its servers end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listening(field: str, host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, TypeError, UnicodeError) as error:  # the latter two for a name that no host can have
        # The errno of a failed look-up is not one that os.strerror() knows; what create_server() adds is said here already.
        reason = str(getattr(error, "strerror", None) or error).partition(" (while attempting")[0]
        raise ConfigError(f"{field}: cannot listen on {host} port {port} ({reason}); stop what uses it, or choose another port or host") from error


def _set_congestion_control(listening: socket.socket, name: str) -> None:
    """Connections inherit it from the socket that accepts them."""
    if not hasattr(socket, "TCP_CONGESTION"):
        logger.info("websocket.congestion_control: this system has no choice of it; %s is not set", name)
        return
    try:
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
    except OSError as error:
        logger.info("websocket.congestion_control: the kernel does not allow %s (%s); %s stays", name, error, _congestion_control(listening))


def _congestion_control(tcp: socket.socket) -> str | None:
    if not hasattr(socket, "TCP_CONGESTION"):
        return None
    return tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).partition(b"\0")[0].decode()
