"""Many QUIC connections behind one UDP socket, sans-I/O: which datagram belongs to which connection, and when each has to be looked at.

Datagrams are routed by connection id, never by address: a client whose address changes (another network, a new NAT binding) goes on.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import weakref
from collections import deque
from typing import TYPE_CHECKING

from hosting.quic import MIN_INITIAL_BYTES, QUIC_VERSION, Event, IdsChanged, MessageConnection
from hosting.quic_reset import stateless_reset
from hosting.quic_settings import CONNECTION_ID_BYTES
from hosting.udp import Address, Received

if TYPE_CHECKING:
    from qh3.quic.configuration import QuicConfiguration

logger = logging.getLogger(__name__)

_LONG_HEADER = 0x80
_INITIAL = 0x00
_PACKET_TYPE = 0x30


class Peer:
    """A client's connection, as the router keeps it.

    Attributes:
        greeted: it has got the metadata, and so is known to be allowed to ask.
        gone: its end has been reported.
        answered_s: when it was last sent an answer.
        source: what its latest datagrams came to (:attr:`hosting.udp.Received.source`).
    """

    def __init__(self, connection: MessageConnection, ids: set[bytes], deadline_s: float) -> None:
        self.connection = connection
        self.ids = ids
        self.deadline_s: float | None = deadline_s
        self.greeted = False
        self.gone = False
        self.answered_s = 0.0
        self.source = b""
        self.armed_s: float | None = None


class Router:
    """Connections by id.

    Args:
        reset_key: secret, and the same after a restart: clients of the server before are told at once that it has gone. No two ports may share it.
        greeting_bytes: limit of a message's body until its connection is greeted; the transport raises it then.
        patience_s: for the first request of a connection, from its first datagram on; it is closed afterwards.
        max_ungreeted: connections that may be in that state; while there are so many, new ones are not answered.
    """

    def __init__(
        self, configuration: QuicConfiguration, *, reset_key: bytes, greeting_bytes: int, patience_s: float = 10.0, max_ungreeted: int = 1000
    ) -> None:
        self._configuration = configuration
        self._reset_key = reset_key
        self._greeting_bytes = greeting_bytes
        self._patience_s = patience_s
        self._max_ungreeted = max_ungreeted
        self._by_id: dict[bytes, Peer] = {}
        self._peers: dict[Peer, None] = {}
        self._touched: dict[Peer, None] = {}
        self._deadlines: deque[tuple[float, Peer]] = deque()
        # A timer may be ten minutes away; the memory of a connection that has gone is not kept for it.
        self._timers: list[tuple[float, int, weakref.ref[Peer]]] = []
        self._order = itertools.count()
        self._ungreeted = 0
        self._full = False

    @property
    def peers(self) -> list[Peer]:
        """All connections, those that have ended and are being wound up included."""
        return list(self._peers)

    def touch(self, peer: Peer) -> None:
        """Have ``peer`` looked at in the next round."""
        self._touched[peer] = None

    def touched(self) -> list[Peer]:
        """The connections to look at: their events, then :meth:`settle`."""
        peers, self._touched = list(self._touched), {}
        return peers

    def receive(self, received: Received, now: float) -> list[bytes]:
        """Hand datagrams to their connections; returns datagrams to send back at once. Garbage is dropped."""
        data, size = received.data, received.segment_bytes
        if not _one_connection(data, size):
            answers: list[bytes] = []
            for start in range(0, len(data), size):
                datagram = data[start : start + size]
                answers += self.receive(Received(datagram, len(datagram), received.address, received.arrived_s, received.source), now)
            return answers
        if len(data) <= CONNECTION_ID_BYTES:
            return []
        if not data[0] & _LONG_HEADER:
            connection_id = data[1 : 1 + CONNECTION_ID_BYTES]
            peer = self._by_id.get(connection_id)
            if peer is None:
                reset = stateless_reset(self._reset_key, connection_id, min(size, len(data)))
                return [] if reset is None else [reset]
        else:
            header = _long_header(data)
            if header is None:
                return []
            version, destination, source = header
            peer = self._by_id.get(destination)
            if peer is None and version != QUIC_VERSION and version != 0 and len(data) >= MIN_INITIAL_BYTES:
                return [_version_negotiation(destination=source, source=destination)]
            if peer is None and version == QUIC_VERSION and data[0] & _PACKET_TYPE == _INITIAL and len(data) >= MIN_INITIAL_BYTES:
                peer = self._new_peer(destination, now)
        if peer is not None:
            peer.connection.receive(received, now)
            if peer not in self._peers:
                if not peer.connection.begun:
                    return []  # whatever it was, a connection does not begin so
                self._admit(peer, now)
            peer.source = received.source
            self._touched[peer] = None
        return []

    def next_timer_s(self) -> float | None:
        """When :meth:`handle_timers` has something to do."""
        candidates = [self._timers[0][0]] if self._timers else []
        if self._deadlines:
            candidates.append(self._deadlines[0][0])
        return min(candidates, default=None)

    def handle_timers(self, now: float) -> None:
        """Run the timers that are due and give up on clients that do not ask for anything."""
        while self._timers and self._timers[0][0] <= now:
            peer = heapq.heappop(self._timers)[2]()
            if peer is not None:
                peer.armed_s = None
                peer.connection.handle_timer(now)
                self._touched[peer] = None
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline_s, late = self._deadlines.popleft()
            if late.deadline_s == deadline_s and late.connection.ended is None:
                late.connection.close(f"the metadata was not asked for within {self._patience_s:g} s")
                self._touched[late] = None

    def events(self, peer: Peer) -> list[Event]:
        """What has happened on a connection; changes of its ids are dealt with here."""
        events: list[Event] = []
        for event in peer.connection.events():
            if isinstance(event, IdsChanged):
                self._change_id(peer, event)
            else:
                events.append(event)
        return events

    def asked(self, peer: Peer) -> None:
        """The first request of a connection is there: it may take as long as it takes to be answered."""
        peer.deadline_s = None

    def greet(self, peer: Peer) -> None:
        """A connection has got its metadata."""
        if not peer.greeted:
            peer.greeted = True
            self._ungreeted -= 1

    def refuse(self, peer: Peer, now: float) -> None:
        """A connection got an error instead of its metadata: it may ask once more, soon."""
        peer.deadline_s = now + self._patience_s
        self._deadlines.append((peer.deadline_s, peer))

    def settle(self, peer: Peer, now: float) -> list[tuple[bytes, Address]]:
        """After a connection's events have been dealt with: what it sends now. Connections that have ended are let go."""
        datagrams = peer.connection.datagrams_to_send(now)
        timer_s = peer.connection.next_timer_s()
        if timer_s is None and peer.connection.ended is not None:
            self._forget(peer)
        elif timer_s is not None and (peer.armed_s is None or timer_s < peer.armed_s):
            peer.armed_s = timer_s
            heapq.heappush(self._timers, (timer_s, next(self._order), weakref.ref(peer)))
        return datagrams

    def _new_peer(self, original_id: bytes, now: float) -> Peer | None:
        if self._ungreeted >= self._max_ungreeted:
            if not self._full:
                logger.warning("%d QUIC clients have begun to connect and have not been greeted: new ones are not answered", self._ungreeted)
                self._full = True
            return None
        self._full = False
        connection = MessageConnection.server(self._configuration, original_id, max_message_bytes=self._greeting_bytes, reset_key=self._reset_key)
        return Peer(connection, {original_id, connection.first_id}, now + self._patience_s)

    def _admit(self, peer: Peer, now: float) -> None:
        for connection_id in peer.ids:
            self._by_id[connection_id] = peer
        self._peers[peer] = None
        self._deadlines.append((now + self._patience_s, peer))
        self._ungreeted += 1

    def _change_id(self, peer: Peer, change: IdsChanged) -> None:
        if change.live:
            peer.ids.add(change.connection_id)
            self._by_id[change.connection_id] = peer
        elif change.connection_id in peer.ids:
            peer.ids.remove(change.connection_id)
            del self._by_id[change.connection_id]

    def _forget(self, peer: Peer) -> None:
        if peer not in self._peers:
            return
        del self._peers[peer]
        for connection_id in peer.ids:
            del self._by_id[connection_id]
        if not peer.greeted:
            self._ungreeted -= 1


