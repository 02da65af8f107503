"""A policy server over QUIC, for control loops: blocking, without an event loop or threads.

The certificate is verified: by its SHA-256 (``pin=``), by a CA of yours (``cafile=``) or by the system's. A connection that has gone while nothing
was being asked (idle timeout, a restarted server) is opened anew before the next request is sent.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import msgpack

from hosting.certificates import normalize_sha256
from hosting.clients.errors import AuthenticationError, ConnectError, ConnectionLostError, InferenceError, ReplyTimeoutError
from hosting.clients.link import Buffer
from hosting.clients.quic_channel import PING_AFTER_S, Channel, pump
from hosting.protocol.messages import Message, MessageType
from hosting.protocol.striping import MAX_PARTS, TRANSFER_ID_BYTES, split
from hosting.quic import Cancelled, Rejected
from hosting.quic_endings import Why
from hosting.quic_settings import ALPN, IDLE_TIMEOUT_S, client_configuration
from hosting.udp import Address

STRIPE_MIN_BYTES = 16 * 1024
"""Smaller requests go over one connection: they fit its first flight."""
MAX_MESSAGE_BYTES = 64 << 20
_PROBE_S = 2.0
_FAREWELL_S = 0.1

Stream = tuple[Channel, int]


class QuicLink:
    """A conversation over one QUIC connection, or several (:class:`hosting.clients.link.Link`).

    Args:
        api_key: sent with the first message of each connection.
        pin: SHA-256 of the server's certificate, 64 hexadecimal digits; it then is all that is checked.
        cafile: PEM certificates to trust instead of the system's.
        verify: False takes any certificate: encryption without knowing whom one talks to.
        server_name: what the certificate must be for; ``host`` by default.
        connections: over how many connections requests of 16 KB and more are spread. Several help where packets are lost.
        connect_timeout_s: for the handshake.
        ready_timeout_s: for the metadata, which a server that is still loading sends when it is done; None waits.
        max_message_bytes: limit of a reply.
        idle_timeout_s: after which silence either side forgets the connection.

    Raises:
        ValueError: ``pin`` or ``connections`` is wrong.
        ConnectError: no conversation could be begun.
        AuthenticationError: the certificate is not the expected one, or the API key is not.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        api_key: str | None = None,
        pin: str | None = None,
        cafile: str | None = None,
        verify: bool = True,
        server_name: str | None = None,
        connections: int = 1,
        connect_timeout_s: float = 10.0,
        ready_timeout_s: float | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> None:
        if not 1 <= connections <= MAX_PARTS:
            raise ValueError(f"connections: {connections} is out of range; expected 1 to {MAX_PARTS}")
        if cafile is not None and not Path(cafile).is_file():
            raise ConnectError(f"cafile: there is no file {cafile}; expected PEM certificates to trust")
        self._host, self._port = host, port
        self._target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._greeting = b"" if api_key is None else msgpack.packb({"api_key": api_key})
        self._pin = None if pin is None else normalize_sha256(pin)
        self._cafile, self._verify, self._server_name = cafile, verify, server_name or host
        self._connections = connections
        self._connect_timeout_s, self._ready_timeout_s = connect_timeout_s, ready_timeout_s
        self._max_message_bytes = max_message_bytes
        self._idle_timeout_s = idle_timeout_s
        self._channels: list[Channel] = []
        self._closed = False
        self._hello = self._open(None)

    @property
    def hello(self) -> Message:
        return self._hello

    @property
    def closed(self) -> bool:
        return self._closed

    def exchange(self, type: int, body: Sequence[Buffer], timeout_s: float | None) -> Message:
        """Send one message and wait for its answer.

        Raises:
            ReplyTimeoutError: no answer in time; the server is told not to make it, and the link can go on.
            ConnectionLostError: the connection broke while the answer was awaited; the link is closed.
            ConnectError: the connection had gone before anything was sent, and a new one could not be opened; the link is closed.
            InferenceError: the answer is larger than ``max_message_bytes``, or the server dropped the request.
        """
        if self._closed:
            raise ConnectionLostError(f"the link to {self._target} is closed; open a new one")
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._revive(deadline_s)
        streams = self._send(type, body)
        try:
            if not pump([channel for channel, _ in streams], lambda: _settled(streams), deadline_s):
                raise ReplyTimeoutError(f"no reply from {self._target} within {timeout_s:g} s")
            return self._outcome(streams)
        finally:
            self._give_up(streams)

    def close(self) -> None:
        self._closed = True
        self._drop()

    def _revive(self, deadline_s: float | None) -> None:
        """Open the connections anew if one of them has gone. Nothing has been sent yet, so nothing can be served twice."""
        now = time.monotonic()
        for channel in self._channels:
            channel.advance(now)
        silent = [channel for channel in self._channels if channel.lost is None and now - channel.heard_s > PING_AFTER_S]
        if silent:
            for channel in silent:
                channel.ping(now)
            probe_s = now + _PROBE_S if deadline_s is None else min(deadline_s, now + _PROBE_S)
            pump(silent, lambda: all(channel.lost is not None or channel.heard_s >= now for channel in silent), probe_s)
        if any(channel.lost is not None or (channel in silent and channel.heard_s < now) for channel in self._channels):
            self._drop()
            try:
                self._hello = self._open(deadline_s)
            except ConnectError:
                self._closed = True
                raise

    def _send(self, type: int, body: Sequence[Buffer]) -> list[Stream]:
        if len(self._channels) == 1 or sum(memoryview(piece).nbytes for piece in body) < STRIPE_MIN_BYTES:
            return [(self._channels[0], self._channels[0].request(type, body))]
        parts = split(type, body, len(self._channels), os.urandom(TRANSFER_ID_BYTES))
        return [(channel, channel.request(MessageType.PART, part)) for channel, part in zip(self._channels, parts, strict=True)]

    def _outcome(self, streams: list[Stream]) -> Message:
        """The answer. An error on any of a striped request's streams is the answer to all of it."""
        outcomes = [channel.outcomes.get(stream) for channel, stream in streams]
        for outcome in (outcomes[0], *outcomes):
            match outcome:
                case Message(type=MessageType.PART_REPLY) | None:
                    continue
                case Message():
                    return outcome
                case Rejected():
                    raise InferenceError(f"{self._target}: {outcome.text}: the reply cannot be taken; raise max_message_bytes")
                case Cancelled():
                    raise InferenceError(f"{self._target}: the server dropped the request without an answer")
        lost = next(channel.lost for channel, stream in streams if channel.lost is not None and stream not in channel.outcomes)
        self.close()
        raise ConnectionLostError(f"the connection to {self._target} broke while a reply was awaited: {lost}")

    def _give_up(self, streams: list[Stream]) -> None:
        """Leave nothing of a request behind, whatever became of it."""
        unanswered = [(channel, stream) for channel, stream in streams if channel.outcomes.pop(stream, None) is None]
        if unanswered and not self._closed:
            for channel, stream in unanswered:
                channel.cancel(stream)
            channels = [channel for channel, _ in unanswered]
            pump(channels, lambda: not any(channel.connection.pacing for channel in channels), time.monotonic() + _FAREWELL_S)

    def _open(self, deadline_s: float | None) -> Message:
        """Connect and greet; returns the metadata."""
        connect_by_s = _sooner(time.monotonic() + self._connect_timeout_s, deadline_s)
        try:
            self._connect(connect_by_s)
            ready_by_s = deadline_s if self._ready_timeout_s is None else _sooner(time.monotonic() + self._ready_timeout_s, deadline_s)
            return self._greet(ready_by_s)
        except BaseException:
            self._drop()
            raise

    def _connect(self, deadline_s: float) -> None:
        try:
            addresses = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_DGRAM)
        except (OSError, UnicodeError) as error:
            raise ConnectError(f"{self._target}: the host name cannot be resolved ({getattr(error, 'strerror', None) or error})") from error
        failure: ConnectError | None = None
        for left, (family, _, _, _, address) in zip(range(len(addresses), 0, -1), addresses, strict=True):
            now = time.monotonic()
            try:
                self._channels = [self._channel(family, address) for _ in range(self._connections)]
            except OSError as error:
                failure = ConnectError(f"{self._target}: there is no way to {address[0]} ({error.strerror or error})")
                continue
            pump(self._channels, lambda: _any_lost(self._channels) or self._is_established(), now + (deadline_s - now) / left)
            if self._is_established() and not _any_lost(self._channels):
                return
            failure = self._handshake_failure()
            self._drop()
            if isinstance(failure, AuthenticationError):
                break
        assert failure is not None, "getaddrinfo() gives at least one address, or raises"
        raise failure

    def _channel(self, family: int, address: Address) -> Channel:
        configuration = client_configuration(
            self._server_name,
            pin=self._pin,
            cafile=self._cafile,
            verify=self._verify,
            loopback=ipaddress.ip_address(address[0].partition("%")[0]).is_loopback,
            idle_timeout_s=self._idle_timeout_s,
        )
        return Channel(family, address, configuration, max_message_bytes=self._max_message_bytes)

    def _is_established(self) -> bool:
        return all(channel.connection.established for channel in self._channels)

    def _handshake_failure(self) -> ConnectError:
        unmade = [channel for channel in self._channels if channel.lost is not None or not channel.connection.established]
        channel = next((channel for channel in unmade if channel.lost is not None), unmade[0])
        if channel.refused:
            refused = ConnectError(f"{self._target}: nothing listens there for UDP; is the server running, and is it the QUIC port?")
            refused.__cause__ = ConnectionRefusedError()  # as the other transports' errors have it: clients that wait for a server look for it
            return refused
        ended = channel.connection.ended
        if ended is None:
            return ConnectError(
                f"nothing answered at {self._target} over UDP within {self._connect_timeout_s:g} s; "
                "is it the QUIC port, and does the network let UDP through?"
            )
        if ended.why is Why.CLOSED:
            return ConnectError(f"{self._target}: {ended.text}")
        if ended.why is not Why.CERTIFICATE:
            return ConnectError(f"{self._target}: the QUIC handshake failed: {ended.text}; expected a server that speaks {ALPN!r}")
        sha256 = channel.connection.peer_sha256
        if self._pin is not None:
            return AuthenticationError(
                f"{self._target}: the server's certificate is not the pinned one: expected sha256 {self._pin}, got {sha256}; "
                "if the server was given a new certificate, pin that"
            )
        names = ", ".join(channel.connection.peer_names) or "no name"
        return AuthenticationError(
            f"{self._target}: the server's certificate is not trusted for {self._server_name!r} ({ended.text}); it is for {names}; "
            f"if it is your server, connect with pin={sha256!r}, or name its CA in cafile and its name in server_name"
        )

    def _greet(self, deadline_s: float | None) -> Message:
        channels = self._channels
        streams = [(channel, channel.request(MessageType.METADATA, [self._greeting])) for channel in channels]
        started_s = time.monotonic()
        in_time = pump(channels, lambda: _any_lost(channels) or all(stream in channel.outcomes for channel, stream in streams), deadline_s)
        for channel, stream in streams:
            match channel.outcomes.get(stream):
                case Message(type=MessageType.METADATA_REPLY) | None:
                    pass
                case Message() as refusal:
                    raise self._refused(refusal)
                case Rejected() | Cancelled():
                    raise ConnectError(f"{self._target}: the server did not answer the request for its metadata with a message")
        lost = next((channel.lost for channel in channels if channel.lost is not None), None)
        if lost is not None:
            raise ConnectError(f"{self._target}: the connection ended before the server sent its metadata: {lost}")
        if not in_time:
            raise ConnectError(
                f"{self._target}: connected, but the server was not ready within {time.monotonic() - started_s:.1f} s; is it still loading?"
            )
        replies = [channel.outcomes.pop(stream) for channel, stream in streams]
        assert isinstance(replies[0], Message)
        return replies[0]

    def _refused(self, refusal: Message) -> ConnectError:
        text = bytes(refusal.body).decode("utf8", "replace")
        if refusal.type == MessageType.FAILURE:
            text = str(msgpack.unpackb(refusal.body)["message"])
        return (AuthenticationError if text.startswith("unauthorized") else ConnectError)(f"{self._target}: {text}")

    def _drop(self) -> None:
        channels, self._channels = self._channels, []
        for channel in channels:
            channel.close()


def _settled(streams: list[Stream]) -> bool:
    """Whether a request is decided: its answer is there, an error is, or a connection that it needs has gone.

    A connection whose part has been taken is not needed any more: a server that drains closes it while the answer is made.
    """
    first, stream = streams[0]
    return (
        stream in first.outcomes
        or any(channel.lost is not None and stream not in channel.outcomes for channel, stream in streams)
        or any(_bad(channel.outcomes.get(stream)) for channel, stream in streams[1:])
    )


def _bad(outcome: Message | Rejected | Cancelled | None) -> bool:
    return outcome is not None and not (isinstance(outcome, Message) and outcome.type == MessageType.PART_REPLY)


def _any_lost(channels: Sequence[Channel]) -> bool:
    return any(channel.lost is not None for channel in channels)


def _sooner(first_s: float, second_s: float | None) -> float:
    return first_s if second_s is None else min(first_s, second_s)
