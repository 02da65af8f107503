"""Many robots, one service: each gets its own answer, out of shared batches, and what a session is promised holds over every transport."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from concurrent.futures import Future
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from action.policy import ActionPolicy
from hosting.clients import Client, InferenceError
from hosting.protocol import msgpack_numpy
from hosting.protocol.messages import MessageType
from tests.e2e.crowd import SECONDS, TRANSPORTS, Crowd, Gate, crowd, observation
from tests.golden_data import CHECKPOINTS, TOKENIZER

EVERY = pytest.mark.parametrize("transport", TRANSPORTS)
ROBOTS = 8
LIMIT = 2e-4
"""Largest difference between an action served in a batch and the same one alone."""

ASYNC: dict[str, Any] = {"refresh": "async", "interval_s": 3600.0, "max_age_s": None}
"""No refresh but those that are asked for."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Crowd]:
    """``async``, with room for two in a batch of the planner."""
    with crowd(planner=ASYNC) as fleet:
        yield fleet


# --- the real models -------------------------------------------------------------------------------------------------------------------------


@cache
def golden() -> ActionPolicy:
    return ActionPolicy.load("pi0_droid", CHECKPOINTS / "pi0_orbax", tokenizer=TOKENIZER, dtype="float32", device="cpu")


class HeldPolicy:
    """A real policy behind a gate."""

    def __init__(self, policy: ActionPolicy) -> None:
        self._policy = policy
        self.metadata, self.default_prompt = policy.metadata, policy.default_prompt
        self.gate = Gate()

    def infer(self, obs: Any, /, *, seed: int | None = None) -> dict[str, Any]:
        return self.infer_batch([obs], seeds=[seed])[0]

    def infer_batch(self, observations: Any, /, *, seeds: Any = None) -> list[dict[str, Any]]:
        self.gate.enter(observations)
        replies: list[dict[str, Any]] = self._policy.infer_batch(observations, seeds=seeds)
        return replies


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch's threads wait for each other spinning: beside anything else that runs on this machine, they take many times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_each_of_8_robots_gets_its_own_answer_out_of_one_batch() -> None:
    policy = golden()
    observations = [policy.example_observation(np.random.default_rng(robot)) for robot in range(ROBOTS)]
    alone = [policy.infer(obs, seed=robot)["actions"] for robot, obs in enumerate(observations)]
    assert len({actions.tobytes() for actions in alone}) == ROBOTS
    held = HeldPolicy(policy)
    with crowd(action=held, scheduler={"max_batch": ROBOTS}) as fleet:
        clients = [fleet.client(TRANSPORTS[robot % len(TRANSPORTS)], resize=None) for robot in range(ROBOTS)]
        for _ in range(2):
            held.gate.shut()
            asked = []
            for robot, client in enumerate(clients):
                asked.append(fleet.ask(client, {**observations[robot], "mode": "action_only"}, seed=robot))
                if robot == 0:
                    held.gate.wait_begun()
            fleet.until_queued(ROBOTS - 1)
            held.gate.open()
            for robot, future in enumerate(asked):
                np.testing.assert_allclose(future.result(SECONDS)["actions"], alone[robot], rtol=0, atol=LIMIT)
            held.gate.wait_begun()
        assert [len(call) for call in held.gate.calls] == [1, ROBOTS - 1] * 2
        assert fleet.metric("tandem_batch_size_bucket", slot="action", le="1.0") == 2
        assert fleet.metric("tandem_batch_size_count", slot="action") == 4
        assert fleet.metric("tandem_batch_size_sum", slot="action") == 2 * ROBOTS


# --- sessions --------------------------------------------------------------------------------------------------------------------------------


@EVERY
def test_a_session_with_an_id_survives_a_reconnect_over_another_transport(fleet: Crowd, transport: str) -> None:
    name = f"survivor over {transport}"
    with fleet.client(transport, session_id=name) as client:
        first = client.infer(observation(1))["subtask"]
    assert (first["waited"], first["revision"]) == (True, 1)
    other = TRANSPORTS[TRANSPORTS.index(transport) - 1]
    again = fleet.client(other, session_id=name).infer(observation(1))["subtask"]
    assert (again["waited"], again["revision"], again["source_index"]) == (False, 1, first["source_index"])


