"""Guesses of what the planner is about to say, and the trees that the decoder checks them as. Host side, no jax.

A guess costs next to nothing when it is wrong and saves every decode step when it is right (:mod:`planner.decoder`), and a robot's subtask mostly
stays what it was, or becomes what followed it the last time.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pi0.tokenizer import EOS_ID

NO_TOKEN: Final = -1
"""What an unused node of a tree holds: no choice of the model is it."""

NODES_PER_DRAFT: Final = 8
"""Subtasks have three to seven tokens; beginnings that several have in common are there once."""

Ids = tuple[int, ...]

_BETWEEN_CLAUSES: Final = re.compile(r"[,.;:]|\b(?:and|then)\b", re.IGNORECASE)


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

    @property
    def used(self) -> int:
        """Nodes that hold a token."""
        return int((self.tokens != NO_TOKEN).sum())

    def first(self, nodes: int) -> TokenTree:
        """The same with its first ``nodes`` nodes only, if there are more."""
        return self if nodes >= len(self.tokens) else TokenTree(self.tokens[:nodes], self.parents[:nodes], self.sees[:nodes, :nodes])


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


def agreed(tree: TokenTree, said: Sequence[int]) -> list[int]:
    """The path of nodes that greedy decoding says itself: each is what it says where the one before ends. The end of text is none of them: what is
    behind it is never said.

    Args:
        said: ``[1 + N]``, what it says after the prompt and after each node.
    """
    path: list[int] = []
    expected = said[0]
    # A node comes after its parent, and no two of a parent's nodes are the same token.
    for node, (token, parent) in enumerate(zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True)):
        if token == expected != EOS_ID and parent == (path[-1] if path else -1):
            path.append(node)
            expected = said[node + 1]
    return path


@dataclass(slots=True)
class _Answer:
    ids: Ids
    followed_by: str | None = None


class DraftTable:
    """What was said about each task lately, and what followed what. Bounded; for one thread at a time.

    Args:
        tasks: how many tasks are remembered, those asked about last.
        answers: how many different answers to each of them are.
    """

    def __init__(self, *, tasks: int = 256, answers: int = 16) -> None:
        self._tasks, self._answers = tasks, answers
        self._said: OrderedDict[Hashable, OrderedDict[str, _Answer]] = OrderedDict()
        """Of each task its answers by their text, the latest one last."""

    def suggest(self, task: Hashable, previous: str | None = None) -> list[Ids]:
        """Answers to ``task``, the likeliest first: the previous one, what followed it the last time, the others from the latest back.

        Args:
            previous: what was said last to the one who asks; None: not known, so the latest answer of all counts as it.
        """
        said = self._said.get(task, OrderedDict())
        if previous is None:
            previous = next(reversed(said), None)
        before = said.get(previous) if previous is not None else None
        followed_by = before.followed_by if before is not None else None
        return [said[text].ids for text in dict.fromkeys((previous, followed_by, *reversed(said))) if text is not None and text in said]

    def learn(self, task: Hashable, text: str, ids: Ids, previous: str | None = None) -> None:
        """``text`` was the answer, to someone who had been told ``previous`` before; ``ids`` are its tokens, without the end of text."""
        said = self._said.setdefault(task, OrderedDict())
        self._said.move_to_end(task)
        if previous is None:
            previous = next(reversed(said), None)
        if previous is not None and previous != text and (before := said.get(previous)) is not None:
            before.followed_by = text
        said.setdefault(text, _Answer(ids))
        said.move_to_end(text)
        while len(said) > self._answers:
            said.popitem(last=False)
        while len(self._said) > self._tasks:
            self._said.popitem(last=False)


def clauses(task: str) -> list[str]:
    """The parts of a task between commas, full stops, "and" and "then", the first ones first: a subtask is often one of them."""
    parts = (part.strip() for part in _BETWEEN_CLAUSES.split(task))
    return list(dict.fromkeys(part for part in parts if part))
