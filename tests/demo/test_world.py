"""The table's physics: moving, picking, dropping; and how a table is laid out."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from demo.world import (
    ABSENT,
    BIN_CENTRES,
    BIN_HALF,
    GRASP_RADIUS,
    HELD,
    MAX_STEP,
    SLOTS,
    SPACING,
    SPAWN,
    TABLE,
    Bools,
    Scenes,
    lay_out,
    start,
)

RED, GREEN, BLUE, YELLOW = range(4)
FAR = (0.9, 0.9)


def table(*, gripper: tuple[float, float] = (0.5, 0.5), closed: bool = False, **blocks: tuple[float, float]) -> Scenes:
    """One table with loose blocks at these places."""
    scenes = Scenes(np.zeros((1, 4, 2)), np.full((1, 4), ABSENT, np.int8), np.array([[0, 1, 2]], np.int8), np.array([gripper]), np.array([closed]))
    for name, place in blocks.items():
        colour = ["red", "green", "blue", "yellow"].index(name)
        scenes.place[0, colour], scenes.position[0, colour] = TABLE, place
    return scenes


def go(scenes: Scenes, x: float, y: float, *, closed: bool) -> None:
    """One step towards a point in table units."""
    scenes.advance(np.array([[2 * x - 1, 2 * y - 1, 1.0 if closed else -1.0]]))


class TestMoving:
    def test_straight_and_no_faster_than_allowed(self) -> None:
        scenes = table(gripper=(0.2, 0.3))
        go(scenes, 0.5, 0.7, closed=False)
        np.testing.assert_allclose(scenes.gripper, [[0.2 + 0.6 * MAX_STEP, 0.3 + 0.8 * MAX_STEP]])

    def test_a_near_target_is_reached_exactly(self) -> None:
        scenes = table()
        go(scenes, 0.53, 0.48, closed=False)
        np.testing.assert_allclose(scenes.gripper, [[0.53, 0.48]])
        go(scenes, 0.53, 0.48, closed=False)
        np.testing.assert_allclose(scenes.gripper, [[0.53, 0.48]])

    def test_never_leaves_the_table(self) -> None:
        scenes = table(gripper=(0.98, 0.02))
        for _ in range(3):
            scenes.advance(np.array([[7.0, -7.0, -1.0]]))
        np.testing.assert_allclose(scenes.gripper, [[1.0, 0.0]])

    def test_state_is_in_the_units_of_the_commands(self) -> None:
        scenes = table(gripper=(0.25, 1.0))
        np.testing.assert_array_equal(scenes.state, [[-0.5, 1.0, -1.0]])
        scenes.advance(scenes.state * [1, 1, -1])
        np.testing.assert_array_equal(scenes.state, [[-0.5, 1.0, 1.0]])


class TestPicking:
    @pytest.mark.parametrize(("away", "picked"), [(0.0, True), (GRASP_RADIUS - 1e-6, True), (GRASP_RADIUS + 1e-6, False)])
    def test_within_reach(self, away: float, picked: bool) -> None:
        scenes = table(red=(0.5 + away, 0.5))
        go(scenes, 0.5, 0.5, closed=True)
        assert scenes.holding[0] == picked and scenes.closed[0]

    def test_the_nearest(self) -> None:
        scenes = table(red=(0.55, 0.5), green=(0.5, 0.46), blue=(0.44, 0.5))
        go(scenes, 0.5, 0.5, closed=True)
        assert scenes.place[0].tolist() == [TABLE, HELD, TABLE, ABSENT]

    def test_what_is_not_there_is_not_picked(self) -> None:
        scenes = table(gripper=(0.03, 0.0))
        go(scenes, 0.0, 0.0, closed=True)
        assert not scenes.holding[0]

    def test_moves_first_then_closes(self) -> None:
        scenes = table(red=(0.6, 0.5))
        go(scenes, 0.56, 0.5, closed=True)
        assert scenes.holding[0]

    def test_fingers_that_are_closed_pick_nothing(self) -> None:
        scenes = table(red=(0.5, 0.5), closed=True)
        go(scenes, 0.5, 0.5, closed=True)
        assert not scenes.holding[0]

    def test_a_held_block_goes_along(self) -> None:
        scenes = table(red=(0.52, 0.5))
        go(scenes, 0.5, 0.5, closed=True)
        np.testing.assert_allclose(scenes.position[0, RED], [0.5, 0.5])
        go(scenes, 0.5, 0.56, closed=True)
        np.testing.assert_allclose(scenes.position[0, RED], [0.5, 0.56])

    def test_only_one(self) -> None:
        scenes = table(red=(0.5, 0.5), green=(0.5, 0.53))
        for _ in range(3):
            go(scenes, 0.5, 0.51, closed=True)
        assert scenes.place[0].tolist() == [HELD, TABLE, ABSENT, ABSENT]


class TestDropping:
    def holding(self, colour: int, at: tuple[float, float]) -> Scenes:
        scenes = table(gripper=at, closed=True)
        scenes.place[0, colour], scenes.position[0, colour] = HELD, at
        return scenes

    @pytest.mark.parametrize("bin_", range(3))
    @pytest.mark.parametrize("colour", range(4))
    def test_in_a_bin_it_snaps_to_its_slot(self, bin_: int, colour: int) -> None:
        corner = BIN_CENTRES[bin_] + [0.99, -0.99] * BIN_HALF
        scenes = self.holding(colour, (corner[0], corner[1]))
        go(scenes, corner[0], corner[1], closed=False)
        assert scenes.place[0, colour] == bin_ and not scenes.closed[0]
        np.testing.assert_allclose(scenes.position[0, colour], BIN_CENTRES[bin_] + SLOTS[colour])

    def test_beside_a_bin_it_lies_where_it_is(self) -> None:
        beside = BIN_CENTRES[0] + [0.0, 1.01] * BIN_HALF
        scenes = self.holding(BLUE, (beside[0], beside[1]))
        go(scenes, beside[0], beside[1], closed=False)
        assert scenes.place[0, BLUE] == TABLE
        np.testing.assert_allclose(scenes.position[0, BLUE], beside)

    def test_it_can_be_picked_out_of_a_bin_again(self) -> None:
        scenes = self.holding(YELLOW, (0.18, 0.16))
        go(scenes, 0.18, 0.16, closed=False)
        x, y = scenes.position[0, YELLOW]
        for closed in (False, False, True):
            go(scenes, x, y, closed=closed)
        assert scenes.place[0, YELLOW] == HELD

    def test_blocks_in_one_bin_do_not_hide_each_other(self) -> None:
        apart = np.abs(SLOTS[:, None] - SLOTS[None]).max(axis=-1)
        assert (apart[~np.eye(4, dtype=bool)] > 2 * 0.048).all()


def test_tables_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(3)
    scenes = start(rng, *lay_out(rng, 200))
    alone = [scenes.take(np.array([row])) for row in range(200)]
    for _ in range(60):
        commands = rng.uniform(-1.2, 1.2, (200, 3))
        scenes.advance(commands)
        for row, one in enumerate(alone):
            one.advance(commands[row : row + 1])
    for row, one in enumerate(alone):
        np.testing.assert_array_equal(one.position[0], scenes.position[row])
        np.testing.assert_array_equal(one.place[0], scenes.place[row])
    assert scenes.holding.any() and (scenes.place < TABLE).any()


def test_a_copy_is_a_copy() -> None:
    scenes = table(red=(0.5, 0.5))
    copy = scenes.take(np.array([0]))
    go(scenes, 0.5, 0.5, closed=True)
    assert copy.place[0, RED] == TABLE and not copy.closed[0]


class TestLayingOut:
    def test_rims_and_blocks(self) -> None:
        rims, present = lay_out(np.random.default_rng(0), 2000)
        assert all(len(set(own)) == 3 for own in rims.tolist())
        assert {tuple(own) for own in rims.tolist()} == set(permutations(range(4), 3))
        assert set(present.sum(axis=1).tolist()) == {2, 3, 4}
        assert (present.mean(axis=0) > 0.7).all()

    def test_sortable(self) -> None:
        rims, present = lay_out(np.random.default_rng(0), 1000, sortable=np.ones(1000, np.bool_))
        has_rim = (rims[:, :, None] == np.arange(4)).any(axis=1)
        assert (has_rim | ~present).all() and set(present.sum(axis=1).tolist()) == {2, 3}

    def test_needed_blocks_are_there(self) -> None:
        needed: Bools = np.random.default_rng(1).random((1000, 4)) < 0.5
        _, present = lay_out(np.random.default_rng(0), 1000, needed=needed)
        assert (present | ~needed).all() and present.sum(axis=1).min() == 2

    def test_start(self) -> None:
        rng = np.random.default_rng(0)
        rims, present = lay_out(rng, 2000)
        scenes = start(rng, rims, present)
        loose = scenes.place == TABLE
        assert not scenes.closed.any() and not scenes.holding.any()
        np.testing.assert_array_equal(scenes.present, present)
        assert (scenes.position[loose] >= SPAWN[0]).all() and (scenes.position[loose] <= SPAWN[1]).all()
        apart = np.linalg.norm(scenes.position[:, :, None] - scenes.position[:, None], axis=-1)
        both = loose[:, :, None] & loose[:, None] & ~np.eye(4, dtype=bool)
        assert apart[both].min() > SPACING
        row, colour = np.nonzero(scenes.place < TABLE)
        np.testing.assert_allclose(scenes.position[row, colour], BIN_CENTRES[scenes.place[row, colour]] + SLOTS[colour])
        assert 0.09 < len(row) / present.sum() < 0.15
