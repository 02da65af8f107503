from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from planner.restore import restore
from planner.siglip import encode_images
from tests.golden_data import CHECKPOINTS
from tests.planner.golden_planner import ALL_PIECES, arrays, model_images


@pytest.mark.parametrize("model", ["pi05", "pi0"])
def test_image_tokens_are_those_of_openpi(model: str) -> None:
    params, dims = restore(CHECKPOINTS / f"{model}_orbax", ALL_PIECES, np.dtype(np.float32))
    encode = jax.jit(functools.partial(encode_images, dims=dims.vision, dtype=jnp.float32))
    case = arrays(f"{model}_b1_f32", "model")
    tokens = encode(params.vision, images=model_images(case)[0][:, 0])
    np.testing.assert_allclose(tokens, case["siglip_tokens_base"], atol=2e-4)


def test_image_tokens_in_bfloat16_stay_near_those_of_openpi_in_bfloat16() -> None:
    params, dims = restore(CHECKPOINTS / "pi05_orbax", ALL_PIECES, np.dtype(jnp.bfloat16))
    encode = jax.jit(functools.partial(encode_images, dims=dims.vision, dtype=jnp.bfloat16))
    case = arrays("pi05_b1_bf16", "model")
    tokens = encode(params.vision, images=model_images(case)[0][:, 0])
    assert tokens.dtype == jnp.bfloat16
    difference = np.asarray(tokens, np.float32) - case["siglip_tokens_base"]
    # Excess precision inside fusions differs between jax versions, so bfloat16 agrees to its rounding only.
    assert np.sqrt(np.square(difference).mean()) < 0.02
    assert np.abs(difference).max() < 0.15
