"""openpi-flash's combined mode, number for number: planner and action policy on the golden checkpoints behind one ``infer``."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from action.policy import ActionPolicy
from hosting.combined import CombinedPolicy
from pi0.cameras import camera_images
from planner import SubtaskGenerator
from tests.action.policy_cases import COMBINED_CASES, golden_call
from tests.golden_data import GOLDEN, TOKENIZER

LIMIT = 2e-4
TEMPLATE = "{task}. Subtask: {subtask}"


@cache
def planner(checkpoint: str) -> SubtaskGenerator:
    return SubtaskGenerator.load(GOLDEN / checkpoint, tokenizer=TOKENIZER, dtype="float32", allowed_tokens="printable_ascii", missing_cameras="grey")


@cache
def action(config: str, checkpoint: str) -> ActionPolicy:
    return ActionPolicy.load(config, GOLDEN / checkpoint, tokenizer=TOKENIZER, dtype="float32", device="cpu")


class Spy:
    """An action policy that remembers the prompts it was given."""

    def __init__(self, policy: ActionPolicy) -> None:
        self._policy = policy
        self.metadata, self.default_prompt = policy.metadata, policy.default_prompt
        self.prompts: list[str] = []

    def infer(self, obs: Any, /, **sampling: Any) -> dict[str, Any]:
        self.prompts.append(obs["prompt"])
        return self._policy.infer(obs, **sampling)


@pytest.fixture(params=COMBINED_CASES)
def case(request: pytest.FixtureRequest) -> Any:
    call = golden_call(request.param)
    assert call.meta["max_tokens"] == 20
    spy = Spy(action(call.meta["config"], call.meta["checkpoint"]))
    return call, spy, CombinedPolicy(planner(call.meta["checkpoint"]), spy, action_prompt_template=TEMPLATE)


def test_all_recorded_calls_are_here() -> None:
    assert len(COMBINED_CASES) == 4


def test_default_mode(case: Any) -> None:
    call, spy, combined = case
    reply = combined.infer(call.observation, noise=call.noise)
    assert reply["subtask"]["text"] == call.meta["subtask_text"]
    assert spy.prompts == [call.meta["prompt_given_to_action_policy"]]
    np.testing.assert_allclose(reply["actions"], call.arrays["actions"], rtol=0, atol=LIMIT)
    assert reply["actions"].dtype == call.arrays["actions"].dtype
    assert sorted(reply) == call.meta["response_keys"]
    assert set(call.meta["subtask_keys"]) <= set(reply["subtask"])


def test_action_only_mode(case: Any) -> None:
    call, spy, combined = case
    reply = combined.infer({**call.observation, "mode": "action_only"}, noise=call.noise)
    assert spy.prompts == [call.observation["prompt"]] and sorted(reply) == ["actions", "policy_timing"]
    np.testing.assert_allclose(reply["actions"], call.arrays["actions_action_only"], rtol=0, atol=LIMIT)


def test_subtask_only_mode_and_the_planner_alone(case: Any) -> None:
    call, spy, combined = case
    reply = combined.infer({**call.observation, "mode": "subtask_only"})
    assert sorted(reply) == call.meta["response_keys_subtask_only"] and spy.prompts == []
    generator = combined.planner
    alone = generator.infer(call.observation)
    assert sorted(alone) == call.meta["response_keys_planner_only"]
    assert reply["subtask"]["text"] == alone["subtask"]["text"] == call.meta["subtask_text"]
    subtask = generator.generate(call.observation["prompt"], camera_images(call.observation))
    assert list(subtask.token_ids) == call.meta["token_ids"]


def test_the_recorded_subtasks_change_the_actions() -> None:
    """Else the comparison above would hold for a combination that forgets the subtask."""
    calls = {name: golden_call(name) for name in COMBINED_CASES}
    changed = {name for name, call in calls.items() if np.abs(call.arrays["actions"] - call.arrays["actions_action_only"]).max() > 1e-3}
    assert changed == {name for name, call in calls.items() if call.meta["subtask_text"]} != set()
