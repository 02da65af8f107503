"""UDP in batches: one system call carries up to 64 datagrams (Linux GSO and GRO), plain calls where the kernel refuses.

600 KB are 75 datagrams of 8 KB or 420 of 1452 bytes; one call for each would cost more than encrypting them.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

BUFFER_BYTES = 4 << 20
"""Asked for both socket buffers. A 600 KB request is a burst that ordinary receive buffers (208 KB) lose half of."""

_LINUX = sys.platform == "linux"
_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
_SO_TIMESTAMPNS = 35
_IP_PKTINFO, _IPV6_RECVPKTINFO, _IPV6_PKTINFO = 8, 49, 50
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3
_MAX_SEGMENTS = 64
_MAX_RUN_BYTES = 65_000
_RECEIVE_BYTES = 65_536
_ANCILLARY_BYTES = 128
_GSO_REFUSED = {errno.EIO, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOPROTOOPT}
_TIMESPEC = struct.Struct("@qq")
_U16 = struct.Struct("@H")
_INT = struct.Struct("@i")

Address = tuple[Any, ...]
"""``(host, port)``, or IPv6's ``(host, port, flow, scope)``."""


class Received(NamedTuple):
    """What one system call received: datagrams of ``segment_bytes`` each (the last may be shorter), all from one address."""

    data: bytes
    segment_bytes: int
    address: Address
    arrived_s: float
    """On ``time.monotonic``'s clock: when the kernel got them (``timestamps=True``), else when they were read."""
    source: bytes = b""
    """For :meth:`UdpSocket.send`: answers leave from the address that was asked, which a socket bound to all addresses has to be told."""


