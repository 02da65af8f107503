"""Drafted decoding against plain decoding, on random models, prompts and drafts::

    python -m tests.planner.drafted_decoding CASES [SEED [float32 | bfloat16]]

Both are compiled programs of :mod:`planner.decoder`; what is compared is every token. In float32 none may differ. In bfloat16 two programs may round
differently, so answers may part where the two best logits are closer than ``BFLOAT16_BOUND``, and only there. CI runs short
forms (``test_decoder.py``).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from pi0.param_tree import BackboneDims, ExpertDims, VisionDims
from pi0.tokenizer import EOS_ID, TokenizedPrompt
from planner.decoder import Decoded, Decoder, Prefix, text_slots
from planner.generator import pack
from planner.restore import restore_from
from tests.planner.oracle import RandomParams

SIZES = {
    "two kv heads": BackboneDims(VisionDims(20, 2, 2, 14, 36, 56, 16), ExpertDims(44, 60), 211, 2, 6, 2, 10),
    "as many kv heads": BackboneDims(VisionDims(24, 1, 3, 8, 30, 56, 16), ExpertDims(40, 52), 97, 3, 4, 4, 8),
    "one kv head": BackboneDims(VisionDims(12, 1, 1, 6, 20, 56, 16), ExpertDims(18, 30), 300, 1, 2, 1, 16),
}
NODES = 16
LONGEST = 12
BFLOAT16_BOUND = 0.25
"""Distance of the two best logits, which are of the size of 10, below which bfloat16 may decide either way."""
KINDS = ("right", "none", "wrong", "partly right", "too long", "one off", "several", "with an end", "again")


@dataclass
class Tally:
    """What was found."""

    cases: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    different: list[tuple[str, str, float]] = field(default_factory=list)
    """(size, kind, gap) of each case whose tokens differ: how far the two best logits are apart where they first do"""
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    plain_steps: int = 0


def drafts(rng: np.random.Generator, answer: list[int], vocabulary: int) -> tuple[str, list[list[int]]]:
    """Drafts of one kind for a row whose plain answer is ``answer``, without the end of text."""
    kind = str(rng.choice(KINDS))
    noise = rng.integers(0, vocabulary, LONGEST).tolist()
    half = answer[: int(rng.integers(len(answer) + 1))]
    one_off = [*answer[:-1], int(rng.integers(vocabulary))] if answer else noise[:1]
    made = {
        "right": [answer],
        "none": [],
        "wrong": [noise],
        "partly right": [half + noise],
        "too long": [answer + noise],
        "one off": [one_off],
        "several": [half + noise[:3], answer, noise, one_off, half],
        "with an end": [[*half, EOS_ID, *noise]],
        "again": [answer, answer + answer, half],
    }[kind]
    if kind == "several":
        rng.shuffle(made)
    return kind, made


def prefixes(rng: np.random.Generator, dims: BackboneDims, rows: int) -> Prefix:
    """Random prompts, some of which leave too few slots for all guesses, with one to three random pictures; the third camera's slot is always there,
    so that two sizes of batch share a program."""
    lengths = rng.integers(1, text_slots(NODES)[0], rows)
    prompts = [TokenizedPrompt(np.array([2, *rng.integers(3, dims.vocab_size, length)], np.int32), length + 1, False) for length in lengths]
    cameras = [list(rng.uniform(-1, 1, (count, 224, 224, 3)).astype(np.float32)) for count in (3, *rng.integers(1, 4, rows - 1))]
    return pack(prompts, cameras)


def run(cases: int, seed: int, batches: tuple[int, ...], sizes: tuple[str, ...] = tuple(SIZES), dtype: str = "float32") -> Tally:
    """``cases`` rows, in turn over ``sizes`` and ``batches``; of each prefix, several limits and drafts are tried."""
    rng = np.random.default_rng(seed)
    tally = Tally()
    for size in sizes:
        dims = SIZES[size]
        params, _ = restore_from(RandomParams(dims, seed=seed), np.arange(dims.vocab_size, dtype=np.int32), jnp.dtype(dtype), where=size)
        # Every ninth token ends the text, so that answers do end.
        params = params.replace(head_ids=jnp.where(params.head_ids % 9 == 4, EOS_ID, params.head_ids))
        plain, drafted = Decoder(params, dims), Decoder(params, dims, guesses=NODES)
        target = tally.cases + cases // len(sizes)
        while tally.cases < target:
            for rows in batches:
                prefix = prefixes(rng, dims, rows)
                limit = int(rng.integers(1, LONGEST + 1))
                expected = plain(prefix, limit)
                for _ in range(4):
                    _compare(tally, rng, size, prefix, rows, limit, expected, drafted, dims.vocab_size)
    return tally


def _compare(
    tally: Tally, rng: np.random.Generator, size: str, prefix: Prefix, rows: int, limit: int, expected: Decoded, decoder: Decoder, vocabulary: int
) -> None:
    answers = [[token for token in expected.tokens[row, : expected.length[row]].tolist() if token != EOS_ID] for row in range(rows)]
    kinds, made = zip(*(drafts(rng, answer, vocabulary) for answer in answers), strict=True)
    trees = [decoder.tree(row, limit) for row in made]
    got = decoder(prefix, limit, trees)
    for row in range(rows):
        tally.cases += 1
        tally.kinds[kinds[row]] = tally.kinds.get(kinds[row], 0) + 1
        if got.tokens[row].tolist() != expected.tokens[row].tolist():
            tally.different.append((size, kinds[row], _gap(decoder, prefix, row, got.tokens[row], expected.tokens[row])))
            continue
        assert (got.length[row], got.decode_steps[row]) == (expected.length[row], expected.length[row] - 1 - got.accepted[row])
        if decoder.params.head.dtype == np.float32:
            np.testing.assert_allclose(got.logprob[row], expected.logprob[row], atol=2e-3)
            np.testing.assert_allclose(got.margin[row], expected.margin[row], atol=2e-3)
            if kinds[row] in ("right", "again") and got.drafted[row] == trees[row].used:
                assert got.decode_steps[row] == 0, "nothing was left to decode"
        tally.drafted += int(got.drafted[row])
        tally.accepted += int(got.accepted[row])
        tally.steps += int(got.decode_steps[row])
        tally.plain_steps += int(expected.decode_steps[row])
    assert got.loop_steps == max(got.decode_steps)


def _gap(decoder: Decoder, prefix: Prefix, row: int, got: NDArray[np.int32], expected: NDArray[np.int32]) -> float:
    """The distance of the two best logits behind what two different answers have in common."""
    own = slice(row, row + 1)
    same = expected[: int(np.argmax(got != expected))].tolist()
    with_room = np.pad(prefix.tokens[own], ((0, 0), (0, NODES)))
    choice, _ = decoder.read(Prefix(prefix.images[own], prefix.image_mask[own], with_room, prefix.lengths[own]), [decoder.tree([same], LONGEST + 1)])
    return float(choice.margin[0, len(same)])


def report(tally: Tally, seconds: float) -> str:
    """The findings in words."""
    lines = [f"{tally.cases} cases over {len(SIZES)} models in {seconds:.0f} s: {len(tally.different)} different"]
    lines += [f"  {size}, {kind}: the two best logits were {gap:.2g} apart" for size, kind, gap in tally.different]
    lines.append(f"kinds: {', '.join(f'{count} {kind}' for kind, count in sorted(tally.kinds.items()))}")
    lines.append(f"decode steps: {tally.steps}, plainly {tally.plain_steps}; {tally.accepted} of {tally.drafted} guessed tokens were right")
    return "\n".join(lines) + "\n"


def main() -> None:
    defaults = ("1000", "0", "float32")
    cases, seed, dtype = (*sys.argv[1:], *defaults[len(sys.argv) - 1 :])
    started = time.perf_counter()
    tally = run(int(cases), int(seed), batches=tuple(range(1, 9)), dtype=dtype)
    sys.stdout.write(f"{dtype}: {report(tally, time.perf_counter() - started)}")
    bound = 0.0 if dtype == "float32" else BFLOAT16_BOUND
    sys.exit(1 if any(gap >= bound for _, _, gap in tally.different) else 0)


if __name__ == "__main__":
    main()
