"""The four stages of the demo's training, each a function and each its own process (:mod:`demo.training.run`):

======= =============================== ======= =============================
stage   learns                          in      from
======= =============================== ======= =============================
vision  to see (to read facts off)      PyTorch first values
planner the next subtask                JAX     the vision stage's checkpoint
action  the chunk of a subtask          PyTorch the vision stage's checkpoint
flat    the chunk of a long instruction PyTorch the vision stage's checkpoint
======= =============================== ======= =============================

Every stage reads and writes checkpoints in the formats that are served, through the ordinary readers. The policies leave the tower as the
vision stage made it, and so does the planner in its first round: it is what makes the rest short. The policies' language model learns what
words mean in the picture before anything moves, which shortens the rest once more. The flat policy is the baseline (docs/demo.md): the same
model, the same start, the same number of steps and the same losses as the action policy, but told only the long instruction.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from ml_dtypes import bfloat16

from demo.sampling import held_out_rng, training_rng
from demo.training.batches import PLACES, QUERIES, ActionRows, Batches
from demo.training.start import DIMS, SCALE, first_leaves
from demo.training.tokenizer import train_tokenizer
from pi0.tokenizer import TOKENIZER_FILE, PromptTokenizer

if TYPE_CHECKING:
    from action.model import PrefixContext

Stage = Literal["vision", "planner", "action", "flat"]
STAGES: Final[tuple[Stage, ...]] = ("vision", "planner", "action", "flat")

STEPS: Final[dict[Stage, int]] = {"vision": 1500, "planner": 6200, "action": 2200, "flat": 2200}
"""Optimiser steps of a full training; all but the first stage's are in rounds (``ROUNDS``)."""
BATCH: Final[dict[Stage, int]] = {"vision": 96, "planner": 32, "action": 32, "flat": 32}
THREADS: Final[dict[Stage, int]] = {"vision": 2, "planner": 1, "action": 1, "flat": 1}
"""Fixed, as sums depend on them."""
RATE: Final = 2e-3
ROUNDS: Final[dict[Stage, tuple[float, ...]]] = {"planner": (0.45, 0.33), "action": (0.12,), "flat": (0.12,)}
"""Which share of a stage's steps its first rounds are; the last one is the rest. The planner's vision tower learns in all but the first, too, at half
the rate and from fresh draws; in the policies' first round only their language model learns, what the words mean in the picture."""
GROUNDING_RATE: Final = 3e-3
DRAWS: Final = 4
"""Noises and times for each observation of the flow-matching loss."""
PROBE_WEIGHT: Final = 0.5
GROUNDING_WEIGHT: Final = 0.3
"""Of what is read off the prompt's words, beside the loss of the planner's answers and of the policies' actions."""

_HELD_OUT_ROWS = 256
_HELD_OUT_BATCHES = 8
_REPORT_EVERY = 25
_MEASURE_EVERY = 400

Report = Callable[[int, dict[str, float]], None]
"""(steps done, metrics)"""


def vision(directory: Path, *, steps: int, seed: int, report: Report) -> dict[str, float]:
    """Writes ``directory/vision``: a whole π0.5 checkpoint, in both formats, whose tower can see, and the tokenizer."""
    import torch

    from action.checkpoint import load_model
    from action.export import save_model, tower_leaves
    from action.training import Readout, Trainer, grow_patches, readout_loss, shrink_patches
    from planner.export import write_params

    target = directory / "vision"
    target.mkdir(parents=True)
    (target / TOKENIZER_FILE).write_bytes(train_tokenizer())
    tokenizer = PromptTokenizer(target / TOKENIZER_FILE)
    numbers = {tokenizer.encode(f" {number}")[0]: number for number in range(256)}
    leaves = first_leaves(seed, numbers)
    write_params(directory / "first" / "params", leaves)
    model = load_model(directory / "first", dtype=torch.float32, device=torch.device("cpu"))
    shrink_patches(model, SCALE)
    tower = model.vision.requires_grad_(True)
    readout = Readout(DIMS.backbone.vlm.width, QUERIES, PLACES, generator=torch.Generator().manual_seed(seed))
    trainer = Trainer([tower, readout], steps, rate=RATE)
    batches = Batches(tokenizer, training_rng(seed))

    def loss(batches: Batches, rows: int) -> Any:
        images, points, classes = batches.readout(rows)
        tokens = tower(torch.from_numpy(images))
        return readout_loss(tokens, readout, torch.from_numpy(points), torch.from_numpy(classes).long())

    for step in range(1, steps + 1):
        value, metrics = loss(batches, BATCH["vision"])
        trainer.step(value)
        report(step, metrics)
    trainer.take_averages()
    tower.requires_grad_(False)
    with torch.inference_mode():
        held_out = Batches(tokenizer, held_out_rng(seed))
        final = [loss(held_out, _HELD_OUT_ROWS)[1] for _ in range(_held_out_batches(steps))]
    grow_patches(model, SCALE)
    # What nothing read, and so nothing trained, is in the first leaves alone.
    write_params(target / "params", leaves | tower_leaves(model))
    save_model(model, target)
    return _mean(final)


