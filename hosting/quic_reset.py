"""Stateless resets (RFC 9000 §10.3): how a client learns at once that its server was restarted, or has forgotten it.

A connection's token is derived from its id and a key that outlives the process, so that the server that comes after can say it. qh3 draws tokens
at random, and only for the first id of a connection do we have a say; our clients use no other.
"""

from __future__ import annotations

import hmac
import os

from qh3.quic.configuration import QuicConfiguration
from qh3.quic.tls_bridge import QuicTlsBridge
from qh3.tls import ExtensionType

from hosting.quic_core import QuietConnection

_TOKEN_BYTES = 16
_MIN_BYTES, _MAX_BYTES = 21, 42


class ResettableConnection(QuietConnection):
    """A server's connection that the server after it can reset.

    Args:
        original_id: the connection id that the client's first datagram was addressed to.
        reset_key: what :func:`stateless_reset` will be given.
    """

    def __init__(self, configuration: QuicConfiguration, original_id: bytes, reset_key: bytes) -> None:
        self._reset_key = reset_key
        super().__init__(configuration=configuration, original_destination_connection_id=original_id)

    def _create_tls(self, remote_source_cid: bytes | None) -> QuicTlsBridge:
        bridge = super()._create_tls(remote_source_cid)
        bridge.stateless_reset_token = _token(self._reset_key, self.host_cid)
        bridge.tls.handshake_extensions = [(ExtensionType.QUIC_TRANSPORT_PARAMETERS, bridge.serialize_transport_parameters())]
        return bridge


def stateless_reset(key: bytes, connection_id: bytes, datagram_bytes: int) -> bytes | None:
    """The datagram that tells a client that its connection is not known here.

    Args:
        connection_id: what the client's datagram was addressed to.
        datagram_bytes: its length. The answer is shorter, so that two ends that know nothing of each other soon stop; None when it cannot be.
    """
    size = min(datagram_bytes - 1, _MAX_BYTES)
    if size < _MIN_BYTES:
        return None
    return bytes((0x40 | os.urandom(1)[0] & 0x3F,)) + os.urandom(size - 1 - _TOKEN_BYTES) + _token(key, connection_id)


def _token(key: bytes, connection_id: bytes) -> bytes:
    return hmac.digest(key, connection_id, "sha256")[:_TOKEN_BYTES]
