"""The scripted expert: chunk by chunk, and through whole episodes."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from demo.expert import HORIZON, SPEED, plan
from demo.instructions import DONE, FAMILIES, PICK, PUT, Goal, goal_table, goals_hold, next_subtask, random_instruction
from demo.sampling import for_action, for_planner, training_rng
from demo.table import MAX_CALLS
from demo.world import BIN_CENTRES, HELD, MAX_STEP, TABLE, Floats, Scenes, lay_out, start
from tests.demo.test_world import table

RED, GREEN = 0, 1


def chunk(scenes: Scenes, subtask: int) -> Floats:
    """One table's plan ``[12, 3]``, places in table units."""
    actions = plan(scenes, np.array([subtask]))[0]
    return np.concatenate([(actions[:, :2] + 1) / 2, actions[:, 2:]], axis=1)


def run(scenes: Scenes, subtasks: NDArray[np.intp]) -> None:
    """Execute one chunk on every table."""
    for commands in plan(scenes, subtasks).transpose(1, 0, 2):
        scenes.advance(commands)


def test_picks_straight_on_with_one_step_of_waiting() -> None:
    scenes = table(gripper=(0.2, 0.5), red=(0.2 + 3.5 * SPEED, 0.5))
    actions = chunk(scenes, PICK + RED)
    np.testing.assert_allclose(actions[:4, 0], 0.2 + SPEED * np.array([1, 2, 3, 3.5]))
    np.testing.assert_allclose(actions[3:, 0], 0.2 + 3.5 * SPEED)
    np.testing.assert_allclose(actions[:, 1], 0.5)
    assert actions[:, 2].tolist() == [-1] * 5 + [1] * (HORIZON - 5)
    assert SPEED < MAX_STEP


def test_a_chunk_that_begins_at_the_target_waits_once_then_grips() -> None:
    actions = chunk(table(red=(0.5, 0.5)), PICK + RED)
    assert actions[:, 2].tolist() == [-1] + [1] * (HORIZON - 1)


def test_a_long_way_takes_two_chunks() -> None:
    scenes = table(gripper=(0.05, 0.9), red=(0.95, 0.95))
    run(scenes, np.array([PICK + RED]))
    assert not scenes.holding[0]
    np.testing.assert_allclose(np.linalg.norm(scenes.gripper[0] - [0.05, 0.9]), HORIZON * SPEED)
    run(scenes, np.array([PICK + RED]))
    assert scenes.place[0, RED] == HELD


def test_closed_fingers_open_before_they_come_to_pick() -> None:
    scenes = table(gripper=(0.4, 0.5), closed=True, red=(0.4 + SPEED, 0.5))
    actions = chunk(scenes, PICK + RED)
    np.testing.assert_allclose(actions[:3, 0], [0.4, 0.4 + SPEED, 0.4 + SPEED])
    assert actions[:5, 2].tolist() == [-1, -1, -1, 1, 1]
    run(scenes, np.array([PICK + RED]))
    assert scenes.place[0, RED] == HELD


def test_a_wrong_block_is_dropped_first() -> None:
    scenes = table(gripper=(0.4, 0.6), closed=True, red=(0.7, 0.6), green=(0.4, 0.6))
    scenes.place[0, GREEN] = HELD
    run(scenes, np.array([PICK + RED]))
    assert scenes.place[0].tolist()[:2] == [HELD, TABLE]
    np.testing.assert_allclose(scenes.position[0, GREEN], [0.4, 0.6])


@pytest.mark.parametrize("bin_", range(3))
def test_puts_into_the_middle_of_the_bin(bin_: int) -> None:
    scenes = table(gripper=(0.5, 0.6), closed=True, red=(0.5, 0.6))
    scenes.place[0, RED] = HELD
    actions = chunk(scenes, PUT + bin_)
    np.testing.assert_allclose(actions[-1, :2], BIN_CENTRES[bin_])
    assert actions[0, 2] == 1 and actions[-1, 2] == -1
    run(scenes, np.array([PUT + bin_]))
    assert scenes.place[0, RED] == bin_


@pytest.mark.parametrize(
    ("subtask", "held", "closed"), [(PICK + RED, True, True), (PUT, False, False), (PUT, False, True), (DONE, True, True), (DONE, False, False)]
)
def test_what_is_finished_is_held_still(subtask: int, held: bool, closed: bool) -> None:
    scenes = table(gripper=(0.3, 0.6), closed=closed, red=(0.3, 0.6))
    if held:
        scenes.place[0, RED] = HELD
    np.testing.assert_allclose(chunk(scenes, subtask), np.tile([0.3, 0.6, 1 if closed else -1], (HORIZON, 1)))


def test_a_plan_leaves_the_scene_alone_and_rows_apart() -> None:
    samples = for_action(training_rng(0), 300)
    before = samples.scenes.take(np.arange(300))
    together = plan(samples.scenes, samples.subtasks)
    np.testing.assert_array_equal(before.position, samples.scenes.position)
    np.testing.assert_array_equal(before.gripper, samples.scenes.gripper)
    assert together.shape == (300, HORIZON, 3) and np.abs(together).max() <= 1
    for row in range(0, 300, 7):
        np.testing.assert_array_equal(plan(samples.scenes.take(np.array([row])), samples.subtasks[row : row + 1])[0], together[row])


def test_the_gripper_is_where_the_expert_expects_it() -> None:
    samples = for_action(training_rng(1), 500)
    for commands in plan(samples.scenes, samples.subtasks).transpose(1, 0, 2):
        samples.scenes.advance(commands)
        np.testing.assert_allclose(samples.scenes.state, commands, atol=1e-9)


def episodes(count: int, seed: int) -> tuple[Scenes, NDArray[np.int8]]:
    """``count`` starts with all families, and their goals."""
    rng = np.random.default_rng(seed)
    families = np.arange(count) % len(FAMILIES)
    rims, present = lay_out(rng, count, sortable=families == FAMILIES.index("sort"))
    goals = [
        random_instruction(rng, FAMILIES[family], own_rims, own_blocks).goals(own_rims, own_blocks)
        for family, own_rims, own_blocks in zip(families, rims, present, strict=True)
    ]
    return start(rng, rims, present), goal_table(goals)


def test_every_episode_succeeds_within_the_calls() -> None:
    scenes, goals = episodes(2000, seed=0)
    for _ in range(MAX_CALLS - 1):
        run(scenes, next_subtask(scenes.place, goals))
    assert goals_hold(scenes.place, goals).all() and not scenes.holding.any()
    assert (next_subtask(scenes.place, goals) == DONE).all()


def test_from_wherever_training_begins_the_work_gets_done() -> None:
    scenes = for_planner(training_rng(3), 1000).scenes
    goals = goal_table([(Goal(int(colour), row % 3),) for row, colour in enumerate(scenes.present.argmax(axis=1))])
    for _ in range(6):
        run(scenes, next_subtask(scenes.place, goals))
    assert goals_hold(scenes.place, goals).all()


@pytest.mark.parametrize("chunks", range(1, 6))
def test_a_change_of_mind_on_the_way(chunks: int) -> None:
    scenes, goals = episodes(400, seed=5)
    for _ in range(chunks):
        run(scenes, next_subtask(scenes.place, goals))
    other = goal_table([(Goal(3 - int(present[::-1].argmax()), row % 3),) for row, present in enumerate(scenes.present)])
    for _ in range(6):
        run(scenes, next_subtask(scenes.place, other))
    assert goals_hold(scenes.place, other).all()
