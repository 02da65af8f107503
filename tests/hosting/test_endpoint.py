"""A slot's door: closed while it loads, open, then draining."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from hosting import __version__
from hosting.endpoint import Endpoint
from hosting.policy import DrainingError, ModeError
from hosting.routing import action_route
from hosting.scheduler import SlotWorker
from tests.serving import EchoPolicy

METADATA = {"action_horizon": 10, "server_name": "the policy's"}


@pytest.fixture
def worker() -> Iterator[SlotWorker]:
    worker = SlotWorker("action")
    yield worker
    worker.close()


@pytest.fixture
async def endpoint(worker: SlotWorker) -> Endpoint:
    endpoint = Endpoint("action", {"action": worker})
    endpoint.open(action_route(EchoPolicy()), METADATA)
    return endpoint


async def test_clients_wait_until_it_opens(worker: SlotWorker) -> None:
    endpoint = Endpoint("action", {"action": worker})
    waiting = asyncio.create_task(endpoint.opened())
    await asyncio.sleep(0)
    assert not waiting.done() and not endpoint.ready and endpoint.metadata == {}
    with pytest.raises(DrainingError):
        await endpoint.infer({})
    endpoint.open(action_route(EchoPolicy()), METADATA)
    await waiting
    assert endpoint.ready


async def test_closing_lets_those_go_who_wait_for_it_to_open(worker: SlotWorker) -> None:
    endpoint = Endpoint("action", {"action": worker})
    waiting = asyncio.create_task(endpoint.opened())
    await asyncio.sleep(0)
    endpoint.close()
    await waiting
    assert endpoint.draining and not endpoint.ready


async def test_metadata_says_who_serves(endpoint: Endpoint) -> None:
    assert endpoint.metadata == {"action_horizon": 10, "server_name": "tandem", "server_version": __version__, "slot": "action"}


async def test_a_request_is_served_and_timed(endpoint: Endpoint) -> None:
    reply, ms = await endpoint.infer({"prompt": "x"})
    assert reply["asked"] == {"prompt": "x"} and ms > 0


async def test_draining_waits_for_what_was_accepted_and_takes_nothing_new(worker: SlotWorker) -> None:
    entered, released = threading.Event(), threading.Event()

    def hold(obs: object) -> None:
        entered.set()
        assert released.wait(30)

    endpoint = Endpoint("action", {"action": worker})
    endpoint.open(action_route(EchoPolicy(hold)), {})
    accepted = [asyncio.create_task(endpoint.infer({"prompt": i})) for i in range(2)]
    assert await asyncio.to_thread(entered.wait, 30)
    draining = asyncio.create_task(endpoint.drain())
    await asyncio.sleep(0)
    assert not endpoint.ready and not draining.done()
    with pytest.raises(DrainingError, match=r"^the server is shutting down; the action endpoint takes no new requests$"):
        await endpoint.infer({"prompt": "late"})
    released.set()
    assert [reply["asked"]["prompt"] for reply, _ in await asyncio.gather(*accepted)] == ["0", "1"]
    await draining


async def test_a_failed_request_does_not_hold_up_the_drain(endpoint: Endpoint) -> None:
    with pytest.raises(ModeError):
        await endpoint.infer({"mode": "x"})
    await endpoint.drain()
