"""One client's conversation in openpi's protocol, without sockets or a clock (reference/wire.md §1).

The transport hands in what came and when; it gets back requests and the frames to send::

    client                                server
      ── connect ───────────────────────────▶
      ◀────────────── hello (binary): metadata
      ── observation (binary) ──────────────▶
      ◀─── reply (binary), or error (text) ───
      …

An error does not end the conversation: the next observation is served as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hosting.policy import MessageError, Observation, Reply
from hosting.protocol import msgpack_numpy


@dataclass(frozen=True)
class Request:
    """One observation, and when its last byte came (seconds of the transport's clock)."""

    observation: Observation
    arrived_s: float


class Connection:
    """State of one conversation: only the duration of its previous request."""

    def __init__(self) -> None:
        self._prev_total_ms: float | None = None

    def hello(self, metadata: Mapping[str, Any]) -> bytes:
        """The first frame of a conversation."""
        return msgpack_numpy.pack(dict(metadata))

    def receive(self, message: bytes | str, now_s: float) -> Request:
        """One message of the client → its request.

        Raises:
            MessageError: it is not a msgpack map in a binary frame.
        """
        if isinstance(message, str):
            raise MessageError("the request came as a text frame, expected a binary frame with a msgpack map")
        observation = msgpack_numpy.unpack(message)
        if not isinstance(observation, dict):
            raise MessageError(f"the request is a {type(observation).__name__}, expected a map of observation keys to values")
        return Request(observation, now_s)

    def reply(self, result: Reply, *, infer_ms: float) -> bytes:
        """The frame for the policy's ``result``; ``server_timing`` is set here and replaces any the policy gave.

        Args:
            infer_ms: time the policy took, in ms; the wait for its turn included.
        """
        timing = {"infer_ms": infer_ms}
        if self._prev_total_ms is not None:
            timing["prev_total_ms"] = self._prev_total_ms
        return msgpack_numpy.pack({**result, "server_timing": timing})

    def sent(self, request: Request, now_s: float) -> None:
        """The answer to ``request`` has been handed to the network; the next reply reports how long it took from arrival."""
        self._prev_total_ms = (now_s - request.arrived_s) * 1e3
