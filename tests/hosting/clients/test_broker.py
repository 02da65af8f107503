"""One action at a time, compared with what openpi's broker does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from hosting.clients.broker import ActionChunkBroker
from hosting.clients.errors import TaskDoneError


class Counting:
    """Chunks of three steps that say which call they come from."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.resets = 0

    def infer(self, obs: Mapping[str, Any], /) -> dict[str, Any]:
        self.calls.append(obs["n"])
        base = 10.0 * len(self.calls)
        return {
            "actions": base + np.arange(6.0).reshape(3, 2),
            "nested": {"deep": [np.arange(3), "text"]},
            "pair": (np.arange(3), 7),
            "server_timing": {"infer_ms": 1.5},
        }

    def reset(self) -> None:
        self.resets += 1


def test_steps_of_a_chunk_then_the_next_one() -> None:
    policy = Counting()
    broker = ActionChunkBroker(policy, 2)
    results = [broker.infer({"n": n}) for n in range(5)]
    assert policy.calls == [0, 2, 4], "the observations in between are not looked at"
    assert [result["actions"].tolist() for result in results] == [[10, 11], [12, 13], [20, 21], [22, 23], [30, 31]]
    assert results[1]["nested"] == {"deep": [1, "text"]} and results[1]["pair"] == (1, 7) and results[1]["server_timing"] == {"infer_ms": 1.5}


def test_reset_drops_the_chunk_and_resets_the_policy() -> None:
    policy = Counting()
    broker = ActionChunkBroker(policy, 3)
    broker.infer({"n": 0})
    broker.reset()
    assert policy.resets == 1
    assert broker.infer({"n": 1})["actions"].tolist() == [20, 21]


def test_nothing_left_to_do() -> None:
    class Planning(Counting):
        def infer(self, obs: Mapping[str, Any], /) -> dict[str, Any]:
            done = obs["n"] in (2, 3)
            return {"subtask": {"text": "All done.", "done": True}} if done else {**super().infer(obs), "subtask": {"text": "go", "done": False}}

    policy = Planning()
    broker = ActionChunkBroker(policy, 2)
    broker.infer({"n": 0}), broker.infer({"n": 1})
    for n in (2, 3):
        with pytest.raises(TaskDoneError, match=r"^nothing is left to do, the planner says 'All done.', so there are no actions$") as error:
            broker.infer({"n": n})
        assert error.value.code == "done"
    assert broker.infer({"n": 4})["actions"].tolist() == [20, 21], "it asks again each time"


def test_a_chunk_that_is_too_short() -> None:
    broker = ActionChunkBroker(Counting(), 4)
    for n in range(3):
        broker.infer({"n": n})
    with pytest.raises(IndexError, match=r"^actions: has shape \[3, 2\], so there is no step 3 of 4$"):
        broker.infer({"n": 3})


def test_an_array_without_steps() -> None:
    class Scalar(Counting):
        def infer(self, obs: Mapping[str, Any], /) -> dict[str, Any]:
            return {"info": {"value": np.array(1.0)}}

    with pytest.raises(IndexError, match=r"^info\.value: has shape \[\], so there is no step 0 of 2$"):
        ActionChunkBroker(Scalar(), 2).infer({"n": 0})


def test_a_horizon_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"^action_horizon: got 0, expected at least 1$"):
        ActionChunkBroker(Counting(), 0)
