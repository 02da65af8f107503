"""From an address to an open link: ``ws://``, ``wss://``, ``quic://``, ``unix://``, and ``auto://``, which tries them in turn.

A transport's library is imported when the first address needs it.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from hosting.clients.errors import AuthenticationError, ConnectError
from hosting.clients.link import Link

logger = logging.getLogger(__name__)

QUIC_PORT = 5555
_WEBSOCKET_PORT = 8000
_QUIC_PORTS = {_WEBSOCKET_PORT: QUIC_PORT, 8002: 5556}
"""WebSocket port → QUIC port of the same slot, as servers have them unless they are told otherwise."""

_FORMS = "ws://host:port, wss://host:port, quic://host[:5555], unix:///path or auto://host[:8000]"

_remembered: dict[str, str] = {}
"""``auto`` host → the URL that worked last in this process."""


@dataclass(frozen=True, kw_only=True)
class DialOptions:
    """What opening a link may need; :class:`hosting.clients.client.Client` says what each means."""

    api_key: str | None = field(default=None, repr=False)
    pin: str | None = None
    cafile: str | None = None
    verify: bool = True
    server_name: str | None = None
    connections: int = 1
    congestion_control: str | None = "bbr"
    quic_deadline_s: float = 1.5

    @property
    def names_a_certificate(self) -> bool:
        """Whether the user said which server is the right one."""
        return self.pin is not None or self.cafile is not None


@dataclass(frozen=True)
class Way:
    """One way to reach a server.

    Attributes:
        url: where it leads.
        open: opens a link, given how long connecting may take and until when the server must greet (None: any time), in seconds.
    """

    url: str
    open: Callable[[float, float | None], Link]


def ways_to(url: str, options: DialOptions) -> list[Way]:
    """What can be tried to reach ``url``, best first; more than one only for ``auto://``.

    Raises:
        ConnectError: ``url`` is no address that a client knows.
    """
    parts = _split(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    match parts.scheme:
        case "unix":
            return [Way(url, lambda connect_s, ready_s: _open_unix(unquote(parts.path), connect_s, ready_s))]
        case "quic":
            return [_quic_way(parts.hostname or "", parts.port or QUIC_PORT, url, options)]
        case "ws" | "wss":
            return [_websocket_way(url, options)]
    port = parts.port or _WEBSOCKET_PORT
    quic_port = _quic_port(url, parts, port)
    ways = [
        _quic_way(parts.hostname or "", quic_port, f"quic://{host}:{quic_port}", options, within_s=options.quic_deadline_s),
        _websocket_way(f"wss://{host}:{port}{parts.path}", options),
    ]
    if _is_loopback(parts.hostname or "") or not (options.api_key or options.names_a_certificate):
        # Elsewhere, whoever blocks the encrypted ways must neither be shown the key nor pass for the server.
        ways.append(_websocket_way(f"ws://{host}:{port}{parts.path}", options))
    return ways


def dial(
    url: str, options: DialOptions, connect_timeout_s: float, ready_timeout_s: float | None, *, remembered: MutableMapping[str, str] = _remembered
) -> tuple[str, Link]:
    """Open a link to ``url``; returns it with the address that it leads to.

    The ways of ``auto://`` are tried in their order, the one that worked last in this process before the others.

    Raises:
        AuthenticationError: the server wants another API key, or is not the one that ``options`` name.
        ConnectError: nobody can be reached; names every way that was tried.
    """
    ways = ways_to(url, options)
    if len(ways) == 1:
        return ways[0].url, ways[0].open(connect_timeout_s, ready_timeout_s)
    last = remembered.get(url)
    problems: list[ConnectError] = []
    for way in sorted(ways, key=lambda way: way.url != last):
        try:
            link = way.open(connect_timeout_s, ready_timeout_s)
        except ConnectError as error:
            if isinstance(error, AuthenticationError) and (options.names_a_certificate or "unauthorized" in str(error)):
                raise
            # Worth a line when the server is there and only its certificate is unknown: that is easily put right.
            logger.log(logging.WARNING if isinstance(error, AuthenticationError) else logging.DEBUG, "not by %s: %s", way.url, error)
            problems.append(error)
        else:
            remembered[url] = way.url
            return way.url, link
    raise ConnectError(f"cannot connect to {url}: {'; '.join(map(str, problems))}") from problems[-1]


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConnectError(f"cannot connect to {url}: {error}; expected {_FORMS}") from error
    if parts.scheme == "unix":
        complete = parts.path.startswith("/") and not parts.netloc
    else:
        complete = parts.scheme in ("ws", "wss", "quic", "auto") and bool(parts.hostname) and port != 0
    if not complete:
        raise ConnectError(f"cannot connect to {url}: it isn't an address of a policy server; expected {_FORMS}")
    return parts


def _quic_port(url: str, parts: SplitResult, port: int) -> int:
    given = parse_qs(parts.query).get("quic", [])
    if given and given[0].isascii() and given[0].isdecimal():
        return int(given[0])
    if port not in _QUIC_PORTS:
        # A guess might reach another slot, or another server.
        raise ConnectError(f"cannot connect to {url}: the QUIC port that belongs to {port} is not known; say auto://{parts.netloc}?quic=PORT")
    return _QUIC_PORTS[port]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _quic_way(host: str, port: int, url: str, options: DialOptions, *, within_s: float | None = None) -> Way:
    def open_link(connect_timeout_s: float, ready_timeout_s: float | None) -> Link:
        from hosting.clients.quic import QuicLink

        return QuicLink(
            host,
            port,
            api_key=options.api_key,
            pin=options.pin,
            cafile=options.cafile,
            verify=options.verify,
            server_name=options.server_name,
            connections=options.connections,
            connect_timeout_s=connect_timeout_s if within_s is None else min(connect_timeout_s, within_s),
            ready_timeout_s=ready_timeout_s,
        )

    return Way(url, open_link)


def _websocket_way(url: str, options: DialOptions) -> Way:
    def open_link(connect_timeout_s: float, ready_timeout_s: float | None) -> Link:
        from hosting.clients.websocket import WebSocketLink

        return WebSocketLink(
            url,
            api_key=options.api_key,
            connect_timeout_s=connect_timeout_s,
            ready_timeout_s=ready_timeout_s,
            congestion_control=options.congestion_control,
            pin=options.pin,
            cafile=options.cafile,
            verify=options.verify,
            server_name=options.server_name,
        )

    return Way(url, open_link)


def _open_unix(path: str, connect_timeout_s: float, ready_timeout_s: float | None) -> Link:
    from hosting.clients.unix_socket import UnixLink

    return UnixLink(path, connect_timeout_s=connect_timeout_s, ready_timeout_s=ready_timeout_s)
