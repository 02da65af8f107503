from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0.param_tree import BackboneDims, ExpertDims, VisionDims
from pi0.prompt import MAX_GENERATION_TOKENS
from pi0.tokenizer import TokenizedPrompt
from planner.decoder import Decoder, Prefix, choose, read_prefix, text_slots
from planner.generator import pack
from planner.observation import prepare_cameras
from planner.restore import restore, restore_from
from tests.golden_data import CHECKPOINTS
from tests.planner import drafted_decoding
from tests.planner.golden_planner import ALL_PIECES, CASES, arrays, images
from tests.planner.oracle import Oracle, RandomParams

# Width ≠ heads × head size, several kv heads, as many kv heads as heads (one fused einsum), patches that do not fill the image.
ODD_SIZES = {
    "two kv heads": BackboneDims(VisionDims(20, 2, 2, 14, 36, 32, 49), ExpertDims(44, 60), 211, 2, 6, 2, 10),
    "fused qkv": BackboneDims(VisionDims(24, 1, 3, 8, 30, 45, 16), ExpertDims(40, 52), 97, 3, 4, 4, 8),
    "one layer, wide heads": BackboneDims(VisionDims(12, 3, 1, 6, 20, 28, 64), ExpertDims(18, 30), 300, 1, 2, 1, 16),
}


def prompt(*ids: int) -> TokenizedPrompt:
    return TokenizedPrompt(np.array(ids, np.int32), len(ids), False)


def random_images(count: int, seed: int = 0) -> list[Any]:
    return list(np.random.default_rng(seed).uniform(-1, 1, (count, 224, 224, 3)).astype(np.float32))


def test_first_logits_match_openpi_flash_over_the_whole_vocabulary() -> None:
    params, dims = restore(CHECKPOINTS / "pi05_orbax", ALL_PIECES, np.dtype(np.float32))
    decoder = Decoder(params, dims)
    with jax.default_matmul_precision("highest"):
        read = jax.jit(functools.partial(read_prefix, dims=dims, nodes=0))
        for case in CASES:
            stored = arrays(case["name"])
            cameras = np.stack(prepare_cameras(images(case["name"]), "grey"))[None]
            length = stored["prompt_mask"].sum(keepdims=True)
            prefix = Prefix(images=cameras, image_mask=np.ones((1, 3), bool), tokens=stored["prompt_tokens"][None], lengths=length)
            hidden, _ = read(params, prefix=decoder.encode(prefix))
            logits = np.asarray(hidden[0, 0]) @ np.asarray(params.head).T
            np.testing.assert_allclose(logits, stored["first_logits"], atol=2e-4, err_msg=case["name"])


@pytest.mark.parametrize(("size", "seed"), [("two kv heads", 7), ("fused qkv", 8), ("one layer, wide heads", 10)])
def test_any_size_decodes_as_a_full_recomputation_does(size: str, seed: int) -> None:
    dims = ODD_SIZES[size]
    source = RandomParams(dims, seed=seed)
    allowed = np.array([token for token in range(dims.vocab_size) if token % 3], np.int32)
    params, found = restore_from(source, allowed, np.dtype(np.float32), where=size)
    assert found == dims
    decoder, oracle = Decoder(params, dims), Oracle(source, dims)
    prompts = [prompt(2, 5, 7, 11, 13, 17), prompt(2, 90), prompt(2, 41, 8)]
    cameras = [random_images(1), random_images(3, seed=1), random_images(2, seed=2)]
    decoded = decoder(pack(prompts, cameras), 9)
    for row in range(3):
        tokens, logprob, margin = oracle.generate(cameras[row], prompts[row].ids.tolist(), allowed, 9)
        assert margin > 1e-3, "choose another seed: float32 cannot tell such a tie"
        assert len(set(tokens)) > 3, "choose another seed: an answer that repeats itself proves little"
        assert decoded.tokens[row, : decoded.decode_steps[row] + 1].tolist() == tokens
        assert decoded.decode_steps[row] == len(tokens) - 1
        assert decoded.logprob[row] == pytest.approx(logprob, abs=1e-2)


