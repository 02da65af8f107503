"""The settings of our QUIC connections. With ``hosting/quic.py`` the only module that knows qh3."""

from __future__ import annotations

import ssl

from qh3.quic.configuration import QuicConfiguration

from hosting.certificates import Certificate

ALPN = "tandem/1"
CONNECTION_ID_BYTES = 8
IDLE_TIMEOUT_S = 600.0
"""Of both ends: a robot that pauses for minutes keeps its connection and need not keep it alive."""
DATAGRAM_BYTES = 1200
"""To begin with: what every path must carry (RFC 9000 §14). A client's path-MTU discovery goes on from there; qh3's own 1280 never get through a
link with an MTU of 1280, as some VPNs have."""
LOOPBACK_DATAGRAM_BYTES = 8120
"""Within one machine (environment-and-quic.md §2.3). 16 KB and more stall small requests in the pacer; of 8192 bytes, one system call
would take 7, not 8."""


def server_configuration(certificate: Certificate, *, idle_timeout_s: float = IDLE_TIMEOUT_S) -> QuicConfiguration:
    """What a server's connections share; connections that come after a change of it use the change."""
    configuration = _configuration(idle_timeout_s, is_client=False)
    configuration.load_cert_chain(certificate.chain_pem, certificate.key_pem)
    return configuration


def client_configuration(
    server_name: str,
    *,
    pin: str | None = None,
    cafile: str | None = None,
    verify: bool = True,
    loopback: bool = False,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
) -> QuicConfiguration:
    """Of one connection.

    Args:
        server_name: what the certificate must be for, when a CA vouches for it.
        pin: the certificate's SHA-256 in 64 lower-case digits; it then is what is checked, and nothing else.
        cafile: PEM certificates to trust instead of the system's.
        verify: False takes any certificate.
        loopback: the peer is on this machine, where datagrams may be large.
    """
    configuration = _configuration(idle_timeout_s, is_client=True)
    configuration.server_name = server_name
    if pin is not None:
        configuration.verify_mode, configuration.assert_fingerprint = ssl.CERT_NONE, pin
    elif verify:
        configuration.verify_mode, configuration.cafile = ssl.CERT_REQUIRED, cafile
    else:
        configuration.verify_mode = ssl.CERT_NONE
    if loopback:
        configuration.max_datagram_size = LOOPBACK_DATAGRAM_BYTES
    return configuration


def _configuration(idle_timeout_s: float, *, is_client: bool) -> QuicConfiguration:
    return QuicConfiguration(
        is_client=is_client,
        alpn_protocols=[ALPN],
        connection_id_length=CONNECTION_ID_BYTES,
        idle_timeout=idle_timeout_s,
        max_datagram_size=DATAGRAM_BYTES,
    )
