from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from pi0.errors import ConfigError, ObservationError
from pi0.tokenizer import EOS_ID
from planner.closed_list import MAX_NODES, closed_list, score, walk
from planner.decoder import Decoder, TreeReader
from planner.generator import pack
from planner.restore import restore_from
from tests.planner import listed_answers
from tests.planner.golden_planner import CASE, images
from tests.planner.listed_answers import ALLOWED, encode
from tests.planner.oracle import Oracle, RandomParams
from tests.planner.test_decoder import ODD_SIZES, prompt, random_images
from tests.planner.test_generator import counted_compilations, load

LISTED = ["pick up the red block", "pick up the blue block", "pick up", "put it in the left bin", "all done"]


def test_trie_and_score_are_brute_forces() -> None:
    """The short form of ``python -m tests.planner.listed_answers``."""
    assert listed_answers.check(1500, seed=1) == 1500


def test_outer_spaces_and_doubles_do_not_count() -> None:
    entries = closed_list([" ab ", "ab", "a", "b"], encode, ALLOWED)
    assert entries.texts == ("ab", "a", "b") and entries.tree.used == len(entries.tree.tokens) == 3
    assert [int(entries.tree.tokens[node]) for node in entries.ends] == [ord("b"), ord("a"), ord("b")]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "subtasks: is empty; list at least one"),
        (["ab", "  "], "subtasks[1]: is empty; leave it out"),
        (["ab", "axb"], "subtasks[1]: 'axb' has characters that the planner cannot say; write it in plain text"),
        (["".join(letters) for letters in itertools.product("abcd", repeat=5)], "expected at most 1024; list fewer, or shorter ones"),
    ],
)
def test_a_list_that_cannot_be_used(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        closed_list(texts, encode, ALLOWED)
    assert MAX_NODES == 1024


def test_a_tree_is_read_as_a_recomputation_reads_it() -> None:
    """Every entry's log-probability from one pass, against the numpy oracle that recomputes everything for every token."""
    dims = ODD_SIZES["two kv heads"]
    source = RandomParams(dims, seed=3)
    allowed = np.array([1, *range(3, dims.vocab_size, 2)], np.int32)
    params, _ = restore_from(source, allowed, np.dtype(np.float32), where="random")
    texts = ["abc", "abd", "ab", "b", "ccc"]
    tokens = {letter: int(allowed[5 * number]) for number, letter in enumerate("abcd", start=2)}
    entries = closed_list(texts, lambda text: [tokens[letter] for letter in text], allowed)
    prompts, cameras = [prompt(2, 5, 7), prompt(2, 9, 11, 13)], [random_images(2), random_images(1, seed=1)]
    reader = TreeReader(params, dims, guesses=12)
    reading = reader(pack(prompts, cameras), [entries.tree])
    oracle = Oracle(source, dims)
    for row in range(2):
        seen = np.concatenate([oracle.encode_image(image) for image in cameras[row]])
        ids = prompts[row].ids.tolist()
        nodes = len(entries.tree.tokens)
        chosen = score(entries, reading.own[row, :nodes], reading.end[row, : 1 + nodes])
        assert chosen.table is not None
        for entry, logprob in zip(entries.ids, chosen.table, strict=True):
            expected, said = 0.0, [*entry, EOS_ID]
            for position, token in enumerate(said):
                logits = oracle.next_logits(seen, [*ids, *said[:position]], len(seen) + len(ids))[allowed]
                expected += logits[allowed.tolist().index(token)] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            assert logprob == pytest.approx(expected, abs=1e-3)
        walked = walk(entries, reading.own[row, :nodes], reading.end[row, : 1 + nodes])
        free = Decoder(params, dims)(pack(prompts[row : row + 1], cameras[row : row + 1]), 4)
        if free.tokens[0, 0] in {entry[0] for entry in entries.ids}:
            assert entries.ids[walked.entry][0] == free.tokens[0, 0]


@pytest.mark.parametrize("decode", ["trie", "score"])
def test_an_answer_is_always_an_entry(decode: str) -> None:
    generator = load(decode=decode, subtasks=LISTED, cameras=3)
    names = ["case_03", "case_06", "case_13"]
    rows = generator.generate_batch([CASE[name]["prompt"] for name in names], [images(name) for name in names])
    for name, row in zip(names, rows, strict=True):
        assert row.text in LISTED and row.token_ids[-1] == EOS_ID and (row.decode_steps, row.forward_passes) == (0, 1)
        assert row.margin >= 0 and row.logprob < 0
        alone = generator.infer({"prompt": CASE[name]["prompt"], "images": images(name)})["subtask"]
        assert alone["text"] == row.text and alone["logprob"] == pytest.approx(row.logprob, abs=2e-3)
        if decode == "score":
            assert list(alone["scores"]) == LISTED and max(alone["scores"].values()) == alone["logprob"]
            weights = np.exp(list(alone["scores"].values()))
            assert alone["probability"] == pytest.approx(weights.max() / weights.sum())
        else:
            assert "scores" not in alone and "probability" not in alone


def test_a_request_brings_its_own_list() -> None:
    generator = load(decode="score", cameras=1)
    observation = {"prompt": "tidy up", "images": {"base_0_rgb": random_images(1)[0]}}
    assert generator.infer({**observation, "subtasks": ["only this"]})["subtask"]["text"] == "only this"
    assert generator.infer({**observation, "subtasks": np.array(["only that"])})["subtask"]["margin"] is None, "there was nothing else"
    for subtasks, message in [
        (None, "subtasks: are missing; send the list that the answer is chosen from, or set planner.subtasks"),
        ("pick", "subtasks: got str, expected a list of strings"),
        ([1, 2], "subtasks: got list, expected a list of strings"),
        ([], "subtasks: is empty; list at least one"),
        ([" ".join(["pick"] * 300)], "expected at most 256; list fewer, or shorter ones"),
    ]:
        with pytest.raises(ObservationError, match=re.escape(message)):
            generator.infer({**observation, "subtasks": subtasks})


def test_warm_up_needs_no_list() -> None:
    generator = load(decode="trie", cameras=1)
    generator.warmup()
    listed = {"prompt": "tidy up", "images": {"base_0_rgb": random_images(1)[0]}, "subtasks": LISTED}
    with counted_compilations() as compiled:
        assert generator.infer(listed)["subtask"]["text"] in LISTED
    assert compiled == []


def test_a_list_for_a_planner_that_decodes_freely() -> None:
    with pytest.raises(ConfigError, match="subtasks: a list is only used with decode 'trie' or 'score'"):
        load(subtasks=["pick"])
    with pytest.raises(ConfigError, match="decode: got 'beam', expected one of free, trie, score"):
        load(decode="beam")
    with pytest.raises(ObservationError, match="subtasks: the planner that is loaded decodes freely; leave them out"):
        load().infer({"prompt": "tidy up", "images": {"base_0_rgb": random_images(1)[0]}, "subtasks": ["pick"]})