def test_the_loop_ends_with_the_last_row_and_stopped_rows_emit_pad() -> None:
    dims = ODD_SIZES["two kv heads"]
    source = RandomParams(dims, seed=5)
    oracle = Oracle(source, dims)
    everything = np.arange(2, dims.vocab_size, dtype=np.int32)
    prompts, cameras = [prompt(2, 5, 7), prompt(2, 9)], [random_images(1), random_images(1, seed=1)]
    long = [oracle.generate(row, p.ids.tolist(), everything, 8)[0] for p, row in zip(prompts, cameras, strict=True)]
    # The end of text takes the place of a token that row 0 says at its third step and row 1 never says.
    ending = next(token for token in long[0][2:] if token not in long[1] and token not in long[0][:2])
    params, _ = restore_from(source, everything, np.dtype(np.float32), where="random")
    params = params.replace(head_ids=jnp.where(params.head_ids == ending, 1, params.head_ids))
    decoded = Decoder(params, dims)(pack(prompts, cameras), 8)
    stop = long[0].index(ending)
    assert decoded.tokens[0, : stop + 1].tolist() == [*long[0][:stop], 1]
    assert not decoded.tokens[0, stop + 1 :].any()
    assert decoded.tokens[1, :8].tolist() == long[1]
    assert decoded.decode_steps.tolist() == [stop, 7]
    assert decoded.loop_steps == 7
    alone = Decoder(params, dims)(pack(prompts[:1], cameras[:1]), 8)
    assert alone.loop_steps == stop
    assert alone.logprob[0] == pytest.approx(decoded.logprob[0], abs=1e-4)


def test_ties_go_to_the_lowest_id() -> None:
    dims = ODD_SIZES["fused qkv"]
    params, _ = restore_from(RandomParams(dims), np.array([1, 20, 30, 40], np.int32), np.dtype(np.float32), where="random")
    row = params.head[2]
    params = params.replace(head=jnp.stack([-row, row, row, row]))
    choice = choose(params, row[None])
    assert choice.token.tolist() == [20]
    assert float(choice.logprob[0]) == pytest.approx(-np.log(3), abs=1e-4)
    assert float(choice.margin[0]) == 0


def test_the_margin_is_the_distance_to_the_second_best() -> None:
    dims = ODD_SIZES["fused qkv"]
    params, _ = restore_from(RandomParams(dims), np.array([1, 20, 30, 40], np.int32), np.dtype(np.float32), where="random")
    hidden = np.random.default_rng(0).standard_normal((5, 3, dims.vlm.width)).astype(np.float32)
    ordered = np.sort(hidden @ np.asarray(params.head).T, axis=-1)
    np.testing.assert_allclose(choose(params, hidden).margin, ordered[..., -1] - ordered[..., -2], rtol=1e-4, atol=1e-4)


@pytest.mark.timeout(240)  # six programs are compiled
def test_drafts_change_nothing_but_the_work() -> None:
    """The short form of ``python -m tests.planner.drafted_decoding``."""
    tally = drafted_decoding.run(2000, seed=11, batches=(8,))
    assert tally.cases >= 2000 and set(tally.kinds) == set(drafted_decoding.KINDS) and min(tally.kinds.values()) > 100
    assert tally.different == []
    assert tally.plain_steps - tally.steps == tally.accepted > 1000


def test_in_bfloat16_answers_part_only_where_two_logits_are_as_good_as_equal() -> None:
    """The short form of ``python -m tests.planner.drafted_decoding 5000 3 bfloat16``."""
    tally = drafted_decoding.run(600, seed=3, batches=(8,), sizes=("two kv heads",), dtype="bfloat16")
    assert tally.cases >= 600 and tally.accepted > 300
    assert 0 < len(tally.different) < 0.05 * tally.cases, "none differs: choose another seed, so that the gap is looked at"
    assert max(gap for _, _, gap in tally.different) < drafted_decoding.BFLOAT16_BOUND


