"""How the demo is measured: the shares, the modes, and the whole of it on the trained pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from demo.episodes import Call, Episode
from demo.evaluation import MODES, Mode, Result, as_table, evaluate, share
from demo.instructions import FAMILIES
from demo.serving import CHECKPOINTS
from hosting.policy import ConfigError
from tests.e2e.process import run


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Newcombe (1998), table I, method 3, gives these.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (20, 20, 0.8389, 1.0)],
)
def test_intervals_are_those_of_the_literature(hits: int, count: int, low: float, high: float) -> None:
    found = share(hits, count)
    assert found["share"] == hits / count
    assert (round(found["low"], 4), round(found["high"], 4)) == pytest.approx((low, high), abs=1e-4)


def test_nothing_measured_is_no_share() -> None:
    assert share(0, 0) == {"hits": 0, "count": 0, "share": None, "low": None, "high": None}


def test_a_result_counts_by_family() -> None:
    result = Result("default")
    for seed, family in enumerate(FAMILIES * 2):
        calls = [Call("all done", {"subtask": {"text": "all done" if seed else "put"}}, 5.0)]
        result.episodes.append(Episode(seed, "…", family, success=seed != 1, done=True, steps=10 * seed, calls=calls))
    assert result.success() == (7, 8) and result.success(FAMILIES[1]) == (1, 2) and result.success(FAMILIES[0]) == (2, 2)
    assert result.planner_right() == (7, 8)
    found = result.as_json()
    assert found["failed_seeds"] == [1] and found["said_done"] == 8 and found["calls"] == 1 and found["steps"] == 35 and found["ms_p50"] == 5.0
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(as_table({"modes": {"default": found}}))
    text = console.export_text()
    assert "87.5 % (52.9–97.8)" in text and "50.0 %" in text


@pytest.mark.timeout(400)  # a minute on two free cores
def test_the_trained_pair() -> None:
    """The project's promise at a small scale, through the sockets of servers: the floor that CI holds. docs/demo.md has the full figures."""
    modes: tuple[Mode, ...] = ("default", "scripted", "action_only")
    report = evaluate(24, modes, robots=1, planner_states=300)
    told = report["modes"]
    assert told["default"]["success"]["hits"] >= 22, told["default"]
    assert told["scripted"]["success"]["hits"] >= 22, told["scripted"]
    assert told["action_only"]["success"]["hits"] <= 3, told["action_only"]
    # A mistake repeats until the calls run out, so one lost episode costs several answers of the first.
    assert told["default"]["planner_right"]["share"] >= 0.95 and report["planner"]["right"]["share"] >= 0.97
    assert told["default"]["said_done"] >= 22
    json.dumps(report)


@pytest.mark.timeout(400)  # likewise
def test_the_command(tmp_path: Path) -> None:
    """The servers that the floor above does not need; the shipped policy stands in for the flat one."""
    figures = tmp_path / "figures.json"
    flat = CHECKPOINTS / "action"
    options = ("--episodes", "2", "--modes", "async+100,flat", "--flat", str(flat), "--robots", "1", "--planner-states", "0", "--json", str(figures))
    done = run("eval-demo", *options, timeout_s=300)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(figures.read_text())
    assert report["episodes"] == 2 and report["modes"].keys() == {"async+100", "flat"} and "planner" not in report
    assert report["modes"]["flat"]["planner_right"]["count"] == 0 and report["modes"]["async+100"]["ms_p50"] >= 100
    assert "async+100" in done.stdout and "flat" in done.stdout


@pytest.mark.parametrize(
    ("modes", "said"),
    [("default,sideways", "error: --modes: 'sideways' is none of default, scripted,"), ("flat", "error: --modes: flat needs --flat, the checkpoint")],
)
def test_modes_that_there_are_not(modes: str, said: str) -> None:
    done = run("eval-demo", "--episodes", "1", "--modes", modes)
    assert done.returncode == 2 and done.stderr.startswith(said) and "sideways" not in MODES


def test_checkpoints_that_are_not_there_are_told_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no checkpoint .*nothing"):
        evaluate(1, ("default",), flat=tmp_path / "nothing")
