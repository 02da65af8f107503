"""``tandem eval-demo``: how often a robot at the simulated table does what it was told, by who drives it, through the server's sockets.

==================== ============================================================ ================
mode                 what the robot asks                                          loop
==================== ============================================================ ================
``default``          the long instruction; the planner breaks it into subtasks    lockstep
``scripted``         the right subtask, from the scripted rule (the upper bound)  lockstep
``action_only``      the long instruction, without the planner                    lockstep
``flat``             the long instruction, of a policy trained on long ones       lockstep
``every_request``    as ``default``                                               10 Hz
``every_request+100`` the same, each request 100 ms late                          10 Hz
``async``            as ``default``, the planner beside the action loop           10 Hz
``async+100``        the same, each request 100 ms late                           10 Hz
==================== ============================================================ ================

Each mode plays the same seeds, none of which training has seen (:func:`demo.sampling.training_rng`). The planner's accuracy is measured
twice: on the states that ``default`` met, and on states drawn at random (``planner``).
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table as RichTable

from demo.episodes import Episode, Policy, lockstep, real_time
from demo.instructions import FAMILIES, SUBTASKS
from demo.render import render
from demo.sampling import for_planner, held_out_rng
from demo.serving import CHECKPOINTS, demo_config, serving
from hosting.clients import connect
from hosting.config import ServiceConfig
from hosting.policy import ConfigError
from hosting.service import Service
from hosting.templates import DEFAULT_ACTION_PROMPT_TEMPLATE

logger = logging.getLogger(__name__)

Mode = Literal["default", "scripted", "action_only", "flat", "every_request", "every_request+100", "async", "async+100"]
MODES: Final[tuple[Mode, ...]] = get_args(Mode)
ADDED_S: Final = 0.1
FIRST_SEED: Final = 1_000_000
RATE_HZ: Final = 10.0
REFRESH_S: Final = 0.3
"""``planner.interval_s`` of the asynchronous modes."""

Progress = Callable[[str, int, int], None]
"""(what, done, of)"""


@dataclass
class Result:
    """Episodes of one mode, and the planner's answers among them."""

    mode: str
    episodes: list[Episode] = field(default_factory=list)
    seconds: float = 0.0

    def success(self, family: str | None = None) -> tuple[int, int]:
        """(successes, episodes), of one family or of all."""
        chosen = [episode for episode in self.episodes if family in (None, episode.family)]
        return sum(episode.success for episode in chosen), len(chosen)

    def planner_right(self) -> tuple[int, int]:
        """(right, all) of the subtasks that were planned from the very observation they answer."""
        judged = [call.right for episode in self.episodes for call in episode.calls if call.right is not None]
        return sum(judged), len(judged)

    def as_json(self) -> dict[str, Any]:
        """Counts, shares and intervals."""
        return {
            "success": share(*self.success()),
            "families": {family: share(*self.success(family)) for family in FAMILIES},
            "planner_right": share(*self.planner_right()),
            "said_done": sum(episode.done for episode in self.episodes),
            "calls": _mean(len(episode.calls) for episode in self.episodes),
            "steps": _mean(episode.steps for episode in self.episodes),
            "ms_p50": _median(call.ms for episode in self.episodes for call in episode.calls),
            "failed_seeds": [episode.seed for episode in self.episodes if not episode.success],
            "seconds": round(self.seconds, 1),
        }


def evaluate(
    episodes: int,
    modes: Sequence[Mode] = MODES,
    *,
    checkpoints: Path = CHECKPOINTS,
    flat: Path | None = None,
    first_seed: int = FIRST_SEED,
    robots: int = 4,
    planner_states: int = 2000,
    progress: Progress = lambda what, done, of: None,
) -> dict[str, Any]:
    """Plays ``episodes`` episodes in each of ``modes``; the figures as JSON.

    Args:
        checkpoints: holds ``planner/`` and ``action/``.
        flat: the flat baseline's checkpoint (``train-demo`` writes it; it is not shipped). Without it, ``flat`` is left out.
        robots: how many play side by side.
        planner_states: random states that the planner is asked about besides; 0: none.
    """
    wanted = [mode for mode in modes if mode != "flat" or flat is not None]
    for directory in (checkpoints / "planner", checkpoints / "action", *([flat] if flat is not None else [])):
        if not directory.is_dir():  # rather now than after an hour
            raise ConfigError(f"there is no checkpoint {directory}; give the directory that train-demo wrote")
    results: dict[str, Result] = {}
    report: dict[str, Any] = {}
    seeds = range(first_seed, first_seed + episodes)

    async def of_one_server(config: ServiceConfig, own: Sequence[Mode], states: int = 0) -> None:
        service = Service(config, handle_signals=False)
        async with serving(service):
            for mode in own:
                results[mode] = await asyncio.to_thread(_play, mode, service.addresses["action"], seeds, robots, progress)
            if states:
                report["planner"] = await asyncio.to_thread(_random_states, service.addresses["planner"], states, progress)

    plain = [mode for mode in wanted if not mode.startswith("async") and mode != "flat"]
    if plain or planner_states:
        config = demo_config(checkpoints, free_ports=True, rows=_rows(robots))
        asyncio.run(of_one_server(config, plain, planner_states))
    if beside := [mode for mode in wanted if mode.startswith("async")]:
        config = demo_config(checkpoints, free_ports=True, rows=_rows(robots), refresh="async", interval_s=REFRESH_S)
        asyncio.run(of_one_server(config, beside))
    if "flat" in wanted:
        assert flat is not None
        config = demo_config(checkpoints, free_ports=True, rows=_rows(robots))
        assert config.action is not None
        action = config.action.model_copy(update={"checkpoint_dir": str(flat)})
        asyncio.run(of_one_server(config.model_copy(update={"action": action, "planner": None}), ["flat"]))
    report["modes"] = {mode: results[mode].as_json() for mode in wanted}
    return {"episodes": episodes, "first_seed": first_seed, **report}


