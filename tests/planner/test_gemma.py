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
    x, mask = embed_prefix(params, dims, prefix, params.language.embedding.dtype)
    hidden, cache = gemma.prefix_pass(params.language, dims, x, mask)
    return x, mask, gemma.final_norm(params.language, hidden), cache


@pytest.mark.parametrize("model", ["pi05", "pi0"])
def test_prefix_pass_matches_openpi_at_every_valid_position(model: str) -> None:
    params, dims = restore(CHECKPOINTS / f"{model}_orbax", ALL_PIECES, np.dtype(np.float32))
    case = arrays(f"{model}_b1_f32", "model")
    images, image_mask = model_images(case)
    prefix = Decoder(params, dims).encode(Prefix(images=images, image_mask=image_mask, tokens=case["tokens"], token_mask=case["token_mask"]))
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
    prefix = Decoder(params, dims).encode(Prefix(images=images, image_mask=image_mask, tokens=case["tokens"], token_mask=case["token_mask"]))
    with jax.default_matmul_precision("highest"):
        _, mask, _, cache = jax.jit(functools.partial(run_prefix, dims=dims))(params, prefix)
    tail = case["kv_k_last"].shape[1]
    valid = case["prefix_mask"][:, -tail:]
    np.testing.assert_array_equal(np.asarray(mask)[:, -tail:], valid)
    np.testing.assert_allclose(np.asarray(cache.keys)[-1][:, -tail:][valid], case["kv_k_last"][valid], atol=2e-4)
    np.testing.assert_allclose(np.asarray(cache.values)[-1][:, -tail:][valid], case["kv_v_last"][valid], atol=2e-4)