def planner(directory: Path, *, steps: int, seed: int, report: Report) -> dict[str, float]:
    """Writes ``directory/planner``, from ``directory/vision``."""
    rounds = _rounds("planner", steps)
    source, metrics = directory / "vision", {}
    for number, count in enumerate(rounds):
        last = number == len(rounds) - 1
        target = directory / ("planner" if last else f"planner-round-{number + 1}")
        later = partial(_later, report, sum(rounds[:number]))
        rate = RATE if number == 0 else RATE / 2
        metrics = _planner_round(source, target, steps=count, rate=rate, seed=seed + number, report=later, tower=number > 0)
        source = target
    return metrics


def _later(report: Report, before: int, step: int, metrics: dict[str, float]) -> None:
    report(before + step, metrics)


def _rounds(stage: Stage, steps: int) -> list[int]:
    first = [max(1, round(share * steps)) for share in ROUNDS[stage]]
    return [*first, max(1, steps - sum(first))]


def _planner_round(source: Path, target: Path, *, steps: int, rate: float, seed: int, report: Report, tower: bool = False) -> dict[str, float]:
    """Trains the planner in ``source`` and writes it to ``target``."""
    from planner.export import write_params
    from planner.training import SubtaskBatch, SubtaskTrainer

    target.mkdir()
    (target / TOKENIZER_FILE).write_bytes((source / TOKENIZER_FILE).read_bytes())
    tokenizer = PromptTokenizer(target / TOKENIZER_FILE)
    options = {"scale": SCALE, "classes": PLACES, "probe_weight": PROBE_WEIGHT, "seed": seed, "train_tower": tower}
    trainer = SubtaskTrainer(source, tokenizer.vocab_size, steps, rate=rate, **options)

    def drawn(batches: Batches, rows: int) -> SubtaskBatch:
        return SubtaskBatch(**vars(batches.planner(rows)))

    batches, held_out = Batches(tokenizer, training_rng(seed)), Batches(tokenizer, held_out_rng(seed))
    for step in range(1, steps + 1):
        metrics = trainer.step(drawn(batches, BATCH["planner"]))
        if step % _MEASURE_EVERY == 0:
            metrics["held_out"] = trainer.measure(drawn(held_out, _HELD_OUT_ROWS))["right"]
        report(step, metrics)
    final = [trainer.measure(drawn(held_out, _HELD_OUT_ROWS)) for _ in range(_held_out_batches(steps))]
    write_params(target / "params", {name: leaf.astype(bfloat16) for name, leaf in trainer.leaves().items()})
    return _mean(final)