class UdpSocket:
    """A non-blocking UDP socket, bound (a server's) or connected (a client's).

    Args:
        sock: is owned, and closed, by this object.
        timestamps: have the kernel note arrival times, for a reader that may come late.

    Attributes:
        largest_sent: bytes of the largest datagram that the kernel has taken.
    """

    def __init__(self, sock: socket.socket, *, timestamps: bool = False) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._connected = _has_peer(sock)
        self._scoped = sock.family == socket.AF_INET6
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
        self._gro = _LINUX and _accepts(sock, _SOL_UDP, _UDP_GRO, 1)
        self._gso = _LINUX and _accepts(sock, _SOL_UDP, _UDP_SEGMENT, 0)
        self._timestamps = timestamps and _LINUX and _accepts(sock, socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        if _LINUX:
            # Path-MTU discovery is QUIC's: a datagram that is too large must be lost, not cut up.
            level, option = (socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER) if self._scoped else (socket.IPPROTO_IP, _IP_MTU_DISCOVER)
            _accepts(sock, level, option, _PMTUDISC_PROBE)
            if not self._connected and sock.getsockname()[0] in ("0.0.0.0", "::"):
                level, option = (socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO) if self._scoped else (socket.IPPROTO_IP, _IP_PKTINFO)
                _accepts(sock, level, option, 1)
        self._backlog: deque[tuple[list[bytes], Address, bytes]] = deque()
        self.largest_sent = 0

    @classmethod
    def bind(cls, host: str, port: int) -> UdpSocket:
        """Raises: OSError, when the address cannot be had."""
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.bind(address)
            return cls(sock)
        except BaseException:
            sock.close()
            raise

    @classmethod
    def connect(cls, family: int, address: Address) -> UdpSocket:
        """A socket that talks to one peer only, and so hears when nothing listens there.

        Raises:
            OSError: there is no way to the address.
        """
        sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            sock.connect(address)
            return cls(sock, timestamps=True)
        except BaseException:
            sock.close()
            raise

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def address(self) -> Address:
        """The local address."""
        address: Address = self._sock.getsockname()
        return address

    @property
    def peer(self) -> Address:
        """The address of a connected socket's peer."""
        address: Address = self._sock.getpeername()
        return address

    def buffer_bytes(self) -> tuple[int, int]:
        """What the kernel granted for receiving and for sending, in bytes."""
        # Linux doubles what it is asked for, for its own bookkeeping, and reports the double.
        share = 2 if _LINUX else 1
        receive = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // share
        return receive, self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // share

    @property
    def batched(self) -> tuple[bool, bool]:
        """Whether receiving and sending go in batches."""
        return self._gro, self._gso

    def receive(self, limit: int = 64) -> Iterator[Received]:
        """What has arrived, in at most ``limit`` system calls; nothing when nothing has.

        Raises:
            OSError: a connected socket's peer refuses (ConnectionRefusedError), or the network is gone.
        """
        for _ in range(limit):
            try:
                data, ancillary, flags, address = self._sock.recvmsg(_RECEIVE_BYTES, _ANCILLARY_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            if flags & socket.MSG_TRUNC or not data:
                continue
            segment_bytes, arrived_s, source = len(data), time.monotonic(), b""
            for level, kind, value in ancillary:
                if level == _SOL_UDP and kind == _UDP_GRO:
                    (segment_bytes,) = _INT.unpack_from(value)
                elif level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
                    seconds, nanoseconds = _TIMESPEC.unpack_from(value)
                    arrived_s = min(arrived_s, arrived_s - (time.time() - seconds - nanoseconds * 1e-9))
                elif level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
                    source = bytes(4) + value[4:8] + bytes(4)  # whatever interface: only the address matters
                elif level == socket.IPPROTO_IPV6 and kind == _IPV6_PKTINFO:
                    source = bytes(value)
            if self._scoped and "%" in address[0]:
                address = (address[0].partition("%")[0], *address[1:])  # the scope is in the tuple already
            yield Received(data, segment_bytes, address, arrived_s, source)

    def send(self, datagrams: Sequence[bytes], address: Address, source: bytes = b"") -> None:
        """Send datagrams in their order; what the kernel has no room for waits for :meth:`flush`.

        Args:
            source: :attr:`Received.source` of what is being answered.

        Raises:
            OSError: as :meth:`flush`.
        """
        self._backlog.extend((run, address, source) for run in runs(datagrams, batched=self._gso))
        self.flush()

    @property
    def wants_write(self) -> bool:
        """Whether datagrams wait for the socket to become writable."""
        return bool(self._backlog)

    def flush(self) -> None:
        """Send what waits, as far as the kernel has room.

        Raises:
            OSError: what could not be sent is dropped, as a network drops datagrams. EMSGSIZE says of a connected socket that the way to its
                peer takes only smaller datagrams than before; a larger one than any before is a path-MTU probe, and to be dropped its answer.
        """
        while self._backlog:
            run, address, source = self._backlog.popleft()
            try:
                self._send_run(run, address, source)
            except (BlockingIOError, InterruptedError):
                self._backlog.appendleft((run, address, source))
                return
            except OSError as error:
                if len(run) > 1:
                    if error.errno in _GSO_REFUSED:
                        logger.debug("the kernel refuses UDP_SEGMENT (%s): datagrams are sent one by one", error.strerror)
                        self._gso = False
                    self._backlog.extendleft(([datagram], address, source) for datagram in reversed(run))
                elif error.errno != errno.EMSGSIZE or self._has_shrunk(run, address, source):
                    raise

    def _send_run(self, run: list[bytes], address: Address, source: bytes) -> None:
        ancillary = [(_SOL_UDP, _UDP_SEGMENT, _U16.pack(len(run[0])))] if len(run) > 1 else []
        if source:
            ancillary.append((socket.IPPROTO_IPV6, _IPV6_PKTINFO, source) if self._scoped else (socket.IPPROTO_IP, _IP_PKTINFO, source))
        if self._connected:
            self._sock.sendmsg(run, ancillary)
        else:
            self._sock.sendmsg(run, ancillary, 0, address)
        self.largest_sent = max(self.largest_sent, len(run[0]))

    def _has_shrunk(self, run: list[bytes], address: Address, source: bytes) -> bool:
        """Whether a datagram is refused as too large though such have been taken. Sent again to find out: what a router says of an earlier one, a
        probe, comes as the error of the next call, whatever that sends."""
        if not self._connected or len(run[0]) > self.largest_sent:
            return False
        try:
            self._send_run(run, address, source)
        except OSError as error:
            return error.errno == errno.EMSGSIZE
        return False

    def close(self) -> None:
        self._sock.close()


def runs(datagrams: Sequence[bytes], *, batched: bool) -> Iterator[list[bytes]]:
    """Datagrams grouped as one UDP_SEGMENT call takes them: of one size, only the last shorter, ≤ 64 and ≤ 65,000 bytes a group."""
    run: list[bytes] = []
    size = total = 0
    for datagram in datagrams:
        length = len(datagram)
        if run and (not batched or length > size or len(run[-1]) < size or len(run) == _MAX_SEGMENTS or total + length > _MAX_RUN_BYTES):
            yield run
            run = []
        if not run:
            size, total = length, 0
        run.append(datagram)
        total += length
    if run:
        yield run


def _accepts(sock: socket.socket, level: int, option: int, value: int) -> bool:
    try:
        sock.setsockopt(level, option, value)
    except OSError:
        return False
    return True


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True
