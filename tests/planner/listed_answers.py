"""Answers from closed lists against brute force: ``python -m tests.planner.listed_answers LISTS [SEED]``.

Random lists (common beginnings, one entry the beginning of another, doubles) over a few letters, and random log-probabilities after every text that
can be a beginning. Brute force knows no trees: it looks up each beginning. CI runs a short form (``test_closed_list.py``).
"""

from __future__ import annotations

import math
import sys
import time

import numpy as np

from pi0.tokenizer import EOS_ID
from planner.closed_list import ClosedList, closed_list, score, walk

LETTERS = "abcd"
ALLOWED = np.array([EOS_ID, *map(ord, LETTERS)], np.int32)

Ids = tuple[int, ...]


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def random_list(rng: np.random.Generator) -> list[str]:
    """Between one and a dozen entries."""
    count = int(rng.integers(1, 13))
    texts = ["".join(rng.choice(list(LETTERS), int(rng.integers(1, 6)))) for _ in range(count)]
    if count > 1 and rng.random() < 0.5:
        texts[1] = texts[0][: max(1, len(texts[0]) // 2)]
    if count > 2 and rng.random() < 0.3:
        texts[2] = texts[0]
    return texts


class Model:
    """Random log-probabilities of the next token after any beginning, drawn when they are first asked for; some of them alike."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._after: dict[Ids, dict[int, float]] = {}

    def after(self, beginning: Ids) -> dict[int, float]:
        """Of every allowed token."""
        if beginning not in self._after:
            logits = self._rng.normal(0, 2, len(ALLOWED)).round(1)  # rounded: ties are to be found
            values = logits - np.log(np.exp(logits).sum())
            self._after[beginning] = dict(zip(ALLOWED.tolist(), values.tolist(), strict=True))
        return self._after[beginning]

    def read(self, entries: ClosedList) -> tuple[np.ndarray, np.ndarray]:
        """What the tree's pass tells: of each node after its parent, and of the end of text."""
        tree = entries.tree
        spelled: list[Ids] = []
        for node, token in enumerate(tree.tokens):
            parent = int(tree.parents[node])
            spelled.append((*(spelled[parent] if parent >= 0 else ()), int(token)))
        own = np.array([self.after(text[:-1])[text[-1]] for text in spelled])
        end = np.array([self.after(text)[EOS_ID] for text in [(), *spelled]])
        return own, end


def by_brute_force_score(model: Model, texts: list[str]) -> dict[str, float]:
    """The log-probability of every entry."""
    table = {}
    for text in dict.fromkeys(texts):
        ids = (*encode(text), EOS_ID)
        table[text] = math.fsum(model.after(ids[:position])[token] for position, token in enumerate(ids))
    return table


def by_brute_force_walk(model: Model, texts: list[str]) -> tuple[str, float, float]:
    """(text, log-probability, margin) of greedy decoding that may only say what some entry goes on with."""
    sayable = {(*encode(text), EOS_ID) for text in texts}
    said: Ids = ()
    logprob, margin = 0.0, math.inf
    while not said or said[-1] != EOS_ID:
        following = sorted({ids[len(said)] for ids in sayable if ids[: len(said)] == said and len(ids) > len(said)})
        after = model.after(said)
        best = max(following, key=lambda token: (after[token], -token))
        margin = min([margin, *(after[best] - after[token] for token in following if token != best)])
        logprob += after[best]
        said = (*said, best)
    return "".join(map(chr, said[:-1])), logprob, margin


def check(lists: int, seed: int) -> int:
    """Raises AssertionError at the first difference; how many lists were checked."""
    rng = np.random.default_rng(seed)
    for _ in range(lists):
        texts, model = random_list(rng), Model(rng)
        entries = closed_list(texts, encode, ALLOWED)
        assert list(entries.texts) == list(dict.fromkeys(texts))
        own, end = model.read(entries)
        scored, walked = score(entries, own, end), walk(entries, own, end)

        table = by_brute_force_score(model, texts)
        assert scored.table is not None
        np.testing.assert_allclose(scored.table, list(table.values()), rtol=0, atol=1e-4)
        assert abs(max(table.values()) - table[entries.texts[scored.entry]]) < 1e-9
        text, logprob, margin = by_brute_force_walk(model, texts)
        assert entries.texts[walked.entry] == text
        np.testing.assert_allclose([walked.logprob, walked.margin], [logprob, margin], atol=1e-4)
    return lists


def main() -> None:
    lists, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    started = time.perf_counter()
    checked = check(lists, seed)
    sys.stdout.write(
        f"{checked} random lists in {time.perf_counter() - started:.0f} s: trie and score as by brute force, no answer outside its list\n"
    )


if __name__ == "__main__":
    main()
