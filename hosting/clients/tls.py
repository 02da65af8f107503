"""How a client knows a server over TLS: by an authority, or by the fingerprint of its certificate."""

from __future__ import annotations

import hashlib
import hmac
import socket
import ssl
from typing import Any

from hosting.certificates import normalize_sha256
from hosting.clients.errors import AuthenticationError


def check_trust(url: str, *, pin: str | None, cafile: str | None) -> None:
    """Whether ``url`` leads to servers that can be known by ``pin`` or ``cafile``.

    Raises:
        ValueError: no certificate comes from there, so that anybody would pass for the server; the pin is none; or both are given.
    """
    if pin is None and cafile is None:
        return
    given = "cafile" if pin is None else "pin"
    if not has_certificate(url):
        raise ValueError(f"{given}: {url} brings no certificate to check; leave it out, or use wss:// or quic://")
    if pin is not None and cafile is not None:
        raise ValueError("pin and cafile: give one of them; a pinned certificate needs no authority")
    if pin is not None:
        normalize_sha256(pin)


def has_certificate(url: str) -> bool:
    """Whether servers at ``url`` show a certificate; true of ``auto://``, which takes no other server where one is asked for."""
    return url.partition(":")[0].lower() not in ("ws", "unix")


def client_context(*, pin: str | None, cafile: str | None, verify: bool) -> ssl.SSLContext:
    """The settings of one client.

    Args:
        pin: SHA-256 of the server's certificate in hex, colons allowed; the certificate then needs no authority and no matching name.
        cafile: PEM of the authorities that are trusted instead of the system's.
        verify: False trusts any server; must be asked for.

    Raises:
        ValueError: the pin is none.
        AuthenticationError: ``cafile`` cannot be read.
    """
    if pin is not None:
        return _Pinned(pin)
    try:
        context = ssl.create_default_context(cafile=cafile)
    except OSError as error:
        raise AuthenticationError(f"cafile: cannot read {cafile} ({error}); expected certificates in PEM") from error
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class _Pinned(ssl.SSLContext):
    """Compares fingerprints right after the handshake, before a byte of the request (and the API key in it) is sent."""

    _pin: str

    def __new__(cls, pin: str) -> _Pinned:
        digits = normalize_sha256(pin)
        context = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context._pin = digits
        return context

    def wrap_socket(self, sock: socket.socket, *args: Any, **options: Any) -> ssl.SSLSocket:
        wrapped = super().wrap_socket(sock, *args, **options)
        certificate = wrapped.getpeercert(binary_form=True)
        found = hashlib.sha256(certificate or b"").hexdigest()
        if not hmac.compare_digest(found, self._pin):
            wrapped.close()
            raise AuthenticationError(f"the server's certificate has the SHA-256 {found}, expected the pinned {self._pin}")
        return wrapped
