"""A WebSocket with deadlines: ``websockets``' sans-I/O protocol over a socket of our own.

The library's own blocking client reads and writes on two threads at once. OpenSSL does not allow that on one TLS connection (under
load, one in a hundred handshakes was never answered), it cannot bound a send, and the reply has to change threads. Here whoever calls
does the I/O.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Mapping, Sequence

from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.uri import parse_uri

from hosting.clients.link import Buffer
from hosting.clients.retry import Deadline
from hosting.clients.websocket_frame import LARGE_BYTES, FrameMemory

logger = logging.getLogger(__name__)

_PING_AFTER_S = 20.0
_LOST_AFTER_S = 120.0
"""Of silence. openpi's own server answers no ping while it infers or compiles; its clients' 20 s cost them connections that were good."""

_RECEIVE_BYTES = 1 << 16


class StreamClosedError(Exception):
    """The connection has ended; the message says why."""


class WebSocketStream:
    """An open WebSocket. Its methods must not be called from two threads at once.

    Args:
        url: ``ws://`` or ``wss://``.
        headers: of the upgrade request.
        context: TLS settings; None for ``ws``.
        server_name: whom the certificate must name; None: the host of ``url``.
        congestion_control: TCP's, if the kernel lets us have it; None keeps the kernel's.
        deadline: of TCP, TLS and the upgrade together.

    Raises:
        TimeoutError: the deadline passed.
        OSError: TCP or TLS failed.
        websockets.WebSocketException: the URL is none, or the server does not upgrade.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        context: ssl.SSLContext | None,
        server_name: str | None,
        congestion_control: str | None,
        deadline: Deadline,
    ) -> None:
        uri = parse_uri(url)
        self._protocol = ClientProtocol(uri, max_size=None)
        self._frames = FrameMemory()
        self._messages: deque[str | bytes] = deque()
        self._fragments: list[Frame] = []
        self._heard_s = time.monotonic()
        self._socket = _connected(uri.host, uri.port, congestion_control, deadline)
        try:
            if context is not None:
                self._socket.settimeout(deadline.left_s())
                self._socket = context.wrap_socket(self._socket, server_hostname=server_name or uri.host)
            self._socket.setblocking(False)
            self._upgrade(headers, deadline)
        except BaseException:
            self._socket.close()
            raise

    @property
    def socket(self) -> socket.socket:
        """What the bytes go through."""
        return self._socket

    @property
    def open(self) -> bool:
        """Whether messages can still be exchanged, as far as is known: :meth:`pump` finds out more."""
        return self._protocol.state is State.OPEN and self._socket.fileno() >= 0

    def send(self, message: Sequence[Buffer], deadline: Deadline) -> None:
        """Send one binary message, whose parts need no joining before.

        Raises:
            TimeoutError: the deadline passed; the message may be half sent, so the stream must be closed.
            StreamClosedError: the connection has ended.
        """
        if not self.open:
            raise StreamClosedError(self._reason())
        if self._messages:
            # It would pass for the answer to this one.
            raise StreamClosedError("the server sent a message that nobody had asked for")
        if sum(memoryview(part).nbytes for part in message) < LARGE_BYTES:
            self._protocol.send_binary(b"".join(message))
            self._flush(deadline)
        else:
            self._flush(deadline)
            self._transmit(self._frames.frame(message), deadline)

    def receive(self, deadline: Deadline) -> str | bytes:
        """The next message. A silent server is pinged, and given up after two minutes.

        Raises:
            TimeoutError: the deadline passed.
            StreamClosedError: the connection has ended.
        """
        self._heard_s = pinged_s = time.monotonic()
        while not self._messages:
            if not self.open:
                raise StreamClosedError(self._reason())
            if self._take_in(deadline):
                continue
            if not deadline.allows(0.0):
                raise TimeoutError
            self._wait(select.POLLIN, deadline.within(_PING_AFTER_S))
            now_s = time.monotonic()
            if now_s - self._heard_s >= _LOST_AFTER_S:
                self.abort()
                raise StreamClosedError(f"nothing came for {_LOST_AFTER_S:.0f} s, not even the answer to a ping")
            if now_s - max(self._heard_s, pinged_s) >= _PING_AFTER_S:
                pinged_s = now_s
                self._protocol.send_ping(b"")
                self._flush(deadline)
        return self._messages.popleft()

    def pump(self) -> None:
        """Take in what has come, without waiting: pings are answered, and the end of the connection is noticed."""
        at_once = Deadline(0.0, time.monotonic)
        try:
            while self.open and self._take_in(at_once):
                pass
        except (TimeoutError, StreamClosedError):
            self.abort()
        if not self.open:
            self.abort()

    def close(self, timeout_s: float) -> None:
        """The closing handshake, for as long as that may take."""
        if self.open:
            deadline = Deadline(timeout_s, time.monotonic)
            with contextlib.suppress(TimeoutError, StreamClosedError):
                self._protocol.send_close(1000)
                self._flush(deadline)
                while self._protocol.state is not State.CLOSED and deadline.allows(0.0):
                    if not self._take_in(deadline):
                        self._wait(select.POLLIN, deadline.left_s())
        self.abort()

    def abort(self) -> None:
        """Close without a word."""
        self._socket.close()

    def _upgrade(self, headers: Mapping[str, str], deadline: Deadline) -> None:
        request = self._protocol.connect()
        for name, value in headers.items():
            request.headers[name] = value
        self._protocol.send_request(request)
        self._flush(deadline)
        while self._protocol.state is State.CONNECTING and self._protocol.handshake_exc is None:
            if not self._take_in(deadline):
                if not deadline.allows(0.0):
                    raise TimeoutError
                self._wait(select.POLLIN, deadline.left_s())
        if self._protocol.handshake_exc is not None:
            raise self._protocol.handshake_exc

    def _take_in(self, deadline: Deadline) -> bool:
        """Read once; returns whether there was anything."""
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError as error:
            self.abort()
            raise StreamClosedError(self._reason(error)) from error
        if data:
            self._heard_s = time.monotonic()
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        for event in self._protocol.events_received():
            if not isinstance(event, Response):
                assert isinstance(event, Frame)
                self._take_frame(event)
        self._flush(deadline)
        return True

    def _take_frame(self, frame: Frame) -> None:
        if frame.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            return
        self._fragments.append(frame)
        if not frame.fin:
            return
        data = bytes(frame.data) if len(self._fragments) == 1 else b"".join(part.data for part in self._fragments)
        is_text = self._fragments[0].opcode is Opcode.TEXT
        self._fragments.clear()
        self._messages.append(data.decode(errors="replace") if is_text else data)

    def _flush(self, deadline: Deadline) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self._transmit(memoryview(data), deadline)
            else:  # the protocol's sign for the end of what we send
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_WR)

    def _transmit(self, left: memoryview, deadline: Deadline) -> None:
        while left:
            try:
                left = left[self._socket.send(left) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                if not deadline.allows(0.0):
                    raise TimeoutError from None
                self._wait(select.POLLOUT, deadline.left_s())
            except OSError as error:
                self._read_last_words()
                raise StreamClosedError(self._reason(error)) from error

    def _read_last_words(self) -> None:
        """What the server said before it hung up, for the error."""
        with contextlib.suppress(OSError):
            self._protocol.receive_data(self._socket.recv(_RECEIVE_BYTES))
        self.abort()

    def _wait(self, event: int, timeout_s: float | None) -> None:
        poll = select.poll()
        poll.register(self._socket, event)
        poll.poll(None if timeout_s is None else max(1, timeout_s * 1e3))

    def _reason(self, error: OSError | None = None) -> str:
        closed = self._protocol.close_rcvd
        if closed is not None:
            return f"the server closed it: {closed}"
        if self._protocol.parser_exc is not None and not isinstance(self._protocol.parser_exc, EOFError):
            return f"the server broke the protocol: {self._protocol.parser_exc}"
        return "the server hung up" if error is None else " ".join(str(error).split())


def _connected(host: str, port: int, congestion_control: str | None, deadline: Deadline) -> socket.socket:
    last: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        connecting = socket.socket(family, kind, protocol)
        try:
            connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            _choose_congestion_control(connecting, congestion_control)
            if not deadline.allows(0.0):
                raise TimeoutError
            connecting.settimeout(deadline.left_s())
            connecting.connect(address)
        except OSError as error:
            connecting.close()
            last = error
        else:
            return connecting
    assert last is not None
    raise last


def _choose_congestion_control(connecting: socket.socket, name: str | None) -> None:
    if name is None:
        return
    try:
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
    except (OSError, AttributeError) as error:
        logger.debug("TCP keeps the kernel's congestion control, %s is not to be had: %s", name, error)
