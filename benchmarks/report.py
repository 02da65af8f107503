"""What every benchmark prints: the machine, its rows, and at the end the goals; ``--quick`` and ``--json FILE`` for all."""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Goal:
    """A promise and what this run made of it."""

    name: str
    value: float
    goal: str
    reached: bool


def arguments(description: str | None) -> argparse.Namespace:
    """The command line of a benchmark: ``quick`` (bool) and ``json`` (Path or None)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most 45 s, noisier")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    return parser.parse_args()


def machine() -> str:
    """This machine in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}"


def finish(goals: list[Goal], figures: dict[str, Any], json_file: Path | None) -> None:
    """Print the goals table and write the JSON file."""
    print("\ngoals")
    width = max(len(goal.name) for goal in goals)
    for goal in goals:
        print(f"  {goal.name:{width}}  {goal.value:9.3f}  goal {goal.goal:9}  {'reached' if goal.reached else 'NOT reached'}")
    if json_file:
        json_file.write_text(json.dumps({"machine": machine(), "figures": figures, "goals": [asdict(goal) for goal in goals]}, indent=2) + "\n")
