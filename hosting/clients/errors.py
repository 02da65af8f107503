"""What a client raises. Errors that come from the server keep its text word for word.

::

    TandemError
    └── ClientError
        ├── ConnectError            no conversation could be begun; nothing was sent
        │   └── AuthenticationError     the server wants another API key, or the client another certificate
        ├── ConnectionLostError     the conversation broke; whether the last request was served is unknown
        ├── ReplyTimeoutError       no reply in time (also a TimeoutError)
        ├── CrossedReplyError       the reply belongs to another request; the connection is closed
        └── InferenceError          the server refused or failed this request; the connection is still good
            └── TaskDoneError           nothing is left to do, says the planner, so there are no actions
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hosting.done_subtasks import done_rows
from pi0.errors import TandemError


class ClientError(TandemError):
    """Root of what a client raises."""


class ConnectError(ClientError):
    """The server cannot be reached, or does not greet as a policy server does."""


class AuthenticationError(ConnectError):
    """The server does not take this API key, or its certificate is not the one that was expected."""


class ConnectionLostError(ClientError):
    """The connection broke while a reply was awaited, or before the request could be sent whole."""


class ReplyTimeoutError(ClientError, TimeoutError):
    """No reply came in time. The late one will never be returned as the answer to something else."""


class CrossedReplyError(ClientError):
    """A reply carries another request's id."""


class InferenceError(ClientError):
    """The server refused or failed a request.

    Attributes:
        code: the server's name for the kind of failure (``observation``, ``overloaded``, …), or None when it only sent text.
    """

    def __init__(self, text: str, *, code: str | None = None) -> None:
        super().__init__(text)
        self.code = code


class TaskDoneError(InferenceError):
    """Nothing is left to do, says the planner (``planner.done_subtasks`` in the server's configuration), so there are no actions. Stop, or ask again
    later: the planner may say something else of another picture or task.

    :meth:`Client.infer <hosting.clients.client.Client.infer>` returns such a reply, a map without ``actions`` whose ``subtask`` has ``done`` true.
    This is for those who are asked for nothing but actions.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text, code="done")

    @classmethod
    def check(cls, reply: Mapping[str, Any]) -> None:
        """Raise one where ``reply``, which lacks actions, says that they are not needed."""
        for index, text in done_rows(reply).items():
            row = f"batch[{index}]: " if isinstance(reply["subtask"], list) else ""
            raise cls(f"{row}nothing is left to do, the planner says {text!r}, so there are no actions")
