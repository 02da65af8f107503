"""Guesses of what the planner is about to say, and the trees that the decoder checks them as. Host side, no jax.

A guess costs next to nothing when it is wrong and saves every decode step when it is right (:mod:`planner.decoder`), and a robot's subtask mostly
stays what it was, or becomes what followed it the last time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pi0.tokenizer import EOS_ID

NO_TOKEN: Final = -1
"""What an unused node of a tree holds: no choice of the model is it."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class TokenTree:
    """Sequences of tokens with their common beginnings written once, as N nodes, each behind its parent.

    Attributes:
        tokens: ``[N]`` int32; ``NO_TOKEN`` in unused nodes, which are the last ones.
        parents: ``[N]`` int32; -1 is the end of the prompt.
        sees: ``[N, N]`` bool, which nodes each node attends to: its ancestors and itself.
    """

    tokens: NDArray[np.int32]
    parents: NDArray[np.int32]
    sees: NDArray[np.bool_]


def token_tree(sequences: Iterable[Sequence[int]], nodes: int) -> TokenTree:
    """The tree of as many ``sequences``, first ones first, as ``nodes`` hold; the sequence that no longer fits is cut, the rest left out."""
    tokens = np.full(nodes, NO_TOKEN, np.int32)
    parents = np.full(nodes, -1, np.int32)
    sees = np.eye(nodes, dtype=np.bool_)
    children: dict[tuple[int, int], int] = {}
    for sequence in sequences:
        parent = -1
        for token in sequence:
            node = children.get((parent, token))
            if node is None:
                if len(children) == nodes:
                    return TokenTree(tokens, parents, sees)
                node = children[parent, token] = len(children)
                tokens[node], parents[node] = token, parent
                if parent >= 0:
                    sees[node] |= sees[parent]
            parent = node
    return TokenTree(tokens, parents, sees)


class DraftTable:
    """What was said about each task lately, and what followed what. Bounded; for one thread at a time.

    Args:
        tasks: how many tasks are remembered, the latest ones.
        answers: how many different answers of each task are.
    """

    def __init__(self, *, tasks: int = 256, answers: int = 16) -> None:
        self._tasks, self._answers = tasks, answers
        self._said: OrderedDict[str, OrderedDict[Ids, Ids | None]] = OrderedDict()
        """Per task, from the longest ago to the latest: each answer, and what followed it the last time."""

    def suggest(self, task: str, previous: Ids | None, count: int) -> list[Ids]:
        """At most ``count`` guesses, the likeliest first: what was said last, what followed it before, and the other answers by how late they were.

        Args:
            previous: what was said last to the one who asks; None: not known, so the latest answer of all counts as it.
        """
        said = self._said.get(task, OrderedDict())
        if previous is None:
            previous = next(reversed(said), None)
        followed = said.get(previous) if previous is not None else None
        ordered = dict.fromkeys(guess for guess in (previous, followed, *reversed(said)) if guess is not None)
        return list(ordered)[:count]

    def learn(self, task: str, previous: Ids | None, said: Ids) -> None:
        """``said`` was the answer, to someone who had been told ``previous`` before."""
        answers = self._said.setdefault(task, OrderedDict())
        self._said.move_to_end(task)
        if previous is None:
            previous = next(reversed(answers), None)
        if previous in answers and previous != said:
            answers[previous] = said
        answers.setdefault(said, None)
        answers.move_to_end(said)
        while len(answers) > self._answers:
            answers.popitem(last=False)
        while len(self._said) > self._tasks:
            self._said.popitem(last=False)


def without_end(ids: Ids) -> Ids:
    """An answer as a guess: that the text ends is the model's choice at the last token, not a token to check."""
    return ids[:-1] if ids and ids[-1] == EOS_ID else ids
