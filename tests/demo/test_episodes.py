"""The robot's two loops, with policies that follow the scripted rules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from demo.episodes import TICKS, Call, Episode, Robot, lockstep, new_table, real_time, says_done
from demo.expert import plan
from demo.instructions import ALL_DONE, DONE, FAMILIES, SUBTASKS, goal_table, next_subtask, parse
from demo.table import MAX_CALLS, MAX_STEPS, TableEnv

FAST = 2000.0
"""Actions per second in tests: as fast as it goes."""


class Rules:
    """A policy that sees the table itself; it is asked what a planner and a policy would be.

    Args:
        says: whether it tells a subtask, as a server with a planner does.
        operator: what an operator asks instead of the robot's prompt, from the given request on.
    """

    def __init__(self, table: TableEnv, *, says: bool = True, operator: Mapping[int, str] | None = None) -> None:
        self.table = table
        self.says = says
        self.operator = operator or {}
        self.asked: list[dict[str, Any]] = []

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        number = len(self.asked)
        self.asked.append({key: value for key, value in obs.items() if key != "base_0_rgb"})
        told = next((text for since, text in sorted(self.operator.items(), reverse=True) if number >= since), None)
        scenes = self.table.scenes
        goals = goal_table([parse(told or obs["prompt"]).goals(scenes.rims[0], scenes.present[0])])
        subtask = next_subtask(scenes.place, goals)
        reply: dict[str, Any] = {"instruction": told} if told else {}
        if self.says:
            reply["subtask"] = {"text": SUBTASKS[subtask[0]], "done": bool(subtask[0] == DONE), "waited": True}
        if not self.says or subtask[0] != DONE:
            reply["actions"] = plan(scenes, subtask)[0]
        return reply


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> TableEnv:
    """The table that the next lockstep episode is played at."""
    table = new_table()
    monkeypatch.setattr("demo.episodes.new_table", lambda: table)
    return table


def test_lockstep_ends_when_the_planner_says_so(table: TableEnv) -> None:
    rules = Rules(table)
    episode = lockstep(rules, 3)
    assert episode.success and episode.done and episode.seed == 3 and episode.family in FAMILIES
    assert episode.steps == 12 * (len(episode.calls) - 1) and episode.calls[-1].reply["subtask"]["text"] == ALL_DONE
    assert [obs["prompt"] for obs in rules.asked] == [episode.instruction] * len(rules.asked)
    assert [obs["seed"] for obs in rules.asked] == list(range(len(rules.asked))), "noise of its own for every call, the same in every run"
    assert all(call.right for call in episode.calls)


def test_lockstep_without_a_planner_ends_when_the_goals_hold(table: TableEnv) -> None:
    episode = lockstep(Rules(table, says=False), 3, until_goals_hold=True)
    assert episode.success and not episode.done and table.info["success"] and len(episode.calls) < MAX_CALLS


def test_lockstep_goes_on_where_a_planner_has_yet_to_say_so(table: TableEnv) -> None:
    class Silent(Rules):
        def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
            reply = super().infer(obs)
            reply["subtask"] = {"text": "…", "done": False}
            return {"actions": np.tile(obs["state"], (12, 1)), **reply}

    episode = lockstep(Silent(table), 3)
    assert episode.success and not episode.done and len(episode.calls) == MAX_CALLS


def test_lockstep_gives_up(table: TableEnv) -> None:
    class Idle:
        def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
            return {"actions": np.tile(obs["state"], (12, 1)), "subtask": {"text": "wait"}}

    episode = lockstep(Idle(), 0, executed=6)
    assert not episode.success and not episode.done and episode.steps == MAX_STEPS and len(episode.calls) == 2 * MAX_CALLS


def test_a_wrong_done_is_no_success(table: TableEnv) -> None:
    class Hasty:
        def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
            return {"subtask": {"text": ALL_DONE, "done": True}}

    episode = lockstep(Hasty(), 0)
    assert episode.done and not episode.success and episode.steps == 0 and episode.calls[0].right is False


def test_lockstep_sends_what_the_mode_needs(table: TableEnv) -> None:
    rules = Rules(table, says=False)
    lockstep(rules, 1, prompt=lambda info: info["instruction"].upper(), fields={"mode": "action_only"})
    assert rules.asked[0]["mode"] == "action_only" and rules.asked[0]["prompt"].isupper()


def test_real_time_gets_there(table: TableEnv) -> None:
    watched: list[tuple[int, int]] = []
    begun: list[str] = []
    rules = Rules(table)
    episode = real_time(rules, 3, rate_hz=200.0, begins=begun.append, watch=lambda episode, info: watched.append((episode.steps, info["goals_done"])))
    assert episode.success and episode.done and begun == [episode.instruction]
    assert watched[-1][0] == episode.steps and [steps for steps, _ in watched] == sorted(steps for steps, _ in watched)
    assert len(episode.calls) == len(rules.asked)


def test_real_time_goes_on_while_a_request_is_under_way() -> None:
    """The reply to the second request is held back until the robot has taken six more actions."""
    table = new_table()
    acted = threading.Semaphore(0)

    class Slow(Rules):
        def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
            if len(self.asked) == 1:
                for _ in range(6):
                    assert acted.acquire(timeout=30)
            return super().infer(obs)

    rules = Slow(table)
    steps = 0

    def watch(episode: Episode, info: Mapping[str, Any]) -> None:
        nonlocal steps
        if len(rules.asked) >= 1 and episode.steps > steps >= TICKS:
            acted.release()
        steps = episode.steps

    episode = real_time(rules, 3, table=table, rate_hz=FAST, max_steps=200, watch=watch)
    assert len(episode.calls) >= 3 and episode.steps > TICKS + 6


def test_a_chunk_begins_where_its_observation_was_made() -> None:
    class Counts:
        def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
            return {"actions": np.arange(12)[:, None] + 100 * obs["n"]}

    robot = Robot(Counts())
    assert robot.action(0) is None
    answers = []
    for number, tick in ((0, 0), (1, 5)):
        robot.ask({"n": number}, tick)
        while (answer := robot.answer()) is None:
            pass
        answers.append(answer)
        assert not robot.under_way
    robot.close()
    assert [int(robot.action(tick)[0]) for tick in (5, 8, 16, 40)] == [100, 103, 111, 111], "the last one is held"  # type: ignore[index]
    assert all(ms >= 0 for _, ms in answers)


def test_an_answer_without_a_chunk_stops_the_robot() -> None:
    replies = [{"actions": np.zeros((2, 3))}, {"subtask": {"text": ALL_DONE, "done": True}}]

    class Script:
        def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
            return replies.pop(0)

    robot = Robot(Script())
    for expected in (True, False):
        robot.ask({}, 0)
        while robot.answer() is None:
            pass
        assert (robot.action(0) is not None) is expected
    robot.close()


def test_an_operators_instruction_is_what_the_table_judges_by() -> None:
    table = new_table()
    _, info = table.reset(seed=3)
    present = [colour for colour in ("red", "green", "blue", "yellow") if colour in str(info["goals"])]
    other = f"put the {present[0]} block in the middle bin"
    episode = real_time(Rules(table, operator={2: other}), 3, table=table, rate_hz=200.0)
    assert episode.instruction == other and episode.success and episode.done
    assert table.info["goals"] == ((present[0], "middle"),)


def test_an_instruction_that_the_table_cannot_do_is_not_judged() -> None:
    table = new_table()
    asked: list[str] = []

    class Told(Rules):
        def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
            asked.append(obs["prompt"])
            return {**super().infer(obs), "instruction": "sing a song"}

    episode = real_time(Told(table), 3, table=table, rate_hz=200.0)
    assert episode.instruction == "sing a song" and episode.success, "the robot's own goals, which hold in the end"
    assert asked[-1] == asked[0], "the robot's own prompt goes on"


def test_an_instruction_that_is_withdrawn_is_no_longer_what_the_table_judges_by() -> None:
    table = new_table()
    _, info = table.reset(seed=3)
    bins = {"left": "right", "middle": "left", "right": "middle"}
    other = f"put the {info['goals'][0][0]} block in the {bins[info['goals'][0][1]]} bin"

    class Withdrawn(Rules):
        def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
            self.operator = {1: other} if len(self.asked) in (1, 2) else {}
            return super().infer(obs)

    rules = Withdrawn(table)
    episode = real_time(rules, 3, table=table, rate_hz=200.0)
    assert episode.instruction == info["instruction"] and episode.success and table.info["goals"] == info["goals"]
    assert sum(call.expected is None for call in episode.calls) == 2, "what was asked before and answered after is not judged"


def test_a_robot_that_lingers_hears_of_more_to_do() -> None:
    table = new_table()
    _, info = table.reset(seed=3)
    colour, bin_ = info["goals"][-1]
    other = f"put the {colour} block in the {'left' if bin_ != 'left' else 'right'} bin"

    class Asked(Rules):
        def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
            if not self.operator and self.table.info["success"]:
                self.operator = {len(self.asked) + 2: other}
            return super().infer(obs)

    episode = real_time(Asked(table), 3, table=table, rate_hz=200.0, linger=40)
    assert episode.instruction == other and episode.success and episode.done


def test_real_time_leaves_when_it_is_told() -> None:
    table = new_table()
    stops: list[bool] = []

    def stop() -> bool:
        stops.append(len(stops) >= 5)
        return stops[-1]

    episode = real_time(Rules(table), 3, table=table, rate_hz=FAST, stop=stop)
    assert len(stops) == 6 and not episode.done


def test_what_a_failed_request_raises_comes_out() -> None:
    class Broken:
        def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
            raise ZeroDivisionError

    for loop in (lambda: lockstep(Broken(), 0), lambda: real_time(Broken(), 0, rate_hz=FAST)):
        _raises(loop)


def _raises(loop: Callable[[], Episode]) -> None:
    with pytest.raises(ZeroDivisionError):
        loop()


def test_which_answers_are_judged() -> None:
    assert Call("pick up the red block", {"subtask": {"text": " pick up the red block "}}, 1.0).right is True
    assert Call("all done", {"subtask": {"text": "pick up the red block", "waited": True}}, 1.0).right is False
    assert Call("all done", {"subtask": {"text": "all done", "waited": False}}, 1.0).right is None, "planned from an earlier observation"
    assert Call("all done", {"actions": None}, 1.0).right is None
    assert Call(None, {"subtask": {"text": "all done"}}, 1.0).right is None
    assert says_done({"subtask": {"text": "", "done": True}}) and not says_done({"subtask": {"text": "all done"}}) and not says_done({})
