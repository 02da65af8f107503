"""What the camera sees."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from demo.render import render
from demo.sampling import for_planner, training_rng
from demo.world import ABSENT, BIN_CENTRES, BIN_HALF, COLOURS, HELD, TABLE, Scenes

RGB = {"red": (217, 46, 38), "green": (38, 158, 51), "blue": (38, 77, 224), "yellow": (242, 204, 26)}
BARE, INSIDE, DARK = (237, 230, 214), (252, 250, 247), (51, 51, 61)


def table(*, gripper: tuple[float, float] = (0.5, 0.8), closed: bool = False, rims: tuple[int, int, int] = (0, 1, 2)) -> Scenes:
    """One table without blocks."""
    return Scenes(
        np.zeros((1, 4, 2)), np.full((1, 4), ABSENT, np.int8), np.array([rims], np.int8), np.array([gripper], np.float64), np.array([closed])
    )


def pixel(scenes: Scenes, x: float, y: float, size: int = 224) -> tuple[int, ...]:
    return tuple(int(value) for value in render(scenes, size)[0, int(y * size), int(x * size)])


def dark_columns(scenes: Scenes) -> list[int]:
    """Columns with fingers in them, in a row through the gripper's centre."""
    row = render(scenes)[0, int(scenes.gripper[0, 1] * 224)]
    return [int(column) for column in np.flatnonzero((row == DARK).all(axis=-1))]


@pytest.mark.parametrize("size", [56, 224])
def test_shape(size: int) -> None:
    pictures = render(for_planner(training_rng(0), 5).scenes, size)
    assert pictures.shape == (5, size, size, 3) and pictures.dtype == np.uint8 and pictures.flags.c_contiguous


def test_rims_inside_and_table() -> None:
    scenes = table(rims=(3, 0, 2))
    for centre, colour in zip(BIN_CENTRES, ("yellow", "red", "blue"), strict=True):
        assert pixel(scenes, *(centre - BIN_HALF + 0.011)) == RGB[colour]
        assert pixel(scenes, *centre) == INSIDE
    assert pixel(scenes, 0.1, 0.6) == BARE


@pytest.mark.parametrize("colour", range(4))
def test_blocks(colour: int) -> None:
    scenes = table()
    scenes.place[0, colour], scenes.position[0, colour] = TABLE, (0.3, 0.6)
    for corner in ((-0.04, -0.04), (0.04, 0.04)):
        assert pixel(scenes, 0.3 + corner[0], 0.6 + corner[1]) == RGB[COLOURS[colour]]
    assert pixel(scenes, 0.3 + 0.06, 0.6) == BARE
    scenes.place[0, colour] = ABSENT
    assert pixel(scenes, 0.3, 0.6) == BARE


def test_a_block_in_a_bin_is_over_the_bin() -> None:
    scenes = table()
    scenes.place[0, 1], scenes.position[0, 1] = 2, BIN_CENTRES[2]
    assert pixel(scenes, *BIN_CENTRES[2]) == RGB["green"]


def test_fingers_tell_open_from_holding_from_empty() -> None:
    widths = []
    for closed, holding in ((False, False), (True, True), (True, False)):
        scenes = table(closed=closed)
        if holding:
            scenes.place[0, 0], scenes.position[0, 0] = HELD, scenes.gripper[0]
        columns = dark_columns(scenes)
        widths.append(max(columns) - min(columns))
    assert widths[0] > widths[1] + 8 > widths[2] + 16


def test_a_held_block_is_larger_and_over_the_others() -> None:
    scenes = table(closed=True)
    for place, colour in ((HELD, 0), (TABLE, 3)):
        scenes.place[0, colour], scenes.position[0, colour] = place, scenes.gripper[0]
    assert pixel(scenes, 0.5, 0.8) == RGB["red"] == pixel(scenes, 0.5, 0.85)
    assert (render(scenes)[0] != RGB["yellow"]).any(axis=-1).all()


@pytest.mark.parametrize("size", [56, 224])
@pytest.mark.parametrize("right", [False, True])
def test_what_reaches_over_the_edge_is_cut_off(right: bool, size: int) -> None:
    def holding(x: float, y: float) -> NDArray[np.uint8]:
        scenes = table(gripper=(x, y), closed=True)
        scenes.place[0, 0], scenes.position[0, 0] = HELD, (x, y)
        return render(scenes, size)[0]

    near, half = size // 6, size // 2
    whole = holding(0.5, 0.5)[half - near : half]
    corner = holding(float(right), 1.0)[-near:]
    if right:
        np.testing.assert_array_equal(corner[:, -near:], whole[:, half - near : half])
        np.testing.assert_array_equal(corner[:, :near], np.broadcast_to(BARE, (near, near, 3)))
    else:
        np.testing.assert_array_equal(corner[:, :near], whole[:, half : half + near])
        np.testing.assert_array_equal(corner[:, -near:], np.broadcast_to(BARE, (near, near, 3)))


@pytest.mark.parametrize("gripper", [(0.0, 0.0), (1.0, 0.0), (0.5, 0.0)])
def test_at_the_far_edge_only_the_near_half_of_the_gripper_is_seen(gripper: tuple[float, float]) -> None:
    far, gone = render(table(gripper=gripper))[0], render(table())[0]
    changed = np.flatnonzero((far[:112] != gone[:112]).any(axis=(1, 2)))
    assert changed.min() == 0 and changed.max() in (11, 12)  # fingers of half length 0.05


def test_a_small_picture_is_the_average_of_the_large_one() -> None:
    scenes = for_planner(training_rng(1), 100).scenes
    averaged = render(scenes).astype(np.float64).reshape(100, 56, 4, 56, 4, 3).mean(axis=(2, 4))
    difference = np.abs(averaged - render(scenes, 56))
    # Cells that two edges cross are blended edge by edge, so they may differ; all others are equal up to rounding.
    assert difference.mean() < 2e-3 * 255 / 2
    assert (difference.max(axis=-1) <= 1.5).mean() > 0.99


def test_motion_below_a_pixel_shows() -> None:
    seen: list[NDArray[np.uint8]] = []
    for x in (0.3, 0.3005, 0.301):
        scenes = table()
        scenes.place[0, 2], scenes.position[0, 2] = TABLE, (x, 0.6)
        seen.append(render(scenes, 56))
    assert (seen[0] != seen[1]).any() and (seen[1] != seen[2]).any()


def test_a_batch_is_its_pictures_one_by_one() -> None:
    scenes = for_planner(training_rng(2), 60).scenes
    together = render(scenes, 56)
    for row in range(60):
        np.testing.assert_array_equal(together[row], render(scenes.take(np.array([row])), 56)[0])


def test_pictures_are_the_callers_own() -> None:
    scenes = table()
    before = render(scenes).copy()
    render(scenes)[:] = 0
    np.testing.assert_array_equal(render(scenes), before)
