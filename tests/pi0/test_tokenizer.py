import json
import string
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi0.errors import CheckpointError, PromptTooLongError
from pi0.tokenizer import EOS_ID, PAD_ID, PromptTokenizer, clean_task, discretize_state, find_tokenizer
from tests.golden_data import GOLDEN, TOKENIZER

CASES = json.loads((GOLDEN / "tokenizer" / "cases.json").read_text())
TOKENS = PromptTokenizer(TOKENIZER)


def tokenize(case, on_long_prompt):
    if case["format"] == "planner":
        return TOKENS.planner_prompt(case["prompt"], case["prompt_format"], case["max_len"], on_long_prompt=on_long_prompt)
    state = None if case["format"] == "pi0" else np.asarray(case["state"], case["state_dtype"])
    return TOKENS.action_prompt(case["prompt"], case["max_len"], state=state, on_long_prompt=on_long_prompt)


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: f"{case['format']}-{case['prompt'][:20]!r}")
def test_golden_prompts(case):
    tokens = tokenize(case, "truncate")
    ids, mask = tokens.padded(case["max_len"])
    assert ids.tolist() == case["tokens"]
    assert mask.tolist() == [bool(m) for m in case["mask"]]
    if tokens.truncated:
        assert tokens.needed > case["max_len"]
        with pytest.raises(PromptTooLongError, match=rf"has {tokens.needed} tokens .* but {case['max_len']} fit"):
            tokenize(case, "error")
    else:
        assert tokens.needed == sum(case["mask"])


def test_golden_cases_reach_truncation():
    assert sum(tokenize(case, "truncate").truncated for case in CASES["cases"]) >= 3


@pytest.mark.parametrize("case", [c for c in CASES["cases"] if c["format"] == "pi05"], ids=lambda case: case["prompt"][:20])
def test_golden_state_bins(case):
    assert discretize_state(np.asarray(case["state"], case["state_dtype"])) == case["discretized"]


@pytest.mark.parametrize("case", CASES["detokenize"], ids=lambda case: repr(case["text"][:20]))
def test_golden_detokenize(case):
    assert TOKENS.decode(case["ids"]) == case["text"]


def test_printable_ascii_is_the_reference_mask():
    allowed = np.load(GOLDEN / "planner" / "vocab_mask.npz")["allowed"]
    assert TOKENS.allowed_tokens("printable_ascii").tolist() == np.flatnonzero(allowed).tolist()


def test_text_tokens_are_text():
    allowed = TOKENS.allowed_tokens("text").tolist()
    assert EOS_ID in allowed and PAD_ID not in allowed
    assert allowed == sorted(set(allowed))
    assert set(allowed) < set(TOKENS.allowed_tokens("printable_ascii").tolist()), "text is a stricter rule"
    pieces = [TOKENS._pieces.id_to_piece(i) for i in allowed if i != EOS_ID]
    assert not [p for p in pieces if p.startswith(("<loc", "<seg", "<0x", "<bos", "<unk", "<pad"))]
    decoded = "".join(TOKENS.decode([i]) for i in allowed)
    assert decoded.isascii() and decoded.isprintable()
    every_piece = {TOKENS._pieces.id_to_piece(i) for i in range(TOKENS.vocab_size)}
    assert {c for c in string.printable if c in every_piece and c.isprintable()} <= set(decoded), "single characters stay allowed"


@given(st.text(max_size=60))
def test_any_prompt_tokenizes_and_pads(prompt):
    tokens = TOKENS.action_prompt(prompt, 48, on_long_prompt="truncate")
    ids, mask = tokens.padded(48)
    assert mask.sum() == len(tokens.ids) == min(tokens.needed, 48)
    assert (ids[~mask] == PAD_ID).all()


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: f"{case['format']}-{case['prompt'][:20]!r}")
def test_previews_are_the_golden_prompts(case):
    if case["format"] == "planner":
        finished = case["prompt_format"].format(task=clean_task(case["prompt"]))
        preview = TOKENS.preview_planner_prompt(finished, case["max_len"])
        assert preview["text"] == finished
    else:
        state = None if case["format"] == "pi0" else np.asarray(case["state"], case["state_dtype"])
        preview = TOKENS.preview_action_prompt(case["prompt"], case["max_len"], state=state)
    fitting = [token for token, valid in zip(case["tokens"], case["mask"], strict=True) if valid]
    assert preview["token_ids"][: case["max_len"]] == fitting
    assert preview["tokens"] == len(preview["token_ids"]) == tokenize(case, "truncate").needed
    assert preview["max_tokens"] == case["max_len"]
    assert bool(preview["not_fitting"]) == (preview["tokens"] > case["max_len"])
    # A cut inside a character leaves its bytes, which are no text, on both sides.
    assert preview["text"].endswith(preview["not_fitting"].lstrip("\ufffd"))


def test_a_preview_splits_the_text_where_the_model_stops_reading():
    words = "pick up the red cup and put it on the blue plate "
    preview = TOKENS.preview_planner_prompt(words * 3, 20)
    assert TOKENS.decode(preview["token_ids"][:20]) + preview["not_fitting"] == words * 3
    assert TOKENS.preview_planner_prompt(words, 200)["not_fitting"] == ""


def test_no_state_takes_more_tokens_than_the_widest():
    lengths = {value: TOKENS.action_prompt("go", 200, state=np.array([value, 0.0, value])).needed for value in np.linspace(-1.5, 1.5, 600)}
    assert max(lengths.values()) == TOKENS.action_prompt("go", 200, state=np.array([1.0, 0.0, 1.0])).needed


def test_one_tokenizer_serves_many_threads():
    texts = [case["prompt"] or "go" for case in CASES["cases"]] * 20
    expected = [TOKENS.preview_planner_prompt(text) for text in texts]
    gate = threading.Barrier(4)

    def previews(_):
        gate.wait()
        return [TOKENS.preview_planner_prompt(text) for text in texts]

    with ThreadPoolExecutor(4) as threads:
        for seen in threads.map(previews, range(4)):
            assert seen == expected


def test_padding_never_cuts():
    with pytest.raises(ValueError, match="does not fit in 2"):
        TOKENS.action_prompt("pick up the cup", 48).padded(2)


@pytest.mark.parametrize(("task", "cleaned"), [("  Pick_UP the\ncup. ", "pick up the cup"), ("a.!", "a."), ("", ""), ("!", ""), ("go_", "go ")])
def test_clean_task(task, cleaned):
    assert clean_task(task) == cleaned


def test_find_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    beside = tmp_path / "paligemma_tokenizer.model"
    beside.write_bytes(TOKENIZER.read_bytes())
    assert find_tokenizer(TOKENIZER, tmp_path) == TOKENIZER, "the explicit one wins"
    assert find_tokenizer(None, tmp_path) == beside
    assert find_tokenizer(None, tmp_path / "params") == beside
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_tokenizer("~/paligemma_tokenizer.model", tmp_path / "elsewhere") == beside
    (tmp_path / "params").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "link").symlink_to(tmp_path / "params")
    assert find_tokenizer(None, tmp_path / "other" / "link") == beside
    with pytest.raises(CheckpointError, match="no such file"):
        find_tokenizer(tmp_path / "none.model", tmp_path)


def test_not_a_tokenizer(tmp_path: Path):
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="cannot be read as a SentencePiece model"):
        PromptTokenizer(tmp_path / "x.model")