@EVERY
def test_a_session_without_an_id_ends_with_its_connection(fleet: Crowd, transport: str) -> None:
    for _ in range(2):
        with fleet.client(transport) as client:
            assert [client.infer(observation(2))["subtask"]["waited"] for _ in range(2)] == [True, False]


@EVERY
def test_a_reset_drops_the_plan(fleet: Crowd, transport: str) -> None:
    client = fleet.client(transport, session_id=f"reset over {transport}")
    assert [client.infer(observation(3))["subtask"]["waited"] for _ in range(2)] == [True, False]
    client.reset()
    after = client.infer(observation(3))["subtask"]
    assert (after["waited"], after["revision"], after["source_index"]) == (True, 2, 0)


@EVERY
def test_a_reset_by_name_reaches_other_connections_sessions_and_only_those(fleet: Crowd, transport: str) -> None:
    names = [f"{name} over {transport}" for name in ("one", "two", "three")]
    clients = [fleet.client(session_id=name) for name in names]
    for client in clients:
        client.infer(observation(4))
    answer = fleet.link(transport).exchange(MessageType.RESET, [msgpack_numpy.pack({"session_ids": names[:2]})], SECONDS)
    assert answer.type == MessageType.RESET_REPLY
    assert [client.infer(observation(4))["subtask"]["waited"] for client in clients] == [True, True, False]


@EVERY
def test_replan_asks_the_planner_anew(fleet: Crowd, transport: str) -> None:
    client = fleet.client(transport, session_id=f"replan over {transport}")
    subtasks = [client.infer(observation(5, **own))["subtask"] for own in ({}, {"replan": True}, {})]
    assert [(subtask["waited"], subtask["revision"]) for subtask in subtasks] == [(True, 1), (True, 2), (False, 2)]


# --- the planner -----------------------------------------------------------------------------------------------------------------------------


def test_robots_that_ask_the_planner_at_once_share_a_batch() -> None:
    with crowd(planner={"scheduler": {"max_batch": 4}}) as fleet:
        gate = fleet.planner.gate
        gate.shut()
        asked = [fleet.ask(fleet.client(), observation(0))]
        gate.wait_begun()
        asked += [fleet.ask(fleet.client(transport), observation(robot)) for robot, transport in enumerate(TRANSPORTS, start=1)]
        fleet.until_queued(3, "planner")
        gate.open()
        assert [future.result(SECONDS)["robot"] for future in asked] == [0, 1, 2, 3]
        assert [sorted(robots) for robots in gate.asked()] == [[0], [1, 2, 3]]


def test_who_asks_the_planner_the_same_shares_one_answer() -> None:
    with crowd(planner={"scheduler": {"max_batch": 4}}) as fleet:
        gate = fleet.planner.gate
        gate.shut()
        same = observation(7)
        asked = [fleet.ask(fleet.client(), observation(0))]
        gate.wait_begun()
        asked += [fleet.ask(fleet.client(), obs) for obs in (same, same)]
        fleet.until_queued(2, "planner")
        asked.append(fleet.ask(fleet.client(), observation(0)))  # asked of the model already: it does not even wait
        fleet.until(lambda: fleet.metric("tandem_planner_shared_total") == 1)
        gate.open()
        texts = [future.result(SECONDS)["subtask"]["text"] for future in asked]
        assert texts == ["begin to fold the towel"] * 4
        assert gate.asked() == [[0], [7]]
        assert fleet.metric("tandem_planner_shared_total") == 2


