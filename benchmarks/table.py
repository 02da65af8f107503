"""The demo's simulated table: what a picture, a training sample and an episode cost, and whether the scripted expert always succeeds.

    python -m benchmarks.table [--quick] [--json FILE]

Pictures and samples are made in one process on one thread. Each episode is one seed of the Gymnasium environment, every step of it with its
picture; the expert does what the environment's own subtask says, a chunk at a time, until that is "all done" or the calls run out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import gymnasium
import numpy as np

from benchmarks.report import Goal, arguments, finish, machine
from demo.expert import plan
from demo.instructions import ALL_DONE, SUBTASKS
from demo.render import render
from demo.sampling import for_action, for_planner, training_rng
from demo.table import ENV_ID, MAX_CALLS, TableEnv

BATCH, SMALL, LARGE = 128, 56, 224
SAMPLES = 5000


def median_s(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one that does not count."""
    call()
    times_s = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - started_s)
    return float(np.median(times_s))


def episode(env: gymnasium.Env[dict[str, object], object], seed: int) -> tuple[bool, int, int]:
    """(success, calls, steps) of the expert on one seed."""
    table = cast(TableEnv, env.unwrapped)
    _, info = env.reset(seed=seed)
    steps = 0
    for call in range(MAX_CALLS):
        if info["subtask"] == ALL_DONE:
            return info["success"], call, steps
        for action in plan(table.scenes, np.array([SUBTASKS.index(info["subtask"])]))[0]:
            _, _, _, _, info = env.step(action)
            steps += 1
    return info["success"], MAX_CALLS, steps


def main() -> None:
    args = arguments(__doc__)
    repeats, episodes = (10, 50) if args.quick else (100, 1000)
    print(machine())

    rng = training_rng(0)
    batch = for_planner(rng, BATCH).scenes
    one = batch.take(np.arange(1))
    figures: dict[str, float] = {
        f"{SMALL} px frame in batches of {BATCH}, ms": median_s(lambda: render(batch, SMALL), repeats) / BATCH * 1e3,
        f"{LARGE} px frame in batches of {BATCH}, ms": median_s(lambda: render(batch, LARGE), max(3, repeats // 10)) / BATCH * 1e3,
        f"{LARGE} px frame alone, ms": median_s(lambda: render(one, LARGE), repeats) * 1e3,
        "planner samples/s": SAMPLES / median_s(lambda: for_planner(rng, SAMPLES), repeats // 5),
        "action samples/s": SAMPLES / median_s(lambda: for_action(rng, SAMPLES), repeats // 5),
    }
    env = gymnasium.make(ENV_ID)
    started_s = time.perf_counter()
    runs = [episode(env, seed) for seed in range(episodes)]
    steps = sum(run[2] for run in runs)
    successes = sum(run[0] for run in runs)
    figures |= {
        "ms per step of an episode": (time.perf_counter() - started_s) / steps * 1e3,
        "episodes": episodes,
        "successes": successes,
        "mean calls": float(np.mean([run[1] for run in runs])),
        "most calls": max(run[1] for run in runs),
        "mean steps": steps / episodes,
    }
    for name, value in figures.items():
        print(f"  {name:36} {value:12.3f}")
    small, alone = figures[f"{SMALL} px frame in batches of {BATCH}, ms"], figures[f"{LARGE} px frame alone, ms"]
    slowest = min(figures["planner samples/s"], figures["action samples/s"])
    goals = [
        Goal(f"{SMALL} px frame, ms", small, "<= 0.09", small <= 0.09),
        Goal(f"{LARGE} px frame, ms", alone, "<= 2", alone <= 2),
        Goal("samples/s", slowest, ">= 5000", slowest >= 5000),
        Goal("expert's successes", successes, f"{episodes}", successes == episodes),
    ]
    finish(goals, figures, args.json)


if __name__ == "__main__":
    main()
