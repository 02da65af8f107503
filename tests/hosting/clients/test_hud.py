"""The pooled model: shapes, sharing, and HUD's ``BatchedModel`` around it (a stand-in with its stacking; reference/peers.md §2.2)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from hosting.clients.errors import ConnectError, ConnectionLostError, InferenceError, TaskDoneError
from hosting.clients.hud import PooledModel
from hosting.protocol import msgpack_numpy
from hosting.protocol.messages import Message
from tests.hosting.clients.scripted import StubLink, reply
from tests.serving import HORIZON, EchoPolicy, service_config, start, stubs


class StateEcho(EchoPolicy):
    """Answers with the observation's state in every action."""

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        self.hook(obs)
        return {"actions": np.tile(np.asarray(obs["state"], np.float64), (HORIZON, 1))}


def observation(number: int) -> dict[str, Any]:
    return {"observation/image": np.zeros((8, 8, 3), np.uint8), "state": np.full(4, number, np.float32), "prompt": f"task {number}"}


def stacked(observations: list[dict[str, Any]]) -> dict[str, Any]:
    """As ``BatchedModel`` does it: what is no tensor is gathered in lists."""
    return {key: [obs[key] for obs in observations] for key in observations[0]}


class Tensor:
    """As much of a PyTorch tensor as matters."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        self.ndim = array.ndim

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, row: int) -> Tensor:
        return Tensor(self.array[row])

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray[Any, Any]:
        return self.array


def test_one_observation_and_many() -> None:
    with start(service_config("action"), stubs(StateEcho())) as service, PooledModel(service.addresses["action"]) as model:
        single = model.infer(observation(3))
        assert single.shape == (1, HORIZON, 4) and single.dtype == np.float32 and (single == 3).all()
        one = asyncio.run(model.ainfer(observation(4)))
        assert one.shape == (HORIZON, 4) and one.dtype == np.float32 and (one == 4).all()
        for batch in ([observation(n) for n in range(3)], stacked([observation(n) for n in range(3)]), tuple(observation(n) for n in range(3))):
            many = model.infer(batch)
            assert many.shape == (3, HORIZON, 4) and many.dtype == np.float32 and many[:, 0, 0].tolist() == [0, 1, 2]
        assert model.infer([observation(7)]).shape == (1, HORIZON, 4)


def test_tensors() -> None:
    with start(service_config("action"), stubs(StateEcho())) as service, PooledModel(service.addresses["action"]) as model:
        assert (model.infer({"state": Tensor(np.ones(4)), "prompt": "x"}) == 1).all()
        batch = {"state": Tensor(np.arange(8.0).reshape(2, 4)), "prompt": ["x", "y"]}
        assert model.infer(batch)[:, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    "single",
    [
        {"prompt": "x", "state": [1.0, 2.0]},
        {"state": np.ones(4), "image": np.zeros((8, 8, 3), np.uint8)},
        {"state": [1.0, 2.0], "image": np.zeros((8, 8, 3), np.uint8)},
    ],
    ids=["text prompt", "arrays only", "a list of its own"],
)
def test_what_is_one_observation(single: dict[str, Any]) -> None:
    with start(service_config("action"), stubs(StateEcho())) as service, PooledModel(service.addresses["action"]) as model:
        assert len(model.infer(single)) == 1


def test_rollouts_share_it_and_everyone_gets_his_own_actions() -> None:
    together = threading.Barrier(4)

    async def rollout(model: PooledModel, number: int) -> None:
        for step in range(10):
            actions = await model.ainfer(observation(number * 100 + step))
            assert (actions == number * 100 + step).all()

    async def rollouts(model: PooledModel) -> None:
        await asyncio.gather(*(rollout(model, number) for number in range(12)))

    with start(service_config("action"), stubs(StateEcho())) as service, PooledModel(service.addresses["action"], size=4) as model:
        asyncio.run(rollouts(model))
        asyncio.run(rollouts(model))

        def thread(number: int) -> None:
            together.wait(30)
            assert (model.infer(observation(number)) == number).all()

        threads = [threading.Thread(target=thread, args=(number,)) for number in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(30)


def test_no_more_connections_than_requests_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    links: list[StubLink] = []

    def dial(url: str, *_: Any) -> tuple[str, StubLink]:
        links.append(StubLink(*[reply({"actions": np.zeros((2, 3))})] * 5, metadata={}))
        return url, links[-1]

    monkeypatch.setattr("hosting.clients.client.dial", dial)
    with PooledModel("ws://robot", size=8) as model:
        assert not links, "connects when it is first asked"
        for _ in range(5):
            model.infer({"prompt": "x"})
        assert len(links) == 1
    assert links[0].closed


def rows_of(link: StubLink) -> list[dict[str, Any]]:
    return [row for asked in link.maps for row in asked.get("batch", [asked])]


@pytest.mark.parametrize("ours", [True, False])
def test_requests_have_nothing_to_do_with_each_other(monkeypatch: pytest.MonkeyPatch, ours: bool) -> None:
    def answer(asked: Message) -> Message:
        value = msgpack_numpy.unpack(asked.body)
        rows = value.get("batch")
        echo = {"request_id": [row["request_id"] for row in rows] if rows else value["request_id"], "server_timing": {}} if ours else {}
        return reply({"actions": np.zeros((len(rows), 2, 3) if rows else (2, 3)), **echo})

    link = StubLink(*[answer] * 3, metadata={"server_name": "tandem"} if ours else {})
    monkeypatch.setattr("hosting.clients.client.dial", lambda url, *_: (url, link))
    with PooledModel("ws://robot") as model:
        model.infer({"n": 1, "prompt": "x"})
        model.infer({"n": 2, "prompt": "x", "session_id": "its own"})
        model.infer([{"n": 3}, {"n": 4, "session_id": "its own"}])
    assert [row.get("reset", False) for row in rows_of(link)] == ([True, False, True, False] if ours else [False] * 4)


@pytest.mark.parametrize(
    ("answer", "batch", "text"),
    [
        ({"action": np.zeros((2, 3))}, {"prompt": "x"}, "the reply has no 'actions' but 'action'; give response_key=…"),
        ({"actions": np.zeros(3)}, {"prompt": "x"}, "actions: has shape [3], expected [T, A]"),
        ({"actions": np.zeros((2, 3))}, [{"n": 1}, {"n": 2}], "actions: has shape [2, 3], expected [2, T, A]"),
        ({"actions": np.zeros((3, 2, 3))}, [{"n": 1}, {"n": 2}], "actions: has shape [3, 2, 3], expected [2, T, A]"),
    ],
)
def test_replies_without_the_actions(monkeypatch: pytest.MonkeyPatch, answer: Any, batch: Any, text: str) -> None:
    monkeypatch.setattr("hosting.clients.client.dial", lambda url, *_: (url, StubLink(reply(answer), metadata={})))
    with PooledModel("ws://robot") as model, pytest.raises(InferenceError) as error:
        model.infer(batch)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("answer", "batch", "where"),
    [
        ({"subtask": {"text": "all done", "done": True}}, {"prompt": "x"}, ""),
        (
            {"actions": [np.zeros((2, 3)), None], "subtask": [{"text": "go", "done": False}, {"text": "all done", "done": True}]},
            [{"n": 1}, {"n": 2}],
            "batch[1]: ",
        ),
    ],
)
def test_nothing_left_to_do(monkeypatch: pytest.MonkeyPatch, answer: Any, batch: Any, where: str) -> None:
    monkeypatch.setattr("hosting.clients.client.dial", lambda url, *_: (url, StubLink(reply(answer), metadata={})))
    with PooledModel("ws://robot") as model, pytest.raises(TaskDoneError) as error:
        model.infer(batch)
    assert str(error.value) == f"{where}nothing is left to do, the planner says 'all done', so there are no actions"


def test_another_response_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hosting.clients.client.dial", lambda url, *_: (url, StubLink(reply({"action": np.ones((2, 3))}), metadata={})))
    with PooledModel("ws://robot", response_key="action") as model:
        assert model.infer({"prompt": "x"}).shape == (1, 2, 3)


def test_a_failure_gives_its_place_in_the_pool_back(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[Any] = [ConnectError("refused"), StubLink(reply({"actions": np.ones((2, 3))}), metadata={})]

    def dial(url: str, *_: Any) -> tuple[str, StubLink]:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return url, outcome

    monkeypatch.setattr("hosting.clients.client.dial", dial)
    with PooledModel("ws://robot", size=1) as model:
        with pytest.raises(ConnectError):
            model.infer({"prompt": "x"})
        assert model.infer({"prompt": "x"}).shape == (1, 2, 3)


def test_nothing_to_infer() -> None:
    with pytest.raises(ValueError, match=r"^size: got 0, expected at least 1$"):
        PooledModel(size=0)


async def test_a_closed_model_makes_no_new_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hosting.clients.client.dial", lambda url, *_: (url, StubLink()))
    model = PooledModel("ws://robot")
    model.close()
    for asking in (asyncio.to_thread(model.infer, {"prompt": "x"}), model.ainfer({"prompt": "x"})):
        with pytest.raises(ConnectionLostError, match=r"^this model has been closed; make a new one$"):
            await asking
