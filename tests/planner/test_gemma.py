from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from planner import gemma
from planner.decoder import Decoder, EncodedPrefix, Prefix, embed_prefix
from planner.restore import restore
from tests.golden_data import CHECKPOINTS
from tests.planner.golden_planner import ALL_PIECES, arrays, model_images


def run_prefix(params: Any, prefix: EncodedPrefix, *, dims: Any) -> tuple[Any, ...]:
    x, visible = embed_prefix(params, dims, prefix)
    everywhere = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    hidden, cache = gemma.prefix_pass(params.language, dims, x, prefix.positions, visible, everywhere, x.shape[1])
    return x, visible[:, 0], gemma.final_norm(params.language, hidden), cache


@pytest.mark.parametrize("model", ["pi05", "pi0"])
def test_prefix_pass_matches_openpi_at_every_valid_position(model: str) -> None:
    params, dims = restore(CHECKPOINTS / f"{model}_orbax", ALL_PIECES, np.dtype(np.float32))
    case = arrays(f"{model}_b1_f32", "model")
    images, image_mask = model_images(case)
    prefix = Decoder(params, dims).encode(Prefix(images=images, image_mask=image_mask, tokens=case["tokens"], lengths=case["token_mask"].sum(-1)))
    with jax.default_matmul_precision("highest"):
        x, mask, hidden, cache = jax.jit(functools.partial(run_prefix, dims=dims))(params, prefix)
    np.testing.assert_array_equal(mask, case["prefix_mask"])
    valid = case["prefix_mask"]
    np.testing.assert_allclose(np.asarray(x)[valid], case["prefix_embeddings"][valid], atol=2e-4)
    np.testing.assert_allclose(np.asarray(hidden)[valid], case["prefix_out"][valid], atol=2e-4)
    for name, layer in (("first", 0), ("last", -1)):
        np.testing.assert_allclose(np.asarray(cache.keys)[layer][valid], case[f"kv_k_{name}"][valid], atol=2e-4)
        np.testing.assert_allclose(np.asarray(cache.values)[layer][valid], case[f"kv_v_{name}"][valid], atol=2e-4)


def test_masked_cameras_in_a_batch_change_no_valid_key() -> None:
    params, dims = restore(CHECKPOINTS / "pi05_orbax", ALL_PIECES, np.dtype(np.float32))
    case = arrays("pi05_b3_f32", "model")
    images, image_mask = model_images(case)
    assert not image_mask.all(), "the case must have a masked camera"
    prefix = Decoder(params, dims).encode(Prefix(images=images, image_mask=image_mask, tokens=case["tokens"], lengths=case["token_mask"].sum(-1)))
    with jax.default_matmul_precision("highest"):
        _, mask, _, cache = jax.jit(functools.partial(run_prefix, dims=dims))(params, prefix)
    tail = case["kv_k_last"].shape[1]
    valid = case["prefix_mask"][:, -tail:]
    np.testing.assert_array_equal(np.asarray(mask)[:, -tail:], valid)
    np.testing.assert_allclose(np.asarray(cache.keys)[-1][:, -tail:][valid], case["kv_k_last"][valid], atol=2e-4)
    np.testing.assert_allclose(np.asarray(cache.values)[-1][:, -tail:][valid], case["kv_v_last"][valid], atol=2e-4)


def test_attention_in_pieces_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    batch, queries, keys, kv_heads, group, size = 2, 45, 50, 2, 3, 16
    query = rng.standard_normal((batch, queries, kv_heads, group, size), np.float32)
    key, value = rng.standard_normal((2, batch, keys, kv_heads, size), np.float32)
    visible = rng.random((batch, queries, keys)) < 0.7
    visible[:, :, 0] = True
    whole = gemma._attention(query, key, value, visible)
    monkeypatch.setattr(gemma, "_LOGITS_IN_CACHE", 1)
    pieces = gemma._attention(query, key, value, visible)
    assert queries > gemma._FEWEST_QUERIES and queries % gemma._FEWEST_QUERIES, "the last piece must be a short one"
    np.testing.assert_allclose(pieces, whole, atol=1e-6)
    exact = np.einsum("btkgh,bskh->bktgs", query.astype(np.float64), key)
    exact = np.where(visible[:, None, :, None], np.exp(exact - exact.max(-1, keepdims=True)), 0)
    np.testing.assert_allclose(whole, np.einsum("bktgs,bskh->btkgh", exact / exact.sum(-1, keepdims=True), value), atol=1e-5)


def test_what_is_read_of_the_last_block_is_what_all_of_it_would_say() -> None:
    params, dims = restore(CHECKPOINTS / "pi05_orbax", ALL_PIECES, np.dtype(np.float32))
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 12, dims.vlm.width), np.float32)
    visible = np.broadcast_to(np.tril(np.ones((12, 12), np.bool_)), (2, 12, 12)) | (np.arange(12) < [[[8]], [[5]]])
    positions = np.array([np.arange(12), [*range(8), *range(5, 9)]])
    read = np.array([[7, 9, 0], [4, 11, 8]])
    everywhere = np.broadcast_to(np.arange(12), (2, 12))
    whole, cache = gemma.prefix_pass(params.language, dims, x, positions, visible, everywhere, 15)
    some, same = gemma.prefix_pass(params.language, dims, x, positions, visible, read, 15)
    np.testing.assert_allclose(some, np.take_along_axis(np.asarray(whole), read[..., None], axis=1), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, cache, same)
