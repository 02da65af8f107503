"""The planner at π0.5's real dimensions: random bfloat16 weights written as a checkpoint, restored from it as a server would, and asked once.

    python -m benchmarks.planner_full_size [--json FILE]

Three cameras, a prompt of 24 tokens, 5 tokens of answer, from a head of two thirds of the vocabulary, about what printable ASCII leaves of the real
one; then the same again with the answer as its own draft. Needs 7 GB of disk in the temporary folder and some minutes; writing and answering are
processes of their own, so that the memory is the answering one's alone. `--quick` is a hundredth of the size, to try the script itself.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

import planner  # noqa: F401  (sets what jax must find in the environment)

# isort: split
import jax

from benchmarks.planner_decode import CAMERAS, DRAFTS, MEDIUM, PI05, TYPICAL_TOKENS, RandomParams
from benchmarks.report import Goal, arguments, finish, machine
from pi0.param_tree import IMAGE_SIZE, BackboneDims
from pi0.tokenizer import TokenizedPrompt
from planner.decoder import Decoder
from planner.drafts import NODES_PER_DRAFT
from planner.export import write_params
from planner.generator import pack
from planner.restore import parameter_bytes, restore

GIB = 1 << 30
MEMORY_GIB = 24
PROMPT_TOKENS = 24


def write(directory: Path, dims: BackboneDims) -> None:
    source = RandomParams(dims)
    write_params(directory / "params", {name: source.read(name, np.dtype(bfloat16)) for name in source})


def answer(directory: Path, dims: BackboneDims) -> dict[str, Any]:
    """What it took to restore the checkpoint, to compile, and to answer."""
    began = time.perf_counter()
    allowed = np.arange(3, dims.vocab_size * 2 // 3, dtype=np.int32)
    params, _ = restore(directory, allowed, np.dtype(bfloat16), tokens=dims.vocab_size)
    restored = time.perf_counter()
    decoder = Decoder(params, dims, guesses=DRAFTS * NODES_PER_DRAFT)
    rng = np.random.default_rng(0)
    images = [rng.uniform(-1, 1, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32) for _ in range(CAMERAS)]
    ids = rng.integers(3, dims.vocab_size, PROMPT_TOKENS).astype(np.int32)
    prefix = pack([TokenizedPrompt(ids, PROMPT_TOKENS, False)], [images])
    batch, cameras, slots = *prefix.image_mask.shape, prefix.tokens.shape[1]
    decoder.compile([(batch, cameras, slots)])
    compiled = time.perf_counter()
    first = decoder(prefix, TYPICAL_TOKENS)
    answered = time.perf_counter()
    said = first.tokens[0, : first.length[0]].tolist()
    again = decoder(prefix, TYPICAL_TOKENS, [decoder.tree([said], TYPICAL_TOKENS)])
    return {
        "weights_gib": parameter_bytes(params) / GIB,
        "restore_s": restored - began,
        "compile_s": compiled - restored,
        "answer_s": answered - compiled,
        "drafted_s": time.perf_counter() - answered,
        "tokens": said,
        "same_with_draft": again.tokens[0, : again.length[0]].tolist() == said,
        "drafted_decode_steps": int(again.decode_steps[0]),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }


def _child(step: str, directory: Path, quick: bool) -> str:
    command = [sys.executable, "-m", "benchmarks.planner_full_size", step, str(directory), *["--quick"] * quick]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in ("write", "answer"):
        step, directory, dims = sys.argv[1], Path(sys.argv[2]), MEDIUM if "--quick" in sys.argv else PI05
        if step == "write":
            write(directory, dims)
        else:
            print(json.dumps(answer(directory, dims)))
        return
    options = arguments(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        _child("write", Path(scratch), options.quick)
        figures = json.loads(_child("answer", Path(scratch), options.quick))
    print(f"{machine()}; jax {jax.__version__} on {jax.default_backend()}, bfloat16; {asdict(MEDIUM if options.quick else PI05)}")
    tokens = "the same" if figures["same_with_draft"] else "OTHER"
    print(
        f"{figures['weights_gib']:.2f} GiB of weights restored in {figures['restore_s']:.1f} s; compiled in {figures['compile_s']:.1f} s; "
        f"{len(figures['tokens'])} tokens in {figures['answer_s']:.1f} s, drafted {figures['drafted_s']:.1f} s "
        f"with {figures['drafted_decode_steps']} decode steps and {tokens} tokens; peak memory {figures['peak_gib']:.1f} GiB"
    )
    finish([Goal("peak memory, GiB", figures["peak_gib"], f"<= {MEMORY_GIB}", figures["peak_gib"] <= MEMORY_GIB)], figures, options.json)


if __name__ == "__main__":
    main()
