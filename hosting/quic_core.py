"""qh3's connection without the work that it does, datagram by datagram, for a log that is off.

It parses every packet that it has just made, and copies every datagram that it receives: about a third of what 600 kB cost
(docs/benchmarks.md).
"""

from __future__ import annotations

from typing import Any

from qh3.quic.connection import QuicConnection


class QuietConnection(QuicConnection):  # type: ignore[misc]  # mypy sees no types in qh3
    """As its parent, which has it in its power to log and is never asked to."""

    def receive_gro_buffer(self, buffer: bytes, segment_size: int, addr: Any, now: float) -> None:
        if self._core is None or not self._handshake_complete or segment_size <= 0:
            super().receive_gro_buffer(buffer, segment_size, addr, now)
            return
        self._call_core(self._core.receive_gro_buffer, buffer, segment_size, self._normalize_address(addr), now)
        self._drain_core()

    def _log_datagram(self, *args: Any) -> None:
        pass

    def _log_packets(self, *args: Any) -> None:
        pass
