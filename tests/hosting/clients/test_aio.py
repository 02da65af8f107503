"""The asyncio client: its thread, cancelling, closing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hosting.clients import AsyncClient, ConnectError, ConnectionLostError, InferenceError, connect_async
from hosting.protocol.messages import Message, MessageType
from tests.hosting.clients.scripted import StubLink, echoed
from tests.serving import service_config, start, stubs


class Held:
    """An answer that comes when it is let go."""

    def __init__(self) -> None:
        self.working, self.finish = threading.Event(), threading.Event()

    def __call__(self, asked: Message) -> Message:
        self.working.set()
        assert self.finish.wait(30)
        return echoed(asked)

    async def is_working(self) -> None:
        assert await asyncio.to_thread(self.working.wait, 30)


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.finish.set()


@pytest.fixture
def over(monkeypatch: pytest.MonkeyPatch) -> Callable[[StubLink], None]:
    """Makes every address lead to this link."""
    return lambda link: monkeypatch.setattr("hosting.clients.client.dial", lambda url, *_: (url, link))


async def test_a_real_service() -> None:
    with start(service_config("action"), stubs()) as service:
        async with await connect_async(service.addresses["action"]) as client:
            assert client.get_server_metadata()["slot"] == "action" and client.address == service.addresses["action"]
            assert (await client.infer({"prompt": "x"}))["asked"] == {"prompt": "x"}
            assert (await client.infer_batch([{"prompt": "x"}] * 3))["actions"].shape == (3, 10, 14)
            await client.reset()
            with pytest.raises(InferenceError, match="mode: got 'wrong'"):
                await client.infer({"mode": "wrong"})
        with pytest.raises(ConnectionLostError, match=r"^this client has been closed; make a new one$"):
            await client.infer({})
        await client.close()


async def test_what_is_passed_on(over: Callable[[StubLink], None]) -> None:
    link = StubLink(metadata={})
    over(link)
    client = await AsyncClient.connect("ws://robot", session_id="a", timeout_s=9.0)
    await client.infer({"n": 1}, timeout_s=5.0, deadline_ms=50.0, seed=7, session_id="b")
    assert link.maps == [{"n": 1, "deadline_ms": 50.0, "seed": 7, "session_id": "b"}] and link.timeouts_s[0] == pytest.approx(5.0, abs=1.0)
    await client.close()
    assert link.closed


async def test_tasks_take_turns(over: Callable[[StubLink], None]) -> None:
    over(StubLink())
    async with await connect_async("ws://robot") as client:
        answers = await asyncio.gather(*(client.infer({"n": n}) for n in range(20)))
    assert [answer["n"] for answer in answers] == list(range(20))


async def test_the_loop_goes_on_while_a_request_is_under_way(over: Callable[[StubLink], None], held: Held) -> None:
    over(StubLink(held))
    async with await connect_async("ws://robot") as client:
        asking = asyncio.create_task(client.infer({"n": 1}))
        await held.is_working()
        held.finish.set()
        assert (await asking)["n"] == 1


async def test_the_late_answer_to_a_cancelled_request_is_nobodys(over: Callable[[StubLink], None], held: Held) -> None:
    link = StubLink(held)
    over(link)
    async with await connect_async("ws://robot") as client:
        cancelled = asyncio.create_task(client.infer({"n": 1}))
        await held.is_working()
        never_begun = asyncio.create_task(client.infer({"n": 2}))
        await asyncio.sleep(0)
        cancelled.cancel()
        never_begun.cancel()
        outcomes = await asyncio.gather(cancelled, never_begun, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 2
        asking = asyncio.create_task(client.infer({"n": 3}))
        held.finish.set()
        assert (await asking)["n"] == 3
    assert [asked["n"] for asked in link.maps] == [1, 3]


async def test_closing_does_not_wait_for_what_nobody_waits_for(over: Callable[[StubLink], None], held: Held) -> None:
    link = StubLink(held)
    over(link)
    client = await connect_async("ws://robot")
    asking = asyncio.create_task(client.infer({"n": 1}))
    await held.is_working()
    asking.cancel()
    await client.close()
    assert not link.closed and not held.finish.is_set()


async def test_a_server_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> Any:
        raise ConnectError("nobody there")

    monkeypatch.setattr("hosting.clients.client.dial", refused)
    with pytest.raises(ConnectError, match=r"^nobody there$"):
        await connect_async("ws://robot")


async def test_connecting_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    connecting, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    class Link(StubLink):
        def close(self) -> None:
            closed.set()

    def slow(url: str, *arguments: Any) -> Any:
        connecting.set()
        assert go_on.wait(30)
        return url, Link(Message(MessageType.REPLY, b""))

    monkeypatch.setattr("hosting.clients.client.dial", slow)
    task = asyncio.create_task(connect_async("ws://robot"))
    assert await asyncio.to_thread(connecting.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert await asyncio.to_thread(closed.wait, 30), "the connection that nobody waits for any more is closed"
