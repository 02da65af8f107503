"""The WebSocket link: openpi's protocol (reference/wire.md §1)."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from websockets.exceptions import InvalidStatus, WebSocketException

from hosting.clients.errors import AuthenticationError, ConnectError, ConnectionLostError, ReplyTimeoutError
from hosting.clients.link import Buffer
from hosting.clients.retry import Deadline
from hosting.clients.tls import client_context
from hosting.clients.websocket_stream import StreamClosedError, WebSocketStream
from hosting.protocol import msgpack_numpy
from hosting.protocol.messages import Message, MessageType

RESET_TEXT = "reset successful"
"""How RoboArena's servers, and ours, confirm a reset in a text frame (reference/peers.md §1.10)."""

_CLOSE_TIMEOUT_S = 2.0
_TEND_EVERY_S = 1.0


class WebSocketLink:
    """One conversation over a WebSocket; implements :class:`~hosting.clients.link.Link`.

    A binary frame is INFER or REPLY, a text frame ERROR or RESET_REPLY; RESET goes as a map with ``endpoint: reset``. Errors are
    asked for as maps (``?errors=map``), which have a code, unless the address chooses its own dialect. Between requests, a thread
    answers the server's pings. Proxies are not used.

    Args:
        url: ``ws://host:port`` or ``wss://…``, any path and query.
        api_key: sent as ``Authorization: Api-Key …``.
        connect_timeout_s: how long TCP, TLS and the WebSocket handshake may take.
        ready_timeout_s: how long the server may take to load before it greets; None waits for ever.
        congestion_control: TCP's, if the kernel lets us have it; None keeps the kernel's.
        pin, cafile, verify: how the server's certificate is checked (``wss``), see :func:`~hosting.clients.tls.client_context`.
        server_name: whom the certificate must name; None: the host of ``url``.

    Raises:
        AuthenticationError: the server wants another API key, or its certificate is not to be trusted.
        ConnectError: nobody is there, it is no policy server, or a time-out passed.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        connect_timeout_s: float = 10.0,
        ready_timeout_s: float | None = None,
        congestion_control: str | None = "bbr",
        pin: str | None = None,
        cafile: str | None = None,
        verify: bool = True,
        server_name: str | None = None,
    ) -> None:
        self._url = url
        with _connect_errors(url, connect_timeout_s):
            self._stream = WebSocketStream(
                with_error_maps(url),
                {"Authorization": f"Api-Key {api_key}"} if api_key else {},
                context=client_context(pin=pin, cafile=cafile, verify=verify) if url.startswith("wss:") else None,
                server_name=server_name,
                congestion_control=congestion_control,
                deadline=Deadline(connect_timeout_s, time.monotonic),
            )
        self._busy = threading.Lock()
        self._ended = threading.Event()
        try:
            self._hello = self._greeting(ready_timeout_s)
        except BaseException:
            self._stream.close(_CLOSE_TIMEOUT_S)
            raise
        threading.Thread(target=_tend, args=(weakref.ref(self), self._ended), name="policy link", daemon=True).start()

    @property
    def hello(self) -> Message:
        """The server's first frame."""
        return self._hello

    @property
    def closed(self) -> bool:
        """Whether the link can no longer be used; what the server said meanwhile is looked at first."""
        with self._busy:
            self._stream.pump()
            return not self._stream.open

    def exchange(self, type: int, body: Sequence[Buffer], timeout_s: float | None) -> Message:
        """Send INFER or RESET and wait for the answer; see :meth:`~hosting.clients.link.Link.exchange`."""
        frame = [_reset_request(body)] if type == MessageType.RESET else body
        deadline = Deadline(timeout_s, time.monotonic)
        with self._busy:
            try:
                self._stream.send(frame, deadline)
                answer = self._stream.receive(deadline)
            except TimeoutError:
                self._stream.abort()
                raise ReplyTimeoutError(f"{self._url} did not answer within {timeout_s:g} s; the connection is closed") from None
            except StreamClosedError as error:
                self._stream.abort()
                raise ConnectionLostError(f"the connection to {self._url} broke: {error}") from error
            except BaseException:
                # Whoever stopped waiting must not get the late reply as that to the next observation.
                self._stream.abort()
                raise
        if isinstance(answer, str):
            confirms = type == MessageType.RESET and answer.strip() == RESET_TEXT
            return Message(MessageType.RESET_REPLY if confirms else MessageType.ERROR, answer.encode())
        return Message(MessageType.REPLY, answer)

    def close(self) -> None:
        """End the conversation; harmless when it has ended."""
        self._ended.set()
        with self._busy:
            self._stream.close(_CLOSE_TIMEOUT_S)

    def tend(self) -> None:
        """Answer the server's pings, unless a request is under way, which does so itself."""
        if self._busy.acquire(blocking=False):
            try:
                self._stream.pump()
            finally:
                self._busy.release()

    def _greeting(self, ready_timeout_s: float | None) -> Message:
        try:
            greeting = self._stream.receive(Deadline(ready_timeout_s, time.monotonic))
        except TimeoutError:
            text = f"{self._url} took the connection but did not greet within {ready_timeout_s:g} s; it may still be loading"
            raise ConnectError(text) from None
        except StreamClosedError as error:
            raise ConnectError(f"{self._url} ended the connection before it greeted: {error}") from error
        if isinstance(greeting, str):
            raise ConnectError(f"{self._url} refused the conversation: {_one_line(greeting)}")
        return Message(MessageType.METADATA_REPLY, greeting)


def _tend(link: weakref.ref[WebSocketLink], ended: threading.Event) -> None:
    while not ended.wait(_TEND_EVERY_S):
        tended = link()
        if tended is None:
            return
        tended.tend()
        del tended  # or it could never be collected


def with_error_maps(url: str) -> str:
    """``url`` asking for errors as maps, unless its query chooses a profile or the form of errors itself. Other servers ignore it."""
    parts = urlsplit(url)
    if {"profile", "errors"} & {key for key, _ in parse_qsl(parts.query, keep_blank_values=True)}:
        return url
    return urlunsplit(parts._replace(query=f"{parts.query}&errors=map" if parts.query else "errors=map"))


@contextlib.contextmanager
def _connect_errors(url: str, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except InvalidStatus as error:
        status = error.response.status_code
        if status == 401:
            raise AuthenticationError(f"{url}: unauthorized (HTTP 401); give the server's api_key") from error
        raise ConnectError(f"cannot connect to {url}: the server answered HTTP {status}, not as a WebSocket") from error
    except ssl.SSLCertVerificationError as error:
        hint = "give pin=… (the server's log has its SHA-256) or cafile=…"
        raise AuthenticationError(f"cannot trust {url}: {error.verify_message}; {hint}") from error
    except TimeoutError as error:
        raise ConnectError(f"cannot connect to {url}: no answer within {timeout_s:g} s") from error
    except (OSError, ValueError, WebSocketException, StreamClosedError) as error:
        raise ConnectError(f"cannot connect to {url}: {_one_line(error)}") from error


def _reset_request(body: Sequence[Buffer]) -> bytes:
    fields = msgpack_numpy.unpack(b"".join(body)) if any(map(len, body)) else {}
    return msgpack_numpy.pack({"endpoint": "reset", **fields})


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split()) or type(error).__name__
