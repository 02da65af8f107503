"""A slot's door: closed while it loads, open, then draining."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hosting import __version__
from hosting.calls import SlotCall, Steps
from hosting.endpoint import Endpoint
from hosting.observer import Observer, Observers
from hosting.policy import DeadlineError, DrainingError, MessageError, ModeError, ObservationError
from hosting.protocol import jpeg
from hosting.protocol.requests import InferRequest, parse_request
from hosting.routing import action_route
from hosting.scheduler import SlotWorker
from tests.serving import EchoPolicy


async def serve(endpoint: Endpoint, obs: dict[str, Any]) -> dict[str, Any]:
    request = parse_request(obs)
    assert isinstance(request, InferRequest)
    return (await endpoint.serve(request, time.perf_counter(), endpoint.sessions.client(), []))[0]


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
    early = asyncio.create_task(serve(endpoint, {"prompt": "early"}))
    await asyncio.sleep(0)
    assert not waiting.done() and not early.done() and not endpoint.ready and endpoint.metadata == {}
    endpoint.open(action_route(EchoPolicy()), METADATA)
    await waiting
    assert (await early)["asked"] == {"prompt": "early"}
    assert endpoint.ready


async def test_closing_lets_those_go_who_wait_for_it_to_open(worker: SlotWorker) -> None:
    endpoint = Endpoint("action", {"action": worker})
    waiting = asyncio.create_task(endpoint.opened())
    await asyncio.sleep(0)
    early = asyncio.create_task(serve(endpoint, {}))
    await asyncio.sleep(0)
    endpoint.close()
    await waiting
    with pytest.raises(DrainingError):
        await early
    assert endpoint.draining and not endpoint.ready


async def test_metadata_says_who_serves(endpoint: Endpoint) -> None:
    assert endpoint.metadata == {"action_horizon": 10, "server_name": "tandem", "server_version": __version__, "slot": "action"}


async def test_a_request_is_served_and_timed(endpoint: Endpoint) -> None:
    reply, ms = await endpoint.serve(parse_request({"prompt": "x"}), 0.0, endpoint.sessions.client(), [])
    assert reply["asked"] == {"prompt": "x"} and ms > 0


async def test_draining_waits_for_what_was_accepted_and_takes_nothing_new(worker: SlotWorker) -> None:
    entered, released = threading.Event(), threading.Event()

    def hold(obs: object) -> None:
        entered.set()
        assert released.wait(30)

    endpoint = Endpoint("action", {"action": worker})
    endpoint.open(action_route(EchoPolicy(hold)), {})
    accepted = [asyncio.create_task(serve(endpoint, {"prompt": i})) for i in range(2)]
    assert await asyncio.to_thread(entered.wait, 30)
    draining = asyncio.create_task(endpoint.drain())
    await asyncio.sleep(0)
    assert not endpoint.ready and not draining.done()
    with pytest.raises(DrainingError, match=r"^the server is shutting down; the action endpoint takes no new requests$"):
        await serve(endpoint, {"prompt": "late"})
    released.set()
    assert [reply["asked"]["prompt"] for reply in await asyncio.gather(*accepted)] == ["0", "1"]
    await draining


async def test_a_failed_request_does_not_hold_up_the_drain(endpoint: Endpoint) -> None:
    with pytest.raises(ModeError):
        await serve(endpoint, {"mode": "x"})
    await endpoint.drain()


class SeededPolicy(EchoPolicy):
    """Says the seed and the camera it got."""

    def infer(self, obs: Any, *, seed: int | None = None) -> dict[str, Any]:
        return {
            "actions": np.full((2, 3), -1.0 if seed is None else seed),
            "policy_timing": {"infer_ms": 1.0},
            "saw": {"shape": list(obs["cam"].shape)},
        }


async def test_jpeg_cameras_reach_the_policy_as_images_of_its_layout(worker: SlotWorker) -> None:
    endpoint = Endpoint("action", {"action": worker}, max_image_bytes=8 * 8 * 3)
    endpoint.open(action_route(SeededPolicy()), {"image_specs": [{"path": ["cam"], "target_shape": [3, 224, 224], "dtype": "uint8"}]})
    small, large = (jpeg.encode(np.zeros((size, size, 3), np.uint8)) for size in (8, 9))
    assert (await serve(endpoint, {"cam": small, "seed": 7}))["saw"] == {"shape": [3, 8, 8]}
    with pytest.raises(ObservationError, match=r"^cam: the JPEG images decode to more than 192 bytes"):
        await serve(endpoint, {"cam": large})
    with pytest.raises(ObservationError, match=r"^batch\[1\]: cam: the JPEG images decode to more than 192 bytes"):
        await serve(endpoint, {"batch": [{"cam": small}, {"cam": small}]})
    with pytest.raises(ObservationError, match=r"^cam: the JPEG images decode to more than 192 bytes") as error:
        await serve(endpoint, {"batch": [{"cam": large}]})
    assert error.value.__cause__ is None


async def test_a_batch_has_one_reply_with_a_leading_axis(worker: SlotWorker) -> None:
    endpoint = Endpoint("action", {"action": worker})
    endpoint.open(action_route(SeededPolicy()), {})
    cam = np.zeros((1, 2, 3), np.uint8)
    reply = await serve(endpoint, {"batch": [{"cam": cam, "seed": 4}, {"cam": cam[:, :1], "seed": 5}]})
    assert reply["actions"].shape == (2, 2, 3) and reply["actions"][:, 0, 0].tolist() == [4, 5]
    assert reply["policy_timing"] == {"infer_ms": 1.0} and reply["saw"] == [{"shape": [1, 2, 3]}, {"shape": [1, 1, 3]}]


async def test_a_batch_says_whose_fault_it_was(worker: SlotWorker) -> None:
    def refuse(obs: Any) -> None:
        if obs["prompt"] == "bad":
            raise ObservationError("prompt: is bad")

    endpoint = Endpoint("action", {"action": worker})
    endpoint.open(action_route(EchoPolicy(refuse)), {})
    with pytest.raises(ObservationError, match=r"^batch\[1\]: prompt: is bad$"):
        await serve(endpoint, {"batch": [{"prompt": "good"}, {"prompt": "bad"}]})
    assert (await serve(endpoint, {"prompt": "next"}))["asked"] == {"prompt": "next"}


async def test_a_batch_of_different_modes_cannot_be_stacked(worker: SlotWorker) -> None:
    def route(obs: Any, /, *, seed: int | None = None, origin: Any = None) -> Steps:
        return (yield SlotCall("action", lambda: {"actions": np.zeros((2, 2))} if obs["act"] else {"subtask": {"text": "x"}}))

    endpoint = Endpoint("action", {"action": worker})
    endpoint.open(route, {})
    with pytest.raises(MessageError, match=r"^batch\[1\]: its reply has no actions, as others of the batch do; send one mode per batch$"):
        await serve(endpoint, {"batch": [{"act": True}, {"act": False}]})


async def test_rows_of_a_batch_for_which_nothing_is_left_to_do_have_no_actions_and_move_no_others(worker: SlotWorker) -> None:
    def route(obs: Any, /, *, seed: int | None = None, origin: Any = None) -> Steps:
        subtask = {"text": obs["say"], "done": obs["say"] == "all done"}
        actions = {"actions": np.full((2, 3), obs["n"]), "policy_timing": {"infer_ms": 1.0}}
        return (yield SlotCall("action", lambda: {**({} if subtask["done"] else actions), "subtask": subtask}))

    endpoint = Endpoint("action", {"action": worker})
    endpoint.open(route, {})
    done, going = {"say": "all done", "n": 0}, {"say": "go", "n": 1}
    reply = await serve(endpoint, {"batch": [done, going, {"say": "go", "n": 2}, done]})
    assert [actions if actions is None else actions[0, 0] for actions in reply["actions"]] == [None, 1, 2, None]
    assert [subtask["done"] for subtask in reply["subtask"]] == [True, False, False, True] and reply["policy_timing"] == {"infer_ms": 1.0}
    assert (await serve(endpoint, {"batch": [going, going]}))["actions"].shape == (2, 2, 3)
    assert await serve(endpoint, {"batch": [done]}) == {"subtask": [{"text": "all done", "done": True}]}


async def test_what_is_late_is_not_begun(worker: SlotWorker) -> None:
    called: list[Any] = []
    endpoint = Endpoint("action", {"action": worker})
    endpoint.open(action_route(EchoPolicy(called.append)), {})
    request = parse_request({"prompt": "x", "deadline_ms": 5})
    assert isinstance(request, InferRequest)
    with pytest.raises(DeadlineError, match=r"^deadline_ms: passed \d+ ms before the action's turn came; nothing was computed$"):
        await endpoint.serve(request, time.perf_counter() - 1, endpoint.sessions.client(), [])
    assert called == []
    await endpoint.serve(request, time.perf_counter() + 60, endpoint.sessions.client(), [])
    assert called


async def test_a_question_of_no_robot_is_answered_beside_them(worker: SlotWorker) -> None:
    endpoint = Endpoint("action", {"action": worker})
    with pytest.raises(DrainingError, match="the action is still loading; ask again when it is ready"):
        await endpoint.ask({"prompt": "x"}, deadline_s=10)
    running, free = threading.Event(), threading.Event()
    asked: list[str] = []

    def hook(obs: Any) -> None:
        asked.append(obs["prompt"])
        running.set()
        free.wait(20)

    endpoint.open(action_route(EchoPolicy(hook)), METADATA)
    busy = asyncio.create_task(serve(endpoint, {"prompt": "busy"}))
    await asyncio.to_thread(running.wait, 20)
    question = asyncio.create_task(endpoint.ask({"prompt": "question"}, deadline_s=1e6))
    await asyncio.sleep(0)
    robot = asyncio.create_task(serve(endpoint, {"prompt": "robot"}))
    late = asyncio.create_task(endpoint.ask({"prompt": "late"}, deadline_s=1e-9))
    with pytest.raises(DeadlineError):
        await late
    free.set()
    reply, ms = await question
    await asyncio.gather(busy, robot)
    assert reply["asked"] == {"prompt": "question"} and ms > 0 and asked == ["busy", "robot", "question"]
    assert len(endpoint.sessions) == 2  # the two robots
    await endpoint.drain()
    with pytest.raises(DrainingError, match="the action is shutting down"):
        await endpoint.ask({"prompt": "x"}, deadline_s=10)


async def test_who_is_told_of_each_observation_and_its_answer(worker: SlotWorker) -> None:
    told: list[tuple[Any, ...]] = []

    class Told(Observer):
        def answered(self, slot: Any, session: Any, observation: Any, reply: Any, ms: float) -> None:
            told.append(("answered", session.id, observation["prompt"], "actions" in reply))

        def refused(self, slot: Any, session: Any, observation: Any, error: Exception) -> None:
            told.append(("refused", session.id, observation["prompt"], str(error)))

    endpoint = Endpoint("action", {"action": worker}, observer=Observers(Told()))
    endpoint.open(action_route(EchoPolicy()), METADATA)
    await serve(endpoint, {"prompt": "one", "session_id": "a"})
    await serve(endpoint, {"batch": [{"prompt": "two", "session_id": "a"}, {"prompt": "nobody's"}]})
    with pytest.raises(ModeError) as caught:
        await serve(endpoint, {"prompt": "three", "session_id": "b", "mode": "x"})
    assert told == [("answered", "a", "one", True), ("answered", "a", "two", True), ("refused", "b", "three", str(caught.value))]
