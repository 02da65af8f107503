from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pi0.tokenizer import EOS_ID
from planner.drafts import NO_TOKEN, DraftTable, TokenTree, agreed, clauses, token_tree

Sequences = st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=6)


def paths(tree: TokenTree) -> list[tuple[int, ...]]:
    """What each used node spells from the prompt on, along its parents."""
    spelled: list[tuple[int, ...]] = []
    for node in range(tree.used):
        parent = int(tree.parents[node])
        spelled.append((*(spelled[parent] if parent >= 0 else ()), int(tree.tokens[node])))
    return spelled


@given(Sequences, st.integers(0, 12))
def test_a_tree_spells_the_beginnings_of_its_sequences_once_each(sequences: list[list[int]], nodes: int) -> None:
    tree = token_tree(sequences, nodes)
    assert tree.tokens.shape == tree.parents.shape == (nodes,) and tree.sees.shape == (nodes, nodes)
    beginnings = dict.fromkeys(tuple(sequence[:length]) for sequence in sequences for length in range(1, len(sequence) + 1))
    assert paths(tree) == list(beginnings)[:nodes], "the first ones first, cut where the nodes end"
    assert (tree.tokens[tree.used :] == NO_TOKEN).all()


@given(Sequences, st.integers(1, 12))
def test_a_node_sees_its_ancestors_and_itself(sequences: list[list[int]], nodes: int) -> None:
    tree = token_tree(sequences, nodes)
    for node in range(nodes):
        line = {node}
        while (parent := int(tree.parents[min(line)])) >= 0:
            assert parent < min(line), "a node comes after its parent"
            line.add(parent)
        assert set(np.flatnonzero(tree.sees[node])) == line


@given(Sequences, st.integers(0, 12), st.integers(0, 14))
def test_its_first_nodes_are_the_tree_of_fewer_nodes(sequences: list[list[int]], nodes: int, fewer: int) -> None:
    first, expected = token_tree(sequences, nodes).first(fewer), token_tree(sequences, min(nodes, fewer))
    for name in ("tokens", "parents", "sees"):
        np.testing.assert_array_equal(getattr(first, name), getattr(expected, name))


@given(Sequences, st.integers(0, 12), st.lists(st.integers(0, 3), min_size=13, max_size=13))
def test_what_is_agreed_is_the_way_that_greedy_decoding_takes(sequences: list[list[int]], nodes: int, said: list[int]) -> None:
    tree = token_tree(sequences, nodes)
    spelled = paths(tree)
    way: list[int] = []
    while said[way[-1] + 1 if way else 0] != EOS_ID:
        answer = (*(spelled[way[-1]] if way else ()), said[way[-1] + 1 if way else 0])
        if answer not in spelled:
            break
        way.append(spelled.index(answer))
    assert agreed(tree, said) == way


def test_the_previous_answer_comes_first_and_what_followed_it_second() -> None:
    table = DraftTable()
    for previous, text, ids in [(None, "a", (1,)), ("a", "b", (2,)), ("b", "c", (3,)), ("c", "a", (1,)), ("a", "d", (4,))]:
        table.learn("task", text, ids, previous)
    assert table.suggest("task", "a") == [(1,), (4,), (3,), (2,)], "d followed a the last time; then the latest back"
    assert table.suggest("task", "b") == [(2,), (3,), (4,), (1,)]
    assert table.suggest("task") == [(4,), (1,), (3,), (2,)], "without a previous one, the latest answer of all"
    assert table.suggest("task", "never said") == [(4,), (1,), (3,), (2,)]
    assert table.suggest("another task", "a") == []


def test_the_same_again_is_no_change() -> None:
    table = DraftTable()
    for text in ("a", "a", "b", "b", "a"):
        table.learn("task", text, (ord(text),))
    assert table.suggest("task", "a") == [(97,), (98,)] and table.suggest("task", "b") == [(98,), (97,)]


def test_what_is_remembered_is_bounded() -> None:
    table = DraftTable(tasks=3, answers=4)
    for task in range(5):
        for answer in range(6):
            table.learn(task, str(answer), (answer,))
        table.learn(2, "again", (9,))  # asked about all the time
    assert [len(table.suggest(task)) for task in range(5)] == [0, 0, 4, 4, 4]
    assert table.suggest(4) == [(5,), (4,), (3,), (2,)]
    assert table.suggest(4, "0") == [(5,), (4,), (3,), (2,)], "what was forgotten is not guessed"


def test_parts_of_a_task() -> None:
    said = clauses("Put the red block in the left bin, then the Blue one and tidy up. Put the red block in the left bin")
    assert said == ["Put the red block in the left bin", "the Blue one", "tidy up"]
    assert clauses("  ,. and then ") == [] and clauses("wash the hand sander") == ["wash the hand sander"]
