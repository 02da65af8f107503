"""One client's conversation, without sockets, threads or a clock (reference/wire.md §1, §4.1; reference/peers.md §1).

The transport hands in what came and when; it gets back typed requests, and the messages that answer them::

    client                                server
      ── connect ───────────────────────────▶
      ◀────────────── hello: metadata          (a WebSocket's comes unasked; elsewhere METADATA asks for it)
      ── observation ───────────────────────▶
      ◀─────────────── reply, or an error
      …

An error does not end the conversation: the next observation is served as if nothing had happened. Answers are made of the
:class:`Call` they belong to, so several may be under way at once.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hosting.done_subtasks import done_rows
from hosting.policy import DoneError, MessageError, Reply, UnauthorizedError
from hosting.protocol import local_frame, msgpack_numpy
from hosting.protocol.messages import Message, MessageType
from hosting.protocol.msgpack_numpy import Dialect
from hosting.protocol.profiles import OPENPI, Profile
from hosting.protocol.requests import InferRequest, MetadataRequest, Request, ResetRequest, parse_request

RESET_TEXT = "reset successful"


@dataclass(frozen=True, slots=True)
class Call:
    """A request, and what its answer has to look like.

    Attributes:
        asked: the :class:`MessageType` it came as.
        arrived_s: when its last byte came, in seconds of the transport's clock.
        schema_id: of a local frame; the answer carries it too.
    """

    request: Request
    asked: int
    arrived_s: float
    schema_id: str = ""


class Connection:
    """State of one conversation: its profile, the array dialect its client speaks, and how long its previous request took.

    Args:
        profile: what the client expects; chosen before the first message.
        api_key: a key that METADATA must bring before anything else is answered; None where the transport has seen to it.
    """

    def __init__(self, profile: Profile = OPENPI, *, api_key: str | None = None) -> None:
        self.profile = profile
        self._api_key = api_key
        self._dialect: Dialect | None = None
        self._prev_total_ms: float | None = None
        self._answered: Call | None = None

    def hello(self, metadata: Mapping[str, Any]) -> Message:
        """The greeting.

        Raises:
            RequestError: the profile cannot be served.
        """
        return Message(MessageType.METADATA_REPLY, msgpack_numpy.pack(self.profile.hello(metadata)))

    def receive(self, message: Message, now_s: float) -> Call:
        """One message of the client → its call.

        Raises:
            MessageError: it is not a request.
            UnauthorizedError: the key is missing or wrong.
        """
        if self._api_key is not None and message.type != MessageType.METADATA:
            raise UnauthorizedError("unauthorized: this server wants an API key before anything else; send it with the metadata request")
        match message.type:
            case MessageType.INFER:
                value, dialect = msgpack_numpy.unpack_with_dialect(message.body)
                self._dialect = self._dialect or dialect
                return Call(parse_request(value), message.type, now_s)
            case MessageType.INFER_FRAME:
                frame = local_frame.decode(message.body)
                return Call(parse_request(frame.value), message.type, now_s, frame.schema_id)
            case MessageType.RESET:
                return Call(parse_request({**_fields(message, "session_id", "session_ids"), "endpoint": "reset"}), message.type, now_s)
            case MessageType.METADATA:
                self._authorize(_fields(message, "api_key").get("api_key"))
                return Call(MetadataRequest(), message.type, now_s)
            case MessageType.TEXT:
                raise MessageError("the request came as a text frame, expected a binary frame with a msgpack map")
            case _:
                raise MessageError(f"message type 0x{message.type:02x} is none that a server takes; expected METADATA, INFER or RESET")

    def reply(self, call: Call, result: Reply, *, infer_ms: float, acting: bool = True) -> Message:
        """The message for what the policy gave; ``server_timing`` is set here and replaces any that it gave.

        Args:
            infer_ms: time the policy took, in ms; the wait for its turn included.
            acting: whether the client asked for actions, as long as its mode does not say otherwise.

        Raises:
            DoneError: nothing is left to do, and the client takes no reply that could say so.
            ValueError, TypeError, OverflowError: the result has something that the wire does not.
        """
        actions = result.get("actions")
        if acting and not isinstance(actions, np.ndarray):
            self._check_done(call, result)
        self._answered = call
        if call.asked == MessageType.INFER and self.profile.reply != "map" and actions is not None:
            return Message(MessageType.REPLY, self._pack(self._arrays(result)))
        timing = {"infer_ms": infer_ms}
        if self._prev_total_ms is not None:
            timing["prev_total_ms"] = self._prev_total_ms
        full = {**result, "server_timing": timing}
        if isinstance(call.request, InferRequest):
            full |= _echo(call.request)
        if call.asked == MessageType.INFER_FRAME:
            return Message(MessageType.FRAME_REPLY, local_frame.encode(full, call.schema_id))
        if self.profile.response_key != "actions" and actions is not None:
            full = {self.profile.response_key if key == "actions" else key: value for key, value in full.items()}
        return Message(MessageType.REPLY, self._pack(full))

    def reset_done(self, call: Call) -> Message:
        """The message that confirms a reset."""
        if call.asked == MessageType.RESET:
            return Message(MessageType.RESET_REPLY, b"")
        assert isinstance(call.request, ResetRequest)
        status = {"status": RESET_TEXT, **call.request.echo}
        if call.asked == MessageType.INFER_FRAME:
            return Message(MessageType.FRAME_REPLY, local_frame.encode(status, call.schema_id))
        if self.profile.acks_reset_with == "map":
            return Message(MessageType.REPLY, self._pack(status))
        return Message(MessageType.RESET_REPLY, RESET_TEXT.encode())

    def failure(self, message: Message, call: Call | None, *, code: str, text: str) -> Message:
        """The message that says that ``message`` failed.

        Args:
            call: what :meth:`receive` made of it, unless it was that which failed.
        """
        if message.type != MessageType.INFER or self.profile.errors == "text":
            return Message(MessageType.ERROR, text.encode())
        echo = _echo(call.request) if call is not None and isinstance(call.request, InferRequest) else {}
        return Message(MessageType.FAILURE, msgpack_numpy.pack({"type": "error", "code": code, "message": text, **echo}))

    def sent(self, now_s: float) -> None:
        """The last reply has been handed to the network; the next one reports how long its request took from arrival."""
        if self._answered is not None:
            self._prev_total_ms = (now_s - self._answered.arrived_s) * 1e3

    def _authorize(self, key: Any) -> None:
        if self._api_key is None:
            return
        if not isinstance(key, str) or not hmac.compare_digest(key.encode(), self._api_key.encode()):
            raise UnauthorizedError(f"unauthorized: {'no API key came' if key is None else 'this is not the API key'}; give the server's api_key")
        self._api_key = None

    def _check_done(self, call: Call, result: Reply) -> None:
        """A reply without actions, or without those of some rows (a list), says so in ``subtask.done``. Where only arrays are taken it cannot, nor
        can a local frame have arrays in a list."""
        some = result.get("actions") is not None
        if not isinstance(call.request, InferRequest) or not (some if call.asked == MessageType.INFER_FRAME else self.profile.reply != "map"):
            return
        for index, text in done_rows(result).items():
            if some or call.request.rows[index].observation.get("mode") != "subtask_only":
                row, remedy = (f"batch[{index}]: ", "leave this row out") if call.request.batched else ("", "stop")
                raise DoneError(f"{row}nothing is left to do, the planner says {text!r}, so there are no actions; {remedy}")

    def _arrays(self, result: Reply) -> Any:
        if self.profile.reply == "array":
            return np.asarray(result["actions"], np.float32)
        arrays = {key: np.asarray(value, np.float32) for key, value in result.items() if isinstance(value, np.ndarray)}
        return {self.profile.response_key if key == "actions" else key: value for key, value in arrays.items()}

    def _pack(self, value: Any) -> bytes:
        return msgpack_numpy.pack(value, self._dialect or Dialect.OPENPI)


def _fields(message: Message, *known: str) -> dict[str, Any]:
    """The map in the body of a message that may also be empty."""
    if not len(message.body):
        return {}
    value = msgpack_numpy.unpack(message.body)
    if not isinstance(value, dict):
        raise MessageError(f"the body of message type 0x{message.type:02x} is a {type(value).__name__}, expected nothing or a map")
    if unknown := [key for key in value if key not in known]:
        raise MessageError(f"the body of message type 0x{message.type:02x} has {unknown[0]!r:.60}, expected nothing but {', '.join(known)}")
    return value


def _echo(request: InferRequest) -> dict[str, Any]:
    if not request.batched:
        return dict(request.rows[0].echo)
    keys = dict.fromkeys(key for row in request.rows for key in row.echo)
    return {key: [row.echo.get(key) for row in request.rows] for key in keys}