def _one_connection(data: bytes, size: int) -> bool:
    """Whether all datagrams of a batch have short headers and carry the same connection id."""
    if len(data) <= size:
        return True
    first = data[1 : 1 + CONNECTION_ID_BYTES]
    return not any(data[start] & _LONG_HEADER or data[start + 1 : start + 1 + CONNECTION_ID_BYTES] != first for start in range(0, len(data), size))


def _long_header(data: bytes) -> tuple[int, bytes, bytes] | None:
    """Version and the two connection ids of a long header (RFC 8999 §5.1); None when it is none."""
    if len(data) < 7:
        return None
    destination_end = 6 + data[5]
    if len(data) <= destination_end:
        return None
    source_end = destination_end + 1 + data[destination_end]
    if len(data) < source_end:
        return None
    return int.from_bytes(data[1:5], "big"), data[6:destination_end], data[destination_end + 1 : source_end]


def _version_negotiation(*, destination: bytes, source: bytes) -> bytes:
    """The packet that says which version this server speaks (RFC 9000 §17.2.1)."""
    header = bytes((_LONG_HEADER | os.urandom(1)[0], 0, 0, 0, 0))
    return header + bytes((len(destination),)) + destination + bytes((len(source),)) + source + QUIC_VERSION.to_bytes(4, "big")