def _policy(
    stage: Stage, draw: Callable[[Batches, int, int], ActionRows], directory: Path, *, steps: int, seed: int, report: Report
) -> dict[str, float]:
    """Trains the policy in ``directory/vision``, with rows of ``draw`` (batches, rows, step), and writes it to ``directory/stage``."""
    import torch

    from action.checkpoint import load_model
    from action.export import save_model
    from action.training import Encoded, PromptFacts, PromptReadout, Trainer, encode, flow_loss, grow_patches, prompt_loss, shrink_patches

    torch.set_num_threads(1)
    source, target = directory / "vision", directory / stage
    target.mkdir()
    (target / TOKENIZER_FILE).write_bytes((source / TOKENIZER_FILE).read_bytes())
    tokenizer = PromptTokenizer(target / TOKENIZER_FILE)
    model = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    shrink_patches(model, SCALE)
    model.requires_grad_(True)
    model.vision.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    readout = PromptReadout(DIMS.backbone.vlm.width, PLACES, generator=generator)
    batches = Batches(tokenizer, training_rng(seed))

    def encoded(rows: ActionRows) -> Encoded:
        images, *prompt = map(torch.from_numpy, (rows.images[:, None], rows.tokens, rows.token_mask))
        return encode(model, images, *prompt, horizon=rows.actions.shape[1])

    def grounding_loss(rows: ActionRows, words: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        facts = (rows.points, rows.places, rows.token_mask.sum(axis=1) - 1, rows.target, rows.finished.astype(np.int64))
        return prompt_loss(words, readout, PromptFacts(*map(torch.from_numpy, facts)))

    def moving_loss(rows: ActionRows, context: PrefixContext, generator: torch.Generator) -> torch.Tensor:
        return flow_loss(model, context, torch.from_numpy(rows.actions), draws=DRAWS, generator=generator)

    first, last = _rounds(stage, steps)
    trainer = Trainer([model.embedding, model.vlm_blocks, model.vlm_last.attention_norm, readout], first, rate=GROUNDING_RATE)
    for step in range(1, first + 1):
        rows = draw(batches, BATCH[stage], step)
        loss, metrics = grounding_loss(rows, encoded(rows).words)
        trainer.step(loss)
        report(step, metrics)
    trainer.take_averages()
    trainer = Trainer([model, readout], last, rate=RATE)
    for step in range(first + 1, first + last + 1):
        rows = draw(batches, BATCH[stage], step)
        observed = encoded(rows)
        loss = moving_loss(rows, observed.context, generator)
        aside, metrics = grounding_loss(rows, observed.words)
        trainer.step(loss + GROUNDING_WEIGHT * aside)
        report(step, {"loss": loss.item(), **metrics})
    trainer.take_averages()
    model.requires_grad_(False)
    held_out, fixed = Batches(tokenizer, held_out_rng(seed)), torch.Generator().manual_seed(seed + 1)
    final = []
    with torch.inference_mode():
        for step in range(_held_out_batches(steps)):
            rows = draw(held_out, _HELD_OUT_ROWS, step)
            observed = encoded(rows)
            final.append({"loss": moving_loss(rows, observed.context, fixed).item(), **grounding_loss(rows, observed.words)[1]})
    grow_patches(model, SCALE)
    save_model(model, target, dtype=torch.bfloat16)
    return _mean(final)


def _held_out_batches(steps: int) -> int:
    """How many batches the last measurement is of: few where there was little to learn."""
    return min(_HELD_OUT_BATCHES, max(2, steps // 100))


def _mean(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([metrics[name] for metrics in measured])) for name in measured[0]}


def action(directory: Path, *, steps: int, seed: int, report: Report) -> dict[str, float]:
    """Writes ``directory/action``, from ``directory/vision``: bare subtasks, and twice as often the server's default prompt form."""

    def drawn(batches: Batches, rows: int, step: int) -> ActionRows:
        return batches.action(rows, with_task=step % 3 != 0)

    return _policy("action", drawn, directory, steps=steps, seed=seed, report=report)


def flat(directory: Path, *, steps: int, seed: int, report: Report) -> dict[str, float]:
    """Writes ``directory/flat``, from ``directory/vision``: long instructions, the chunk of what is due."""
    return _policy("flat", lambda batches, rows, step: batches.flat(rows), directory, steps=steps, seed=seed, report=report)


def main() -> None:
    """``python -m demo.training.stages STAGE DIRECTORY STEPS SEED``: one stage; progress as JSON lines on the standard output."""
    stage, directory, steps, seed = sys.argv[1:]
    _keep_to_one_core(stage)
    started_s = time.perf_counter()

    def report(step: int, metrics: dict[str, float]) -> None:
        if step % _REPORT_EVERY == 0 or step == int(steps):
            _print({"step": step, **metrics})

    run = {"vision": vision, "planner": planner, "action": action, "flat": flat}[stage]
    result = run(Path(directory), steps=int(steps), seed=int(seed), report=report)
    used_s = round(time.process_time(), 1)
    _print({"done": stage, "steps": int(steps), "seconds": round(time.perf_counter() - started_s, 1), "cpu_seconds": used_s, **result})


def _keep_to_one_core(stage: str) -> None:
    """All but the first stage run side by side, and threads that wait for a core of the other's spin."""
    if stage != "vision" and hasattr(os, "sched_setaffinity"):  # Linux
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[0] if stage == "planner" else cores[-1]})


def _print(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
