"""Answers from a closed list, which nothing can make the planner leave. Host side, no jax.

One pass over the prompt reads the whole list behind it, as one tree of tokens (:mod:`planner.drafts`), and tells how likely each token is where it
stands (:func:`planner.decoder.read_tree`). What is chosen from that needs no further pass:

- ``trie`` says, token by token, the likeliest one that goes on towards an entry, as greedy decoding would that may say nothing else;
- ``score`` takes the entry that is likeliest as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pi0.errors import ConfigError
from pi0.tokenizer import EOS_ID
from planner.drafts import TokenTree, token_tree

MAX_NODES: Final = 1024
"""Tokens of a list, common beginnings counted once: as many again as the longest prompt with three cameras."""

Ids = tuple[int, ...]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class ClosedList:
    """The entries as they were written, their tokens, and the tree of all of them.

    Attributes:
        texts: no two of them have the same tokens.
        ids: of each, without the end of text.
        tree: every token of every entry, no node unused.
        ends: for each entry, the node of its last token.
    """

    texts: tuple[str, ...]
    ids: tuple[Ids, ...]
    tree: TokenTree
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes:
        entry: its number in the list.
        logprob: of its tokens and the end of text, each under the softmax over all allowed tokens, whether or not they go on towards an entry.
        margin: ``trie``: the smallest distance between the chosen and the next best of the tokens that could be said, in log-probability;
            ``score``: the distance between the two best entries. Infinite where there was nothing else to choose.
        table: ``score``: the log-probability of every entry.
    """

    entry: int
    logprob: float
    margin: float
    table: tuple[float, ...] | None = None


def closed_list(texts: Sequence[str], encode: Callable[[str], Sequence[int]], allowed: NDArray[np.int32], *, most: int = MAX_NODES) -> ClosedList:
    """The list of ``texts``; outer spaces do not count, and what is there twice is there once.

    Args:
        encode: a text's tokens, without begin and end.
        allowed: the tokens that the planner may say, ascending.
        most: tokens of all of them together, common beginnings counted once.

    Raises:
        ConfigError: there is no entry, one is empty or holds what the planner cannot say, or they are too long together.
    """
    found: dict[Ids, str] = {}
    sayable = set(allowed.tolist()) - {EOS_ID}
    for position, text in enumerate(texts):
        ids = tuple(int(token) for token in encode(text.strip()))
        if not ids:
            raise ConfigError(f"subtasks[{position}]: is empty; leave it out")
        if any(token not in sayable for token in ids):
            raise ConfigError(f"subtasks[{position}]: {text!r} has characters that the planner cannot say; write it in plain text")
        found.setdefault(ids, text.strip())
    if not found:
        raise ConfigError("subtasks: is empty; list at least one")
    needed = len({ids[:length] for ids in found for length in range(1, len(ids) + 1)})
    if needed > most:
        raise ConfigError(f"subtasks: {len(found)} entries have {needed} tokens together, expected at most {most}; list fewer, or shorter ones")
    tree = token_tree(found, needed)
    return ClosedList(tuple(found.values()), tuple(found), tree, tuple(_last_nodes(tree, list(found))))


def _last_nodes(tree: TokenTree, sequences: Sequence[Ids]) -> list[int]:
    children = {(int(parent), int(token)): node for node, (parent, token) in enumerate(zip(tree.parents, tree.tokens, strict=True))}
    ends = []
    for sequence in sequences:
        node = -1
        for token in sequence:
            node = children[node, token]
        ends.append(node)
    return ends


def score(entries: ClosedList, own: Floats, end: Floats) -> Selection:
    """The likeliest entry; of equals the first.

    Args:
        own: ``[N]``, the log-probability of each node's token after its parent.
        end: ``[1 + N]``, that of the end of text after the prompt and after each node.
    """
    table = [float((own * entries.tree.sees[node]).sum() + end[1 + node]) for node in entries.ends]
    best = int(np.argmax(table))
    others = [logprob for entry, logprob in enumerate(table) if entry != best]
    return Selection(best, table[best], table[best] - max(others) if others else float("inf"), tuple(table))


def walk(entries: ClosedList, own: Floats, end: Floats) -> Selection:
    """What greedy decoding says that may say nothing but an entry; of equally likely tokens the lowest. As :func:`score`."""
    tree, at_end = entries.tree, {node: entry for entry, node in enumerate(entries.ends)}
    node, logprob, margin = -1, 0.0, float("inf")
    while True:
        following = [child for child in range(tree.used) if tree.parents[child] == node]
        choices = [(float(own[child]), int(tree.tokens[child]), child) for child in following]
        if node in at_end:
            choices.append((float(end[1 + node]), EOS_ID, -1))
        choices.sort(key=lambda choice: (-choice[0], choice[1]))
        likelihood, _, child = choices[0]
        logprob += likelihood
        if len(choices) > 1:
            margin = min(margin, likelihood - choices[1][0])
        if child < 0:
            return Selection(at_end[node], logprob, margin)
        node = child