def test_who_waits_for_the_planner_goes_before_refreshes_that_nobody_waits_for() -> None:
    with crowd(planner={**ASYNC, "interval_s": 1e-6, "scheduler": {"max_batch": 1}}) as fleet:
        gate = fleet.planner.gate
        regulars = [fleet.client() for _ in range(3)]
        for robot, client in enumerate(regulars):
            assert client.infer(observation(robot))["subtask"]["waited"]
        gate.wait_begun(3)
        gate.shut()
        held = fleet.ask(regulars[0], observation(0, replan=True))
        gate.wait_begun()
        for robot in (1, 2):
            assert not regulars[robot].infer(observation(robot))["subtask"]["waited"], "an action waits for no refresh"
        newcomer = fleet.ask(fleet.client(), observation(9))
        fleet.until_queued(3, "planner")
        gate.open()
        assert held.result(SECONDS)["robot"] == 0 and newcomer.result(SECONDS)["robot"] == 9
        gate.wait_begun(3)
        assert gate.asked()[3:] == [[0], [9], [1], [2]]


# --- refusals --------------------------------------------------------------------------------------------------------------------------------


def refusal(future: Future[dict[str, Any]]) -> tuple[str | None, str]:
    """The code, and the text without its numbers."""
    with pytest.raises(InferenceError) as caught:
        future.result(SECONDS)
    return caught.value.code, re.sub(r"\d+", "N", str(caught.value))


def test_refusals_are_the_same_over_every_transport() -> None:
    with crowd(scheduler={"max_queue": 4}) as fleet:
        gate = fleet.action.gate
        told = []
        for transport in TRANSPORTS:
            clients = [fleet.client(transport) for _ in range(6)]

            def ask(client: int, robot: int, clients: list[Client] = clients, **options: Any) -> Future[dict[str, Any]]:
                return fleet.ask(clients[client], observation(robot, mode="action_only"), **options)

            gate.shut()
            held = ask(0, 0)
            gate.wait_begun()
            old = ask(1, 1, session_id="s")
            fleet.until_queued(1)
            new = ask(2, 2, session_id="s")
            superseded = refusal(old)
            late = refusal(ask(3, 3, deadline_ms=1.0))
            others = [ask(client, 4) for client in (3, 4, 5)]
            fleet.until_queued(4)
            overloaded = refusal(ask(1, 5))
            gate.open()
            assert [future.result(SECONDS)["robot"] for future in (held, new, *others)] == [0, 2, 4, 4, 4]
            told.append((superseded, late, overloaded))
            gate.wait_begun()
        assert [sorted(robots) for robots in gate.asked()] == [[0], [2, 4, 4, 4]] * len(TRANSPORTS), "what was refused was not computed"
    assert told[0] == told[1] == told[2]
    (superseded, late, overloaded) = told[0]
    assert superseded == (
        "superseded",
        "superseded: a newer observation of the same session came before the action's turn; nothing was computed "
        "(robots that share a connection each need a session_id of their own)",
    )
    assert late == ("deadline", "deadline_ms: passed N ms before the action's turn came; nothing was computed")
    assert overloaded == ("overloaded", "the action is overloaded: N requests are waiting already; try again later")


# --- the log ---------------------------------------------------------------------------------------------------------------------------------


@EVERY
def test_every_request_leaves_one_line(fleet: Crowd, transport: str, caplog: pytest.LogCaptureFixture) -> None:
    client = fleet.client(transport, session_id="robot-1")
    with caplog.at_level(logging.INFO, logger="hosting.requests"):
        client.infer(observation(6, request_id="a1", replan=True))
        with pytest.raises(InferenceError):
            client.infer(observation(6, request_id="a2", mode="dance"))
        client.reset()
    lines = [record.getMessage() for record in caplog.records if record.name == "hosting.requests"]
    ms = r"\d+\.\d ms"
    planned = rf"planner_queue={ms} planner_infer={ms} planner_batch=1 "
    patterns = [
        rf"action default session=robot-1 {planned}queue={ms} infer={ms} batch=1 total={ms} request_id=a1 ok",
        rf"action dance session=robot-1 total={ms} request_id=a2 refused: mode: mode: got 'dance', expected .*",
        rf"action reset session=- total={ms} ok",
    ]
    assert len(lines) == len(patterns)
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
