"""An open link together with what the server said when it was opened: what can be asked of it, and what an answer means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hosting.clients.errors import ConnectError, ConnectionLostError, CrossedReplyError, InferenceError, ReplyTimeoutError, TaskDoneError
from hosting.clients.link import Buffer, Link
from hosting.protocol import msgpack_numpy
from hosting.protocol.messages import Message, MessageType
from pi0.errors import MessageError

_OURS = "tandem"


@dataclass(frozen=True)
class Request:
    """A message to send.

    Attributes:
        body: its parts.
        request_id: what the reply must carry; a list for a batch, None for nothing.
    """

    type: MessageType
    body: Sequence[Buffer]
    request_id: Any = None


class Conversation:
    """One server over one link.

    Args:
        url: where the link leads.
        link: open; closed again if the server does not greet as a policy server.

    Raises:
        ConnectError: it does not; with its words, if it said why.
    """

    def __init__(self, url: str, link: Link) -> None:
        self.url = url
        self.link = link
        try:
            self.metadata = self._map(link.hello)
            if _is_error(self.metadata):
                raise ConnectError(f"{url} refused the conversation: {_as_error(self.metadata)}")
        except ConnectionLostError as error:
            link.close()
            raise ConnectError(f"{url} does not greet as a policy server: {error}") from error
        except BaseException:
            link.close()
            raise

    @property
    def is_ours(self) -> bool:
        """Whether the server is Tandem, which repeats request ids and takes encoded images."""
        return self.metadata.get("server_name") == _OURS

    @property
    def takes_resets(self) -> bool:
        """Whether it knows a reset: ours does, and who greets with RoboArena's keys. openpi's would take it for an observation."""
        return self.is_ours or "needs_session_id" in self.metadata

    def exchange(self, request: Request, timeout_s: float | None) -> dict[str, Any]:
        """The reply's map; a bare array, as vllm-omni answers, comes as ``{"actions": array}``, the confirmation of a reset as ``{}``.

        Raises:
            InferenceError: the server says that the request failed; its text, word for word.
            ReplyTimeoutError: see :meth:`Link.exchange`.
            ConnectionLostError: see there, or what came is no answer; the link is closed.
            CrossedReplyError: it is the answer to something else; the link is closed.
        """
        try:
            return self._read(self.link.exchange(request.type, request.body, timeout_s), request.request_id)
        except (InferenceError, ReplyTimeoutError):
            raise
        except BaseException:
            self.link.close()
            raise

    def _read(self, answer: Message, request_id: Any) -> dict[str, Any]:
        match answer.type:
            case MessageType.ERROR:
                raise InferenceError(bytes(answer.body).decode(errors="replace"))
            case MessageType.RESET_REPLY:
                return {}
            case MessageType.REPLY | MessageType.FAILURE:
                reply = self._map(answer)
            case _:
                raise ConnectionLostError(f"{self.url} answered with a message of type 0x{answer.type:02x}, which is no answer to a request")
        if request_id is not None:
            _check_echo(reply, request_id)
        if answer.type == MessageType.FAILURE or _is_error(reply):
            error = _as_error(reply)
            if error.code == "draining":
                # The server is about to close the connection, as it would have closed an idle one.
                raise ConnectionLostError(f"{self.url}: {error}")
            raise error
        return reply

    def _map(self, message: Message) -> dict[str, Any]:
        try:
            value = msgpack_numpy.unpack(message.body)
        except MessageError as error:
            raise ConnectionLostError(f"what {self.url} sent cannot be read: {error}") from error
        if isinstance(value, np.ndarray):
            return {"actions": value}
        if not isinstance(value, dict):
            raise ConnectionLostError(f"{self.url} sent a {type(value).__name__}, expected a map")
        return value


def _check_echo(reply: Mapping[str, Any], request_id: Any) -> None:
    # Dialects without room for the id (bare arrays, named arrays) have none for server_timing either.
    echoed = reply.get("request_id")
    if echoed != request_id and (echoed is not None or "server_timing" in reply):
        raise CrossedReplyError(f"the reply to request {request_id} carries the id {echoed}; the connection is closed")


def _is_error(value: Mapping[str, Any]) -> bool:
    # Where a reply would be, some servers send an error's map (reference/peers.md §1.6).
    return value.get("type") == "error" and ("message" in value or "error" in value)


def _as_error(value: Mapping[str, Any]) -> InferenceError:
    code, text = value.get("code"), str(value.get("message", value.get("error", value)))
    return TaskDoneError(text) if code == "done" else InferenceError(text, code=None if code is None else str(code))
