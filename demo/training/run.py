"""``tandem train-demo``: the demo's models from nothing, the four stages (:mod:`demo.training.stages`) in processes of their own."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from demo.training.stages import BATCH, STAGES, STEPS, THREADS, Stage
from pi0.errors import TandemError

RECORD: Final = "training.json"
_SHIPPED: Final[tuple[Stage, ...]] = ("planner", "action", "flat")
_HALVES: Final[tuple[tuple[Stage, ...], ...]] = (("planner",), ("action", "flat"))
"""What runs side by side after the vision stage."""
_NORM_STATS: Final = {"mean": [0.0] * 3, "std": [1.0] * 3, "q01": [-1.0] * 3, "q99": [1.0] * 3}
"""Under which the table's units, [-1, 1] already, stay as they are."""


class TrainingError(TandemError):
    """The demo could not be trained."""


def train_demo(output: Path, *, seed: int, effort: float, console: Console) -> dict[str, Any]:
    """Trains everything and writes ``output``: ``planner/``, ``action/`` and ``flat/``, each a checkpoint, and ``training.json``, the record.

    Vision first; then the planner beside the action policy and, after that, the flat baseline. Everything is written beside ``output`` and
    renamed at the end, so that nothing incomplete has its name.

    Args:
        seed: of first values and draws. On one kind of machine and with one set of versions, a seed gives the same models.
        effort: the share of the full number of steps.

    Returns:
        the record.

    Raises:
        TrainingError: ``output`` exists, cannot be written, or a stage failed.
    """
    if output.exists():
        raise TrainingError(f"{output} exists; nothing is trained over it. Choose another with --output, or move it away")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{output.name}.partial-", dir=output.parent))
    except OSError as error:
        raise TrainingError(f"cannot write {output}: {error.strerror}; choose another with --output") from error
    try:
        record = _train(scratch, seed=seed, effort=effort, console=console)
        scratch.chmod(0o755)
        scratch.rename(output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # there only if something failed, which the error tells
    return record


def _train(scratch: Path, *, seed: int, effort: float, console: Console) -> dict[str, Any]:
    started_s = time.perf_counter()
    results: dict[str, Any] = {}
    with _display(console) as display, ThreadPoolExecutor(2) as side_by_side:
        runs = {stage: _Run(stage, scratch, max(1, round(STEPS[stage] * effort)), seed, display) for stage in STAGES}
        try:
            results |= _all([runs["vision"]])
            halves = [side_by_side.submit(_all, [runs[stage] for stage in half]) for half in _HALVES]
            wait(halves, return_when=FIRST_EXCEPTION)
            for half in halves:
                if half.done():
                    results |= half.result()
        except BaseException:
            for run in runs.values():
                run.stop()
            raise
    for stage in ("action", "flat"):
        _write_norm_stats(scratch / stage)
    record = {
        "command": f"python main.py train-demo --seed {seed}" + (f" --effort {effort:g}" if effort != 1 else ""),
        "seed": seed,
        "minutes": round((time.perf_counter() - started_s) / 60, 1),
        "stages": results,
        "batch": BATCH,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("jax", "optax", "torch", "numpy", "sentencepiece")},
    }
    (scratch / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    for entry in scratch.iterdir():
        if entry.is_dir() and entry.name not in _SHIPPED:
            shutil.rmtree(entry)
        elif entry.suffix == ".log":
            entry.unlink()
    return record


class _Run:
    """One stage as a process."""

    def __init__(self, stage: Stage, directory: Path, steps: int, seed: int, display: Progress | None) -> None:
        self.stage = stage
        self._command = [sys.executable, "-m", "demo.training.stages", stage, str(directory), str(steps), str(seed)]
        self._log = directory / f"{stage}.log"
        self._display = display
        self._task = None if display is None else display.add_task(stage, total=steps, metrics="", start=False)
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def __call__(self) -> dict[str, Any]:
        """Runs to its end; the last line's figures."""
        if self._display is not None and self._task is not None:
            self._display.start_task(self._task)
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS[self.stage]), "JAX_PLATFORMS": "cpu"}
        if self.stage == "planner":
            # XLA takes fresh memory for every step, a page fault for each 4 KiB of it: with huge pages a step takes a third less.
            environment["GLIBC_TUNABLES"] = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), "glibc.malloc.hugetlb=1")))
        root = Path(__file__).resolve().parents[2]
        last: dict[str, Any] = {}
        with (
            self._log.open("w") as log,
            subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=root) as self._process,
        ):
            if self._stopped:
                self._process.terminate()
            assert self._process.stdout is not None
            for line in self._process.stdout:
                last = json.loads(line)
                self._show(last)
        if self._process.returncode or "done" not in last:
            tail = self._log.read_text().strip().splitlines()[-3:]
            raise TrainingError(f"stage {self.stage} ended with {self._process.returncode}: {' | '.join(tail) or 'it says nothing'}")
        return {key: value for key, value in last.items() if key != "done"}

    def stop(self) -> None:
        """Ends it, or keeps it from beginning."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def _show(self, line: dict[str, Any]) -> None:
        if self._display is not None and self._task is not None:
            metrics = "  ".join(f"{name} {value:.3g}" for name, value in line.items() if name in ("loss", "rms", "target", "right", "held_out"))
            done = {"completed": line["step"]} if "step" in line else {}
            self._display.update(self._task, metrics=metrics, **done)


def _all(runs: Sequence[_Run]) -> dict[str, Any]:
    return {run.stage: run() for run in runs}


@contextmanager
def _display(console: Console) -> Iterator[Progress | None]:
    """A bar per stage; on what is no terminal, nothing."""
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.completed:>5.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}", style="dim"),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def _write_norm_stats(checkpoint_dir: Path) -> None:
    path = checkpoint_dir / "assets" / "table" / "norm_stats.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"norm_stats": {"state": _NORM_STATS, "actions": _NORM_STATS}}, indent=2) + "\n")