@contextmanager
def show_progress() -> Iterator[Progress]:
    """A bar per mode when stderr is a terminal, else a log line when one is finished."""
    if not sys.stderr.isatty():
        yield lambda what, done, of: logger.info("%s: %d played", what, of) if done == of else None
        return
    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done)

        yield show


def _rows(robots: int) -> int:
    """The largest batch: each doubling of the planner's costs its programs once more at the start."""
    return min(4, 1 << (robots - 1).bit_length())


def _play(mode: Mode, url: str, seeds: Sequence[int], robots: int, progress: Progress) -> Result:
    """Episodes of all ``seeds``, ``robots`` at a time, each robot over a connection and with a session of its own."""
    result = Result(mode)
    lock, failed = threading.Lock(), threading.Event()
    started_s = time.perf_counter()

    def robot(number: int) -> list[Episode]:
        played = []
        try:
            with closing(connect(url, session_id=f"{mode} {number}", retry_lost=False)) as client:
                for seed in seeds[number::robots]:
                    if failed.is_set():
                        break
                    client.reset()
                    played.append(_episode(mode, client, seed))
                    with lock:
                        result.episodes.append(played[-1])
                        progress(mode, len(result.episodes), len(seeds))
        except BaseException:
            failed.set()
            raise
        return played

    with ThreadPoolExecutor(robots) as side_by_side:
        list(side_by_side.map(robot, range(robots)))
    result.episodes.sort(key=lambda episode: episode.seed)
    result.seconds = time.perf_counter() - started_s
    return result


def _episode(mode: Mode, client: Policy, seed: int) -> Episode:
    match mode:
        case "default":
            return lockstep(client, seed)
        case "flat":
            return lockstep(client, seed, until_goals_hold=True)
        case "action_only":
            return lockstep(client, seed, fields={"mode": "action_only"}, until_goals_hold=True)
        case "scripted":
            return lockstep(client, seed, prompt=_scripted, fields={"mode": "action_only"}, until_goals_hold=True)
        case "every_request" | "async":
            return real_time(client, seed, rate_hz=RATE_HZ)
        case "every_request+100" | "async+100":
            return real_time(client, seed, rate_hz=RATE_HZ, delay_s=ADDED_S)


def _scripted(info: Mapping[str, Any]) -> str:
    return DEFAULT_ACTION_PROMPT_TEMPLATE.format(task=info["instruction"], subtask=info["subtask"])


def _random_states(url: str, count: int, progress: Progress) -> dict[str, Any]:
    """The planner on held-out states, over its own endpoint: how many of its answers are the rule's, word for word."""
    samples = for_planner(held_out_rng(FIRST_SEED), count)
    right: dict[str, list[bool]] = {"pick": [], "put": [], "done": []}
    times: list[float] = []
    with closing(connect(url)) as client:
        for row, (text, subtask) in enumerate(zip(samples.instructions, samples.subtasks, strict=True)):
            picture = render(samples.scenes.take(np.array([row])))[0]
            started_s = time.perf_counter()
            said = client.infer({"base_0_rgb": picture, "prompt": text})["subtask"]["text"].strip()
            times.append((time.perf_counter() - started_s) * 1e3)
            expected = SUBTASKS[subtask]
            right[expected.split()[0].replace("all", "done")].append(said == expected)
            if (row + 1) % 50 == 0 or row + 1 == count:
                progress("planner", row + 1, count)
    every = [answer for answers in right.values() for answer in answers]
    return {
        "right": share(sum(every), len(every)),
        "by_answer": {name: share(sum(answers), len(answers)) for name, answers in right.items()},
        "ms_p50": _median(times),
    }


def share(hits: int, count: int) -> dict[str, Any]:
    """A share with its 95 % interval after Wilson (1927): honest near 0 and 1, where the usual one is not."""
    if not count:
        return {"hits": 0, "count": 0, "share": None, "low": None, "high": None}
    z, p = 1.959964, hits / count
    middle, spread = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    low, high = ((middle + sign * spread) / (1 + z * z / count) for sign in (-1, 1))
    return {"hits": hits, "count": count, "share": p, "low": max(0.0, low), "high": min(1.0, high)}


def as_table(report: Mapping[str, Any]) -> RichTable:
    """The report as people read it: success in percent with its 95 % interval, overall and by family."""
    table = RichTable("mode", "success", *FAMILIES, "planner right", "calls", "steps", "ms p50")
    for mode, row in report["modes"].items():
        families = [_percent(row["families"][family]) for family in FAMILIES]
        table.add_row(
            mode,
            _with_interval(row["success"]),
            *families,
            _with_interval(row["planner_right"]),
            f"{row['calls']:.1f}",
            f"{row['steps']:.0f}",
            f"{row['ms_p50']:.0f}",
        )
    if (planner := report.get("planner")) is not None:
        table.caption = (
            f"planner on {planner['right']['count']} random states: {_with_interval(planner['right'])} right, {planner['ms_p50']:.1f} ms p50"
        )
    return table


def _with_interval(found: Mapping[str, Any]) -> str:
    if found["share"] is None:
        return "–"
    return f"{100 * found['share']:.1f} % ({100 * found['low']:.1f}–{100 * found['high']:.1f})"


def _percent(found: Mapping[str, Any]) -> str:
    return "–" if found["share"] is None else f"{100 * found['share']:.1f} %"


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values) or [math.nan]))


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values) or [math.nan]))
