"""How a client knows a server over TLS: by an authority, or by the fingerprint of its certificate."""

from __future__ import annotations

import hashlib
import hmac
import re
import socket
import ssl
from typing import Any

from hosting.clients.errors import AuthenticationError


def client_context(*, pin: str | None, cafile: str | None, verify: bool) -> ssl.SSLContext:
    """The settings of one client.

    Args:
        pin: SHA-256 of the server's certificate in hex, colons allowed; the certificate then needs no authority and no matching name.
        cafile: PEM of the authorities that are trusted instead of the system's.
        verify: False trusts any server; must be asked for.

    Raises:
        ValueError: the pin is none, or is given together with ``cafile``.
        AuthenticationError: ``cafile`` cannot be read.
    """
    if pin is not None:
        if cafile is not None:
            raise ValueError("pin and cafile: give one of them; a pinned certificate needs no authority")
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
        digits = pin.replace(":", "").lower()
        if not re.fullmatch("[0-9a-f]{64}", digits):
            raise ValueError(f"pin: got {pin[:80]!r}, expected the 64 hexadecimal digits of a certificate's SHA-256")
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
