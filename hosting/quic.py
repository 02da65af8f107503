"""QUIC as this package uses it: messages in streams. Sans-I/O: time and datagrams are handed in. With
``hosting/quic_settings.py`` and ``hosting/quic_reset.py`` the only module that knows qh3.

A client opens one bidirectional stream for each request and sends ``type byte, body, FIN``; the answer comes back on the same stream in the same
form. A lost packet so delays only its own request. A client that no longer wants an answer resets the stream (RESET_STREAM and STOP_SENDING).
The application protocol (ALPN) is ``tandem/1``.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import NamedTuple

from qh3.quic import events as quic_events
from qh3.quic.configuration import QuicConfiguration
from qh3.quic.connection import QuicConnectionError
from qh3.quic.packet import QuicErrorCode

from hosting.protocol.gathering import Gatherer
from hosting.protocol.messages import Message
from hosting.quic_core import QuietConnection
from hosting.quic_endings import Ended, Why, ending
from hosting.quic_reset import ResettableConnection
from hosting.udp import Address, Received

logger = logging.getLogger(__name__)
# It warns of every connection that its peer closes; what matters of that reaches our own log, in our words.
logging.getLogger("quic").setLevel(logging.ERROR)

QUIC_VERSION = 1
MIN_INITIAL_BYTES = 1200
_SLICE_BYTES = 64_000
"""Eight of the datagrams that go out within one machine, which one system call takes."""
_MAX_FAILURES = 8
_STUCK_S = 0.05
_CANCELLED = 1
_TOO_LARGE = 2

Buffer = bytes | bytearray | memoryview


class Established(NamedTuple):
    """The handshake is complete."""


class Arrived(NamedTuple):
    """A whole message came."""

    stream: int
    message: Message


class Rejected(NamedTuple):
    """What comes on a stream is not a message, or too large; the rest of it is not received."""

    stream: int
    text: str


class Cancelled(NamedTuple):
    """The peer reset a stream."""

    stream: int


class IdsChanged(NamedTuple):
    """A connection id that datagrams may carry was added (``live``) or taken out of use."""

    connection_id: bytes
    live: bool


Event = Established | Arrived | Rejected | Cancelled | IdsChanged


class MessageConnection:
    """One QUIC connection that carries messages.

    Args:
        quic: a new one; a client's is not connected yet.
        max_message_bytes: of one message's body, and of all that are unfinished together.

    Attributes:
        incoming: messages that are not whole yet; has the limit, which may change.
        established: the handshake is complete.
    """

    def __init__(self, quic: QuietConnection, *, max_message_bytes: int) -> None:
        self._quic = quic
        self._is_client = quic.configuration.is_client
        self.incoming = Gatherer(max_message_bytes)
        self.established = False
        self._unanswered: set[int] = set()
        self._failed: Ended | None = None
        self._dead = False
        self._failures = 0
        self._stuck_until_s = 0.0

    @classmethod
    def server(cls, configuration: QuicConfiguration, original_id: bytes, *, max_message_bytes: int, reset_key: bytes) -> MessageConnection:
        """The answer to an Initial packet that was addressed to ``original_id``, a connection id of the client's making.

        Args:
            reset_key: of :func:`hosting.quic_reset.stateless_reset`.
        """
        return cls(ResettableConnection(configuration, original_id, reset_key), max_message_bytes=max_message_bytes)

    @classmethod
    def client(cls, configuration: QuicConfiguration, address: Address, now: float, *, max_message_bytes: int) -> MessageConnection:
        """A connection whose handshake has begun."""
        quic = QuietConnection(configuration=configuration)
        quic.connect(address, now)
        return cls(quic, max_message_bytes=max_message_bytes)

    @property
    def begun(self) -> bool:
        """Whether anything that came could be decrypted."""
        core = self._quic._core
        return core is not None and core.received_authenticated_packet

    @property
    def first_id(self) -> bytes:
        """The connection id that the peer's datagrams carry from its second flight on."""
        connection_id: bytes = self._quic.host_cid
        return connection_id

    @property
    def ended(self) -> Ended | None:
        """How the connection ended, as soon as either side has closed it; None while it lives."""
        if self._failed is not None:
            return self._failed
        closed = self._quic._close_event  # the public event comes three timeouts later
        return None if closed is None else ending(closed.error_code, closed.reason_phrase)

    @property
    def unanswered(self) -> int:
        """Number of messages that came and have not been answered."""
        return len(self._unanswered)

    @property
    def delivered(self) -> bool:
        """Whether the peer has acknowledged all that was sent."""
        core = self._quic._core
        return core is None or (core.bytes_in_flight == 0 and self._quic.get_send_buffer_size() == 0)

    @property
    def pacing(self) -> bool:
        """Whether something could be sent now but for the pacer, which spreads bursts."""
        timer = None if self._dead or self._quic._core is None else self._quic._core.get_timer()
        return timer is not None and timer[0] == "pacing"

    @property
    def peer_sha256(self) -> str | None:
        """SHA-256 of the certificate that the peer showed, trusted or not."""
        certificate = self._quic.get_peercert()
        return None if certificate is None else sha256(certificate.public_bytes()).hexdigest()

    @property
    def peer_names(self) -> list[str]:
        """The names that the peer's certificate is for."""
        certificate = self._quic.get_peercert()
        return [] if certificate is None else [_alternative_name(name.decode("utf8", "replace")) for name in certificate.get_subject_alt_names()]

    def receive(self, received: Received, now: float) -> None:
        """Take datagrams that belong to this connection. What they mean comes from :meth:`events`."""
        if self._dead:
            return
        self._stuck_until_s = 0.0
        try:
            if len(received.data) > received.segment_bytes:
                self._quic.receive_gro_buffer(received.data, received.segment_bytes, received.address, now)
            else:
                self._quic.receive_many_datagrams([received.data], received.address, now)
        except Exception as error:  # noqa: BLE001 - whatever a peer's bytes make of the library, it is this connection's end only
            self._fail(error)

    def next_timer_s(self) -> float | None:
        """When :meth:`handle_timer` has something to do."""
        timer_s = None if self._dead else self._quic.get_timer()
        return None if timer_s is None else max(timer_s, self._stuck_until_s)

    def handle_timer(self, now: float) -> None:
        """Retransmissions, delayed acknowledgements, idle timeout."""
        if (timer_s := self.next_timer_s()) is not None and timer_s <= now:
            try:
                self._quic.handle_timer(now)
            except Exception as error:  # noqa: BLE001 - as in receive()
                self._fail(error)

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Address]]:
        """What goes out now, and where to."""
        if self._dead or now < self._stuck_until_s:
            return []
        try:
            datagrams: list[tuple[bytes, Address]] = self._quic.datagrams_to_send(now)
        except Exception as error:
            # qh3 2.1 now and then fails to build a packet ("packet builder capacity exhausted"); after a while, or with the next datagram
            # from the other side, it goes on as after a loss.
            logger.debug("no datagram could be built", exc_info=error)
            self._stuck_until_s = now + _STUCK_S * 2**self._failures
            self._failures += 1
            if self._failures >= _MAX_FAILURES:
                self._fail(error)
            return []
        self._failures = 0
        return datagrams

    def events(self) -> Iterator[Event]:
        """What has happened since the last call."""
        while (event := self._quic.next_event()) is not None:
            match event:
                case quic_events.StreamDataReceived():
                    happened = self._data(event.stream_id, event.data, event.end_stream)
                    if happened is not None:
                        yield happened
                case quic_events.StreamReset() | quic_events.StopSendingReceived():
                    if self._reset(event.stream_id, whole=isinstance(event, quic_events.StreamReset)):
                        yield Cancelled(event.stream_id)
                case quic_events.HandshakeCompleted():
                    self.established = True
                    yield Established()
                case quic_events.ConnectionIdIssued():
                    yield IdsChanged(event.connection_id, True)
                case quic_events.ConnectionIdRetired():
                    yield IdsChanged(event.connection_id, False)
                case _:
                    pass  # ALPN is enforced by the handshake; the end of a connection is in `ended`

    def request(self, type: int, body: Sequence[Buffer]) -> Iterator[int]:
        """Send a message on a new stream, on which the answer comes.

        Yields the stream after every 64 kB that have been queued: transmitting then has the server decrypt one slice while the next
        is encrypted here. The message has been queued whole when the iterator ends, unless the connection has ended.
        """
        stream: int = self._quic.get_next_available_stream_id()
        self.incoming.begin(stream)
        pieces = [memoryview(piece).cast("B") for piece in (bytes((type,)), *body)]
        left, room = sum(map(len, pieces)), _SLICE_BYTES
        for piece in pieces:
            while piece:
                part, piece = piece[:room], piece[room:]
                left -= len(part)
                room -= len(part)
                if self.ended is None:
                    # The end goes with the last bytes: qh3 does not repeat a lost frame that says nothing but "end".
                    self._quic.send_stream_data(stream, part, not left)
                if not (left and room):
                    yield stream
                    room = _SLICE_BYTES

    def reply(self, stream: int, message: Message) -> None:
        """Answer the message that came on ``stream``; nothing happens when the peer has reset it."""
        if stream not in self._unanswered:
            return
        self._unanswered.remove(stream)
        if self.ended is None:
            try:
                self._quic.send_stream_data(stream, bytes((message.type,)), not message.body)
                if message.body:
                    self._quic.send_stream_data(stream, message.body, True)
            except (ValueError, QuicConnectionError) as error:
                logger.debug("stream %d was reset while its answer was made: %s", stream, error)

    def cancel(self, stream: int) -> None:
        """A client's: give up waiting for the answer on ``stream``, and have the server give up making it."""
        if stream in self.incoming and self.ended is None:
            self.incoming.discard(stream)
            self._abandon(stream, _CANCELLED, sending=True, receiving=True)

    def ping(self) -> None:
        """Have the peer acknowledge something."""
        self._quic.send_ping(0)

    def close(self, reason: str = "") -> None:
        """End the connection; the datagram that says so is still to be sent."""
        self._quic.close(int(QuicErrorCode.NO_ERROR), reason_phrase=reason)

    def _data(self, stream: int, data: bytes, last: bool) -> Event | None:
        if stream not in self.incoming:
            if self._is_client or stream & 3:  # only the client opens streams, and only bidirectional ones
                return None
            self.incoming.begin(stream)
            self._unanswered.add(stream)
        match self.incoming.add(stream, data, last=last):
            case None:
                return None
            case Message() as message:
                return Arrived(stream, message)
            case text:
                if not last:
                    self._abandon(stream, _TOO_LARGE, receiving=True)
                return Rejected(stream, text)

    def _reset(self, stream: int, *, whole: bool) -> bool:
        """The peer reset what it sends (``whole``) or stopped what it gets. Whether somebody has to hear of it."""
        if self._is_client and not whole:
            return False  # the server wants no more of a request; its answer says why
        awaited = self.incoming.discard(stream)
        if whole:
            self.incoming.end(stream)
        if self._is_client:
            return awaited
        if stream not in self._unanswered:
            return False
        self._unanswered.remove(stream)
        if self.ended is None:
            self._abandon(stream, _CANCELLED, sending=True)
        return True

    def _abandon(self, stream: int, code: int, *, sending: bool = False, receiving: bool = False) -> None:
        for wanted, operation in ((sending, self._quic.reset_stream), (receiving, self._quic.stop_stream)):
            if wanted:
                try:
                    operation(stream, code)
                except (ValueError, QuicConnectionError) as error:  # that direction is complete: what is left of it waits in the event queue
                    logger.debug("stream %d: %s", stream, error)

    def _fail(self, error: Exception) -> None:
        logger.debug("a QUIC connection ended on what its peer sent", exc_info=error)
        self._dead = self._failed is not None  # the first time, there still is a farewell to send
        self._failed = self._failed or Ended(Why.PROTOCOL, f"the QUIC library gave up on it ({type(error).__name__}: {error})")
        if not self._dead:
            try:
                self._quic.close(int(QuicErrorCode.INTERNAL_ERROR), reason_phrase="internal error")
            except QuicConnectionError:
                self._dead = True


def _alternative_name(written: str) -> str:
    """``DNSName(localhost)`` and ``IPAddress(7f:00:00:01)``, which is how qh3 writes names, as people write them."""
    kind, _, name = written.rstrip(")").partition("(")
    return str(ipaddress.ip_address(bytes.fromhex(name.replace(":", "")))) if kind == "IPAddress" else name
