"""One QUIC connection of a client that has no event loop: it moves when :func:`pump` is called, and sleeps in between.

Packets that come while nobody pumps wait in the socket's buffer; the kernel notes when they came, so that a pause of the caller does not look
like a slow network.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hosting.clients.link import Buffer
from hosting.protocol.messages import Message
from hosting.quic import Arrived, Cancelled, MessageConnection, Rejected
from hosting.udp import Address, UdpSocket

if TYPE_CHECKING:
    from qh3.quic.configuration import QuicConfiguration

logger = logging.getLogger(__name__)

PING_AFTER_S = 5.0
"""How long the server may be silent, while something is expected of it, before it is asked for a sign of life."""
LOST_AFTER_S = 20.0
"""How long it may be silent before it is taken for lost."""
STUCK_AFTER_S = 20.0
"""How long requests may not arrive although the server is heard: then the network takes only small datagrams where it took larger ones (another
way to the server, a VPN), which qh3 does not notice. Large requests get :data:`_SLOWEST_BYTES_PER_S` on top."""
_SLOWEST_BYTES_PER_S = 200_000

Outcome = Message | Rejected | Cancelled


class Channel:
    """A connection and its socket.

    Raises:
        OSError: there is no way to the address.

    Attributes:
        lost: why no answer can come any more; None while one can.
        heard_s: when the server was last heard.
        outcomes: what became of each stream, until somebody takes it out.
    """

    def __init__(self, family: int, address: Address, configuration: QuicConfiguration, *, max_message_bytes: int) -> None:
        self._family, self._address = family, address
        self._udp = UdpSocket.connect(family, address)
        self._clock_s = self.heard_s = self._pinged_s = time.monotonic()
        self.connection = MessageConnection.client(configuration, self._udp.peer, self._clock_s, max_message_bytes=max_message_bytes)
        self.refused = False
        self._useless: str | None = None
        self._stuck_since_s: float | None = None
        self._patience_s = STUCK_AFTER_S
        self._cancelled = False
        self.outcomes: dict[int, Outcome] = {}

    @property
    def lost(self) -> str | None:
        if self.connection.ended is not None:
            return self.connection.ended.text
        return "nothing listens there any more" if self.refused else self._useless

    def advance(self, now: float) -> None:
        """Take what has arrived, do what is due, send what there is to send."""
        try:
            self._take_arrived()
        except ConnectionRefusedError:
            # The kernel tells of it before it hands out what had come by then: the server's last words.
            self.refused = True
            with contextlib.suppress(OSError):
                self._take_arrived()
        except OSError as error:
            if error.errno != errno.EMSGSIZE:  # a router's word on a path-MTU probe
                self._rebind(error)
        self._clock_s = max(self._clock_s, now)
        self.connection.handle_timer(self._clock_s)
        for event in self.connection.events():
            match event:
                case Arrived(stream, message):
                    self.outcomes[stream] = message
                    self._stuck_since_s = None
                case Rejected(stream) | Cancelled(stream):
                    self.outcomes[stream] = event
                    self._stuck_since_s = None
                case _:
                    pass
        self._transmit()
        # Not before: what was lost counts as under way only when it has been sent again.
        if self.connection.delivered and not self.connection.pacing and not self._cancelled:
            self._stuck_since_s = None

    def _take_arrived(self) -> None:
        for received in self._udp.receive():
            self._clock_s = max(self._clock_s, received.arrived_s)
            self.connection.receive(received, self._clock_s)
            self.heard_s = self._clock_s

    def request(self, type: int, body: Sequence[Buffer]) -> int:
        """Send a message; returns the stream whose outcome is its answer."""
        self._patience_s = STUCK_AFTER_S + sum(memoryview(piece).nbytes for piece in body) / _SLOWEST_BYTES_PER_S
        self._cancelled = False
        if self._stuck_since_s is None:
            self._stuck_since_s = self._clock_s
        for stream in self.connection.request(type, body):  # noqa: B007
            self._transmit()
        return stream

    def cancel(self, stream: int) -> None:
        """Give up waiting for a stream's outcome."""
        self._cancelled = True  # what is thrown away has not been delivered
        self.connection.cancel(stream)

    def expect(self, now: float, since_s: float) -> None:
        """Something is expected of the server since ``since_s``: see to it that a dead one is noticed."""
        silent_s = now - max(self.heard_s, since_s)
        if silent_s > LOST_AFTER_S:
            self._useless = f"nothing was heard from the server for {LOST_AFTER_S:g} s"
        elif self._stuck_since_s is not None and now - self._stuck_since_s > self._patience_s:
            self._useless = f"the server is there, but no request has got through for {self._patience_s:.0f} s"
        elif silent_s > PING_AFTER_S and now - self._pinged_s > PING_AFTER_S and self.connection.established:
            self.ping(now)

    def ping(self, now: float) -> None:
        """Ask for a sign of life, which comes as a change of :attr:`heard_s`."""
        self._pinged_s = now
        if self.connection.ended is None:
            self.connection.ping()
            self._transmit()

    def next_timer_s(self) -> float | None:
        """When :meth:`advance` has something to do though nothing arrives."""
        return self.connection.next_timer_s()

    def register(self, poll: select.poll) -> None:
        """Have ``poll`` wake up when there is something to read, or room for what waits to be sent."""
        poll.register(self._udp, select.POLLIN | (select.POLLOUT if self._udp.wants_write else 0))

    def close(self) -> None:
        """Say goodbye and free the socket."""
        if self.connection.ended is None and not self.refused:
            self.connection.close("the client left")
            self._transmit()
        self._udp.close()

    def _transmit(self) -> None:
        datagrams = [datagram for datagram, _ in self.connection.datagrams_to_send(self._clock_s)]
        try:
            self._udp.send(datagrams, self._address)
        except ConnectionRefusedError:
            self.refused = True
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                self._useless = "the network takes only smaller datagrams than before"
            else:
                self._rebind(error)

    def _rebind(self, error: OSError) -> None:
        """Go on from a new local address: the network that the socket was bound to is gone. What was being sent counts as lost on its way."""
        try:
            udp = UdpSocket.connect(self._family, self._address)
        except OSError as still:
            logger.debug("no way to %s yet: %s", self._address, still)
            return
        logger.info("the network changed (%s): going on from %s", error, udp.address)
        udp.largest_sent = self._udp.largest_sent
        self._udp.close()
        self._udp = udp


def pump(channels: Sequence[Channel], done: Callable[[], bool], deadline_s: float | None) -> bool:
    """Move ``channels`` until ``done()``. Returns False when the deadline (on ``time.monotonic``'s clock) came first."""
    since_s = time.monotonic()
    while True:
        now = time.monotonic()
        for channel in channels:
            channel.advance(now)
        if done():
            return True
        if deadline_s is not None and now >= deadline_s:
            return False
        wake_s = now + 1.0 if deadline_s is None else min(deadline_s, now + 1.0)
        poll = select.poll()  # a new one: a channel's socket may have been replaced
        for channel in channels:
            channel.expect(now, since_s)
            channel.register(poll)
            timer_s = channel.next_timer_s()
            wake_s = wake_s if timer_s is None else min(wake_s, timer_s)
        # poll() rounds up to whole milliseconds; the pacer's gaps are shorter.
        poll.poll(max(0, round((wake_s - now) * 1000)))
