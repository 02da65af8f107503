"""A model for the HUD robot harness (reference/peers.md §2) that concurrent rollouts may share. Needs nothing of HUD.

::

    agent.model = PooledModel("ws://server:8000")                  # every rollout asks for itself
    agent.model = BatchedModel(PooledModel("ws://server:8000"))    # rollouts that ask together are one request
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import LifoQueue
from types import TracebackType
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from hosting.clients.client import Client, ClientOptions
from hosting.clients.errors import ConnectionLostError, InferenceError, TaskDoneError


class PooledModel:
    """A policy server as HUD's ``Model``: ``infer`` and ``ainfer``, safe to call from any thread, task and loop at once.

    Each request has a connection of the pool to itself, made when it is first needed. As a model is stateless by HUD's contract,
    an observation without ``session_id`` begins a session of its own (``reset``), so that no rollout meets another's.

    Args:
        url: see :func:`hosting.clients.connect`.
        size: how many requests may be under way.
        response_key: which array of the reply are the actions.
        options: as :class:`~hosting.clients.client.Client`.

    Raises:
        ValueError: ``size`` is less than 1.
    """

    def __init__(self, url: str = "ws://localhost:8000", *, size: int = 8, response_key: str = "actions", **options: Unpack[ClientOptions]) -> None:
        if size < 1:
            raise ValueError(f"size: got {size}, expected at least 1")
        self.url = url
        self.response_key = response_key
        self._options = options
        # The one used last first, so that no more connections are made than there are requests side by side.
        self._clients: LifoQueue[Client | None] = LifoQueue()
        for _ in range(size):
            self._clients.put(None)
        self._size = size
        self._closed = False
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="hud model")

    def infer(self, batch: Any) -> NDArray[np.float32]:
        """Actions for one observation, ``[1, T, A]``, or for N, ``[N, T, A]``, in one request.

        Args:
            batch: one observation map; or N of them in a list; or, as HUD's ``BatchedModel`` stacks them, a map whose every value
                is a list of N items or an array or tensor with a first axis of N, at least one of them a list. A map whose
                prompt is a text is therefore always one observation.

        Raises:
            TaskDoneError: nothing is left to do for one of them, so it has no actions; ``BatchedModel`` tells all who asked together.
            InferenceError: the server refused or failed the request, or its reply does not have the actions.
            ClientError: as :meth:`Client.infer <hosting.clients.client.Client.infer>`.
            ValueError: N is 0.
        """
        if (rows := _rows(batch)) is not None:
            return self._actions([_as_numpy(row) for row in rows], batched=True)
        return self._actions([_as_numpy(batch)], batched=False)[None]

    async def ainfer(self, obs: Mapping[str, Any]) -> NDArray[np.float32]:
        """Actions ``[T, A]`` for one observation; errors as :meth:`infer`."""
        if self._closed:
            raise ConnectionLostError("this model has been closed; make a new one")
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: self._actions([_as_numpy(obs)], batched=False))

    def close(self) -> None:
        """Close the connections; waits for the requests under way."""
        self._closed = True
        self._threads.shutdown()
        for client in [self._clients.get() for _ in range(self._size)]:
            if client is not None:
                client.close()
            self._clients.put(None)

    def __enter__(self) -> PooledModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _actions(self, rows: Sequence[Mapping[str, Any]], *, batched: bool) -> NDArray[np.float32]:
        if self._closed:
            raise ConnectionLostError("this model has been closed; make a new one")
        client = self._clients.get()
        try:
            client = client or Client(self.url, **self._options)
            if client.get_server_metadata().get("server_name") == "tandem":
                rows = [row if "session_id" in row else {"reset": True, **row} for row in rows]
            reply = client.infer_batch(rows) if batched else client.infer(rows[0])
        finally:
            self._clients.put(client)
        actions = reply.get(self.response_key)
        if not isinstance(actions, np.ndarray):
            TaskDoneError.check(reply)
        if actions is None:
            raise InferenceError(f"the reply has no {self.response_key!r} but {', '.join(map(repr, reply))}; give response_key=…")
        result = np.asarray(actions, np.float32)
        if result.ndim != 2 + batched or (batched and len(result) != len(rows)):
            expected = f"[{len(rows)}, T, A]" if batched else "[T, A]"
            raise InferenceError(f"{self.response_key}: has shape {list(result.shape)}, expected {expected}")
        return result


def _rows(batch: Any) -> list[Mapping[str, Any]] | None:
    """The observations of a batch; None for a single observation."""
    if not isinstance(batch, Mapping):
        return list(batch)
    stacked = all(isinstance(value, list) or getattr(value, "ndim", 0) for value in batch.values())
    if not stacked or not any(isinstance(value, list) for value in batch.values()):
        return None
    sizes = {len(value) for value in batch.values()}
    return [{key: value[row] for key, value in batch.items()} for row in range(sizes.pop())] if len(sizes) == 1 else None


def _as_numpy(value: Any) -> Any:
    """``value`` with its PyTorch tensors as arrays, without importing PyTorch."""
    if isinstance(value, Mapping):
        return {key: _as_numpy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_numpy(item) for item in value]
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value
