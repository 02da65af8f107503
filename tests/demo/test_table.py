"""The Gymnasium environment, as a robot loop uses it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, cast

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.env_match import check_environments_match

from demo.expert import plan
from demo.instructions import ALL_DONE, FAMILIES, SUBTASKS, InstructionError, parse
from demo.render import render
from demo.robot import Table
from demo.table import ENV_ID, MAX_CALLS, MAX_STEPS, TableEnv
from demo.world import BINS, COLOURS, HELD
from pi0.cameras import camera_images, map_cameras

BY_NAME = f"demo.table:{ENV_ID}"


@pytest.fixture
def env() -> Iterator[TableEnv]:
    made = gymnasium.make(BY_NAME)
    yield cast(TableEnv, made.unwrapped)
    made.close()


def chunk(env: TableEnv, subtask: str) -> list[Any]:
    """What the expert would do for it."""
    return list(plan(env.scenes, np.array([SUBTASKS.index(subtask)]))[0])


def finish(env: TableEnv, info: dict[str, Any]) -> dict[str, Any]:
    """Do what the environment says is due, a chunk at a time, until it says that all is done."""
    for _ in range(MAX_CALLS):
        if info["subtask"] == ALL_DONE:
            return info
        for action in chunk(env, info["subtask"]):
            _, _, _, _, info = env.step(action)
    return info


def test_gymnasiums_own_checks_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(cast(TableEnv, gymnasium.make(BY_NAME, render_mode="rgb_array").unwrapped))
        check_env(cast(TableEnv, gymnasium.make(BY_NAME).unwrapped), skip_render_check=True)


def test_a_seed_fixes_the_table_and_the_words(env: TableEnv) -> None:
    first, info = env.reset(seed=7)
    again, info_again = env.reset(seed=7)
    np.testing.assert_array_equal(first["base_0_rgb"], again["base_0_rgb"])
    assert info == info_again
    assert len({env.reset(seed=seed)[1]["instruction"] for seed in range(50)}) > 40
    check_environments_match(gymnasium.make(BY_NAME), gymnasium.make(BY_NAME), num_steps=20, seed=3)


def test_an_observation_is_what_the_server_takes(env: TableEnv) -> None:
    obs, info = env.reset(seed=0)
    inputs = Table().inputs({**obs, "prompt": info["instruction"]})
    np.testing.assert_array_equal(inputs.images["base_0_rgb"], obs["base_0_rgb"])
    np.testing.assert_array_equal(inputs.state, obs["state"])
    assert list(map_cameras(camera_images(obs))) == ["base_0_rgb"]
    np.testing.assert_array_equal(obs["base_0_rgb"], render(env.scenes)[0])


def test_what_info_says(env: TableEnv) -> None:
    families, counts = set(), set()
    for seed in range(200):
        _, info = env.reset(seed=seed)
        meant = parse(info["instruction"])
        goals = meant.goals(env.scenes.rims[0], env.scenes.present[0])
        assert info["goals"] == tuple(goal.names for goal in goals)
        assert not info["success"] and info["goals_done"] < len(goals) and info["subtask"].startswith("pick up the ")
        families.add(meant.family)
        counts.add(len(goals))
    assert families == set(FAMILIES) and counts == {2, 3, 4}


@pytest.mark.parametrize("seed", range(20))
def test_the_scripted_subtasks_lead_to_success(env: TableEnv, seed: int) -> None:
    _, info = env.reset(seed=seed)
    done = finish(env, info)
    assert done["success"] and done["goals_done"] == len(done["goals"]) and done["subtask"] == ALL_DONE
    for colour, bin_ in done["goals"]:
        assert env.scenes.place[0, COLOURS.index(colour)] == BINS.index(bin_)


def test_success_is_of_the_table_not_of_what_a_model_says(env: TableEnv) -> None:
    _, info = env.reset(seed=1, options={"instruction": "put every block in the left bin"})
    rewards = []
    while not info["success"]:
        assert info["subtask"] != ALL_DONE
        for action in chunk(env, info["subtask"]):
            _, reward, terminated, _, info = env.step(action)
            rewards.append(reward)
            assert reward == float(info["success"]) and not terminated
    assert {0.0, 1.0} == set(rewards)
    red_or_green = int(env.scenes.present[0].argmax())
    for action in chunk(env, SUBTASKS[red_or_green]):
        _, reward, _, _, info = env.step(action)
    assert env.scenes.place[0, red_or_green] == HELD
    assert not info["success"] and reward == 0.0 and info["subtask"] == "put it in the left bin"


def test_an_episode_is_cut_after_so_many_steps() -> None:
    env = gymnasium.make(BY_NAME)
    obs, _ = env.reset(seed=0)
    ends = [env.step(obs["state"])[2:4] for _ in range(MAX_STEPS)]
    assert ends == [(False, False)] * (MAX_STEPS - 1) + [(False, True)]
    assert MAX_STEPS == 240 == MAX_CALLS * 12


class TestInstructions:
    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize(
        "text",
        [
            "Put the yellow block in the right bin, then the green block in the right bin.",
            "red in the left bin, green in the left bin, blue in the left bin and yellow in the right bin",
            "sort the blocks by colour",
            "move everything into the middle bin",
            "put the blue block in the left bin and the rest in the right bin",
        ],
    )
    def test_asked_for_at_reset(self, env: TableEnv, text: str, seed: int) -> None:
        _, info = env.reset(seed=seed, options={"instruction": text})
        assert info["instruction"] == text and not info["success"]
        assert info["goals"] == tuple(goal.names for goal in parse(text).goals(env.scenes.rims[0], env.scenes.present[0]))
        assert finish(env, info)["success"]

    def test_changed_on_the_way(self, env: TableEnv) -> None:
        _, info = env.reset(seed=3, options={"instruction": "put every block in the left bin"})
        while not env.scenes.holding[0]:
            for action in chunk(env, info["subtask"]):
                _, _, _, _, info = env.step(action)
        held = COLOURS[int((env.scenes.place[0] == HELD).argmax())]
        env.set_instruction(f"Put the {held} block in the right bin.")
        _, _, _, _, info = env.step(chunk(env, ALL_DONE)[0])
        assert (info["instruction"], info["goals"]) == (f"Put the {held} block in the right bin.", ((held, "right"),))
        assert info["subtask"] == "put it in the right bin"
        assert finish(env, info)["success"]

    def test_one_that_is_none_changes_nothing(self, env: TableEnv) -> None:
        _, before = env.reset(seed=0)
        with pytest.raises(InstructionError, match='say it like one of these: "put the red block in the left bin, then'):
            env.set_instruction("make me a sandwich")
        absent = COLOURS[int(env.scenes.present[0].argmin())]
        with pytest.raises(InstructionError, match=f"there is no {absent} block on this table"):
            env.set_instruction(f"put the {absent} block in the left bin")
        _, _, _, _, after = env.step(env.scenes.state[0])
        assert (after["instruction"], after["goals"]) == (before["instruction"], before["goals"])

    def test_one_that_is_none_at_reset(self, env: TableEnv) -> None:
        with pytest.raises(InstructionError, match="'dance': not an instruction that this table knows"):
            env.reset(seed=0, options={"instruction": "dance"})


class TestMistakes:
    @pytest.mark.parametrize("action", [[0.0, 0.0], [[0.0, 0.0, 1.0]], [0.0, np.nan, 1.0], [0.0, 0.0, np.inf], np.zeros((12, 3))])
    def test_an_action_that_is_none(self, env: TableEnv, action: Any) -> None:
        env.reset(seed=0)
        before = env.scenes.state
        with pytest.raises(ValueError, match="expected 3 finite numbers"):
            env.step(action)
        np.testing.assert_array_equal(env.scenes.state, before)

    def test_an_action_out_of_range_is_cut(self, env: TableEnv) -> None:
        env.reset(seed=0)
        for _ in range(20):
            obs, *_ = env.step(np.array([5.0, -5.0, -5.0]))
        np.testing.assert_allclose(obs["state"], [1, -1, -1])
        assert env.observation_space.contains(obs)

    @pytest.mark.parametrize("call", [lambda env: env.step([0, 0, 0]), lambda env: env.set_instruction("sort the blocks by colour")])
    def test_before_reset(self, call: Any) -> None:
        with pytest.raises(gymnasium.error.ResetNeeded, match="call reset"):
            call(TableEnv())

    def test_unknown_option_and_render_mode(self, env: TableEnv) -> None:
        with pytest.raises(ValueError, match="options: got 'task', expected at most 'instruction'"):
            env.reset(options={"task": "sort the blocks by colour"})
        with pytest.raises(ValueError, match="render_mode: got 'human'"):
            TableEnv(render_mode="human")


def test_render() -> None:
    env = TableEnv(render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    np.testing.assert_array_equal(env.render(), obs["base_0_rgb"])
    silent = TableEnv()
    silent.reset(seed=0)
    assert silent.render() is None
