"""One action at a time from a policy that answers with chunks (reference/wire.md §3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from hosting.clients.errors import TaskDoneError


class ChunkPolicy(Protocol):
    """What the broker asks: a :class:`~hosting.clients.client.Client`, or a policy in this process."""

    def infer(self, obs: Mapping[str, Any], /) -> dict[str, Any]: ...

    def reset(self) -> None: ...


class ActionChunkBroker:
    """Plays ``action_horizon`` steps of a chunk, open loop, before it asks the policy again.

    Every array of the reply, however deep, is indexed by the step; all else is passed through. The observations of the steps in
    between are not looked at.

    Args:
        policy: answers with chunks.
        action_horizon: how many steps of each chunk are executed, at most as many as it has.

    Raises:
        ValueError: ``action_horizon`` is less than 1.
    """

    def __init__(self, policy: ChunkPolicy, action_horizon: int) -> None:
        if action_horizon < 1:
            raise ValueError(f"action_horizon: got {action_horizon}, expected at least 1")
        self._policy = policy
        self._horizon = action_horizon
        self._chunk: dict[str, Any] | None = None
        self._step = 0

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        """The reply of the present step; arrays ``[H, …]`` come as ``[…]``.

        Raises:
            TaskDoneError: nothing is left to do, so the reply has no actions; the next call asks again.
            IndexError: an array of the reply has fewer steps than ``action_horizon``.
        """
        if self._chunk is None:
            chunk = self._policy.infer(obs)
            if "actions" not in chunk:
                TaskDoneError.check(chunk)
            self._chunk, self._step = chunk, 0
        result: dict[str, Any] = self._at_step(self._chunk, ())
        self._step += 1
        if self._step >= self._horizon:
            self._chunk = None
        return result

    def reset(self) -> None:
        """Drop the chunk and reset the policy."""
        self._chunk = None
        self._policy.reset()

    def _at_step(self, value: Any, path: tuple[str, ...]) -> Any:
        match value:
            case np.ndarray():
                if not value.ndim or self._step >= len(value):
                    raise IndexError(f"{'.'.join(path)}: has shape {list(value.shape)}, so there is no step {self._step} of {self._horizon}")
                return value[self._step, ...]
            case dict():
                return {key: self._at_step(item, (*path, str(key))) for key, item in value.items()}
            case list() | tuple():
                return type(value)(self._at_step(item, (*path, str(index))) for index, item in enumerate(value))
            case _:
                return value
