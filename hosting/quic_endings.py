"""Why QUIC connections end, in words for people."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from hosting.quic_settings import ALPN

_NO_ERROR = 0
_TLS_ALERT = 0x100
_CERTIFICATE_ALERTS = range(_TLS_ALERT + 42, _TLS_ALERT + 50)
_DECRYPT_ERROR = _TLS_ALERT + 51
_NO_APPLICATION_PROTOCOL = _TLS_ALERT + 120


class Why(Enum):
    """Why a connection ended, as far as callers have to know."""

    CLOSED = "closed"
    IDLE = "idle"
    CERTIFICATE = "certificate"
    PROTOCOL = "protocol"


class Ended(NamedTuple):
    """How a connection ended."""

    why: Why
    text: str


def ending(code: int, phrase: str) -> Ended:
    """A CONNECTION_CLOSE in words for people. Codes: RFC 9000 §20.1; TLS alerts are 0x100 above theirs (RFC 9001 §4.8)."""
    if phrase == "Idle timeout":
        return Ended(Why.IDLE, "nothing was heard from the other side for too long")
    if code == _NO_APPLICATION_PROTOCOL or "ALPN" in phrase:
        return Ended(Why.PROTOCOL, f"the two sides have no application protocol in common; this one speaks {ALPN!r}")
    if code in _CERTIFICATE_ALERTS or code == _DECRYPT_ERROR:
        return Ended(Why.CERTIFICATE, phrase)
    if code == _NO_ERROR:
        return Ended(Why.CLOSED, phrase or "the other side closed the connection, or was started anew and does not know it")
    return Ended(Why.PROTOCOL, f"{phrase or 'protocol error'} (QUIC error 0x{code:x})")
