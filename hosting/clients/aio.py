"""The client for asyncio: the blocking one on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar, Unpack

from hosting.clients.client import Client, ClientOptions, Observation, Reply
from hosting.clients.errors import ConnectionLostError

T = TypeVar("T")


class AsyncClient:
    """:class:`~hosting.clients.client.Client` with coroutines; made by :meth:`connect`. Tasks may share it: their requests take turns.

    A coroutine that is cancelled returns at once. Its request runs to its end unseen (its reply is nobody's), and requests after it
    wait for that, so ``timeout_s`` is worth setting. For requests side by side, use several clients.
    """

    def __init__(self, worker: _Worker, client: Client) -> None:
        self._worker = worker
        self._client = client

    @classmethod
    async def connect(cls, url: str, **options: Unpack[ClientOptions]) -> AsyncClient:
        """The client of the server at ``url``; options and errors are those of :class:`~hosting.clients.client.Client`."""
        worker = _Worker()
        connecting = worker.begin(lambda: Client(url, **options))
        try:
            return cls(worker, await asyncio.wrap_future(connecting))
        except BaseException:

            def close_what_came() -> None:
                if not connecting.cancelled() and connecting.exception() is None:
                    connecting.result().close()

            worker.begin(close_what_came)
            worker.end()
            raise

    async def infer(
        self,
        obs: Observation,
        *,
        timeout_s: float | None = None,
        deadline_ms: float | None = None,
        seed: int | None = None,
        session_id: str | None = None,
    ) -> Reply:
        """As :meth:`Client.infer <hosting.clients.client.Client.infer>`."""
        return await self._worker.run(lambda: self._client.infer(obs, timeout_s=timeout_s, deadline_ms=deadline_ms, seed=seed, session_id=session_id))

    async def infer_batch(self, observations: Sequence[Observation], *, timeout_s: float | None = None) -> Reply:
        """As :meth:`Client.infer_batch <hosting.clients.client.Client.infer_batch>`."""
        return await self._worker.run(lambda: self._client.infer_batch(observations, timeout_s=timeout_s))

    async def reset(self, *, timeout_s: float | None = None) -> None:
        """As :meth:`Client.reset <hosting.clients.client.Client.reset>`."""
        await self._worker.run(lambda: self._client.reset(timeout_s=timeout_s))

    def get_server_metadata(self) -> dict[str, Any]:
        """What the server said when the present connection was made."""
        return self._client.get_server_metadata()

    @property
    def address(self) -> str:
        """Where the present connection leads: for ``auto://``, what was chosen."""
        return self._client.address

    async def close(self) -> None:
        """End the conversation; a request that nobody waits for any more is not waited for."""
        if self._worker.ended:
            return
        idle = self._worker.idle
        closing = self._worker.begin(self._client.close)
        self._worker.end()
        if idle:
            await asyncio.wrap_future(closing)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.close()


async def connect_async(url: str, **options: Unpack[ClientOptions]) -> AsyncClient:
    """An :class:`AsyncClient` of the server at ``url``."""
    return await AsyncClient.connect(url, **options)


class _Worker:
    """Runs one call after the other on its thread, which never keeps the process alive."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._unfinished = 0
        self._counting = threading.Lock()
        self.ended = False
        threading.Thread(target=self._work, name="policy client", daemon=True).start()

    @property
    def idle(self) -> bool:
        return self._unfinished == 0

    async def run(self, call: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self.begin(call))

    def begin(self, call: Callable[[], T]) -> Future[T]:
        """Have ``call`` run after those before it.

        Raises:
            ConnectionLostError: the client is closed.
        """
        if self.ended:
            raise ConnectionLostError("this client has been closed; make a new one")
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._counting:
            self._unfinished += 1
        future.add_done_callback(self._finished)
        self._calls.put(run)
        return future

    def end(self) -> None:
        """Nothing more will come."""
        self.ended = True
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()

    def _finished(self, _: Future[Any]) -> None:
        with self._counting:
            self._unfinished -= 1
