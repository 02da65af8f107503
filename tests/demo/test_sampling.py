"""Draws for training: labelled right, possible, varied, and never what is measured on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from demo.expert import targets
from demo.instructions import DONE, FAMILIES, PUT, SUBTASKS, goal_table, next_subtask, parse
from demo.render import render
from demo.sampling import Samples, for_action, for_planner, held_out_rng, training_rng
from demo.world import BIN_CENTRES, HELD, SLOTS, SPACING, TABLE

Draw = Callable[[np.random.Generator, int], Samples]
BOTH = pytest.mark.parametrize("draw", [for_planner, for_action])


@BOTH
def test_scenes_are_possible(draw: Draw) -> None:
    scenes = draw(training_rng(0), 3000).scenes
    held = scenes.place == HELD
    assert held.sum(axis=1).max() == 1 and (scenes.closed | ~scenes.holding).all()
    np.testing.assert_array_equal(scenes.position[held], scenes.gripper[scenes.holding])
    row, colour = np.nonzero(scenes.place < TABLE)
    np.testing.assert_array_equal(scenes.position[row, colour], BIN_CENTRES[scenes.place[row, colour]] + SLOTS[colour])
    loose = scenes.place == TABLE
    apart = np.linalg.norm(scenes.position[:, :, None] - scenes.position[:, None], axis=-1)
    assert apart[loose[:, :, None] & loose[:, None] & ~np.eye(4, dtype=bool)].min() > SPACING
    assert (scenes.gripper >= 0).all() and (scenes.gripper <= 1).all()
    assert np.abs(scenes.state).max() <= 1


@BOTH
def test_scenes_are_varied(draw: Draw) -> None:
    scenes = draw(training_rng(0), 5000).scenes
    assert set(np.unique(scenes.place)) == {0, 1, 2, 3, 4, 5}
    assert 0.3 < scenes.holding.mean() < 0.45
    assert 0.02 < (scenes.closed & ~scenes.holding).mean() < 0.15
    assert {0, 1, 2, 3, 4} <= set((scenes.place < TABLE).sum(axis=1).tolist())
    assert scenes.gripper.min() < 0.02 and scenes.gripper.max() > 0.98
    near_bin = np.linalg.norm(scenes.gripper[:, None] - BIN_CENTRES, axis=-1).min(axis=1) < 0.1
    assert 0.2 < near_bin.mean() < 0.5
    dropped = (scenes.place == TABLE) & (scenes.position[..., 1] < 0.4)
    assert 0 < dropped.any(axis=1).mean() < 0.15


@BOTH
def test_every_instruction_can_be_done_on_its_table(draw: Draw) -> None:
    samples = draw(training_rng(0), 2000)
    asked = [parse(text) for text in samples.instructions]
    for instruction, rims, present in zip(asked, samples.scenes.rims, samples.scenes.present, strict=True):
        assert 1 <= len(instruction.goals(rims, present)) <= 4
    shares = [np.mean([instruction.family == family for instruction in asked]) for family in FAMILIES]
    assert min(shares) > 0.13 and shares[FAMILIES.index("seq")] == max(shares)
    assert len({text.lower() for text in samples.instructions}) > 500


def test_the_planners_label_is_the_next_subtask_of_the_instruction() -> None:
    samples = for_planner(training_rng(1), 2000)
    scenes = samples.scenes
    asked = zip(samples.instructions, scenes.rims, scenes.present, strict=True)
    goals = [parse(text).goals(rims, present) for text, rims, present in asked]
    np.testing.assert_array_equal(samples.subtasks, next_subtask(scenes.place, goal_table(goals)))


def test_the_planner_sees_all_answers_often() -> None:
    subtasks = for_planner(training_rng(0), 10_000).subtasks
    assert set(subtasks.tolist()) == set(range(len(SUBTASKS)))
    done, puts = np.mean(subtasks == DONE), np.mean((subtasks >= PUT) & (subtasks < DONE))
    assert 0.15 < done < 0.3 and 0.25 < puts < 0.4
    assert np.bincount(subtasks).min() > 500


def test_the_action_policy_sees_any_subtask_but_all_done() -> None:
    samples = for_action(training_rng(0), 10_000)
    holding, put = samples.scenes.holding, samples.subtasks >= PUT
    assert set(samples.subtasks.tolist()) == set(range(DONE))
    assert 0.8 < put[holding].mean() < 0.9 and 0.05 < put[~holding].mean() < 0.15
    assert samples.scenes.present[~put, samples.subtasks[~put]].all()
    again = holding & ~put
    picked = samples.scenes.place[again, samples.subtasks[again]] == HELD
    assert 0.4 < picked.mean() < 0.8


def test_the_action_policy_sees_what_a_missed_block_looks_like() -> None:
    samples = for_action(training_rng(0), 10_000)
    target, finished = targets(samples.scenes, samples.subtasks)
    close = ~finished & (np.linalg.norm(samples.scenes.gripper - target, axis=1) < 0.15)
    assert 0.35 < close.sum() / (~finished).sum() < 0.6
    to_pick = close & (samples.subtasks < PUT) & ~samples.scenes.holding
    assert 0.2 < samples.scenes.closed[to_pick].mean() < 0.4


@BOTH
def test_a_seed_fixes_the_draw(draw: Draw) -> None:
    first, second, other = draw(training_rng(4), 50), draw(training_rng(4), 50), draw(training_rng(5), 50)
    np.testing.assert_array_equal(render(first.scenes, 56), render(second.scenes, 56))
    assert first.instructions == second.instructions and first.subtasks.tolist() == second.subtasks.tolist()
    assert first.instructions != other.instructions


def test_training_held_out_draws_and_episodes_never_share_a_stream() -> None:
    streams = [rng.random(1000) for seed in range(20) for rng in (training_rng(seed), held_out_rng(seed), np.random.default_rng(seed))]
    values = np.concatenate(streams)
    assert len(np.unique(values)) == len(values)


def test_training_and_serving_need_no_gymnasium_and_no_framework() -> None:
    modules = "demo.world, demo.render, demo.instructions, demo.expert, demo.sampling, action.configs, action.embodiments, hosting.cli"
    code = f"import sys, {modules}; sys.exit(' '.join({{'gymnasium', 'torch', 'jax'}} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