def test_a_draft_is_cut_to_the_limit_and_to_the_tree() -> None:
    dims = ODD_SIZES["one layer, wide heads"]
    params, _ = restore_from(RandomParams(dims, seed=7), np.arange(2, dims.vocab_size, dtype=np.int32), np.dtype(np.float32), where="random")
    decoder = Decoder(params, dims, guesses=6)
    prefix = pack([prompt(2, 3)], [random_images(1)])
    answer = decoder(prefix, 12).tokens[0].tolist()
    for limit, kept in ((12, 6), (5, 4), (2, 1), (1, 0)):
        decoded = decoder(prefix, limit, [decoder.tree([answer], limit)])
        assert decoded.tokens[0, :limit].tolist() == answer[:limit] and not decoded.tokens[0, limit:].any()
        assert (decoded.length[0], decoded.accepted[0], decoded.decode_steps[0]) == (limit, kept, limit - kept - 1)


def test_a_prefix_for_which_a_decoder_was_not_made_is_refused() -> None:
    dims = ODD_SIZES["one layer, wide heads"]
    params, _ = restore_from(RandomParams(dims, seed=7), np.arange(2, dims.vocab_size, dtype=np.int32), np.dtype(np.float32), where="random")
    with pytest.raises(ValueError, match="a prefix has 328 tokens, but this decoder was made for 264: for fewer cameras or guesses"):
        Decoder(params, dims, cameras=1).compile([(1, 2, 200)])


def test_a_loop_that_could_not_be_compiled_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    dims = ODD_SIZES["one layer, wide heads"]
    params, _ = restore_from(RandomParams(dims, seed=7), np.arange(2, dims.vocab_size, dtype=np.int32), np.dtype(np.float32), where="random")
    decoder, prefix = Decoder(params, dims), pack([prompt(2, 3)], [random_images(1)])

    def no_memory(batch: int) -> None:
        raise MemoryError

    monkeypatch.setattr(decoder, "_compile_saying", no_memory)
    with pytest.raises(MemoryError):
        decoder(prefix, 3)
    monkeypatch.undo()
    assert decoder(prefix, 3).length[0] == 3


def test_guesses_take_what_the_prompt_leaves() -> None:
    dims = ODD_SIZES["one layer, wide heads"]
    params, _ = restore_from(RandomParams(dims, seed=7), np.arange(2, dims.vocab_size, dtype=np.int32), np.dtype(np.float32), where="random")
    decoder, plain = Decoder(params, dims, guesses=6), Decoder(params, dims)
    for length, room in ((42, 6), (43, 5), (47, 1), (48, 0), (49, 6)):
        prefix = pack([prompt(2, *range(3, 2 + length))], [random_images(1)], text_slots(6))
        assert prefix.tokens.shape[1] == (48 if length <= 48 else 206)
        expected = plain(prefix, 12)
        decoded = decoder(prefix, 12, [decoder.tree([expected.tokens[0].tolist()], 12)])
        np.testing.assert_array_equal(decoded.tokens, expected.tokens)
        assert decoded.drafted[0] == decoded.accepted[0] == room


def test_a_list_that_does_not_fit_behind_a_short_prompt_takes_more_slots() -> None:
    short, long = text_slots(256)
    for length, nodes, expected in ((32, 256, short), (33, 256, long), (60, 100, short), (200, 256, long)):
        assert pack([prompt(*range(2, 2 + length))], [random_images(1)], (short, long), [nodes]).tokens.shape == (1, expected)
    with pytest.raises(ValueError, match="a row needs 457 text slots, expected at most 456"):
        pack([prompt(*range(2, 203))], [random_images(1)], (short, long), [256])


def test_the_buffer_holds_the_longest_answer() -> None:
    dims = ODD_SIZES["one layer, wide heads"]
    source = RandomParams(dims, seed=7)
    allowed = np.arange(2, dims.vocab_size, dtype=np.int32)
    params, _ = restore_from(source, allowed, np.dtype(np.float32), where="random")
    cameras = random_images(1)
    decoded = Decoder(params, dims)(pack([prompt(2, 3)], [cameras]), MAX_GENERATION_TOKENS)
    assert decoded.loop_steps == MAX_GENERATION_TOKENS - 1
    tokens = decoded.tokens[0].tolist()
    # The last token too is what a recomputation over all that came before would say.
    oracle = Oracle(source, dims)
    seen = oracle.encode_image(cameras[0])
    logits = oracle.next_logits(seen, [2, 3, *tokens[:-1]], len(seen) + 2)
    assert tokens[-1] == int(allowed[np.argmax(logits[allowed])])
