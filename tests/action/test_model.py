"""The fast model against openpi's intermediate results, and against the plain path at sizes nobody ships."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from action.checkpoint import load_model
from action.gemma import HeadDims, Rope, attend, fold_rows, rope, rotate
from action.model import Pi0Model, PrefixContext, time_embedding
from action.plain import PlainModel
from action.sampler import ModelInput
from tests.action.synthetic import CPU, ODD_DIMS, golden_case, golden_input, random_input, random_noise, random_weights
from tests.golden_data import CHECKPOINTS

LIMIT = 2e-4
CASES = ("pi05_b1_f32", "pi05_b3_f32", "pi0_b1_f32", "pi0_b3_f32")


def fast_model(kind: str) -> Pi0Model:
    return load_model(CHECKPOINTS / f"{kind}_orbax", dtype=torch.float32, device=CPU)


def from_weights(plain: PlainModel) -> Pi0Model:
    model = Pi0Model(plain.dims, dtype=torch.float32).to_empty(device=CPU).requires_grad_(False)
    for name, slot in model.slots().items():
        if not slot.is_meta:
            slot.copy_(plain.weights[name])
    return model


def encode(model: Pi0Model, inputs: ModelInput, horizon: int) -> PrefixContext:
    images, masks = torch.tensor(inputs.images), torch.tensor(inputs.image_masks)
    return model.encode(images, masks, torch.tensor(inputs.tokens), torch.tensor(inputs.token_mask), torch.tensor(inputs.state), horizon)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Pi0Model, dict[str, NDArray[Any]], PrefixContext]:
    golden = golden_case(request.param)
    model = fast_model(request.param.split("_")[0])
    with torch.inference_mode():
        return model, golden, encode(model, golden_input(golden), golden["noise"].shape[1])


def assert_close(value: Tensor, golden: NDArray[Any]) -> None:
    np.testing.assert_allclose(value.numpy(), golden, rtol=0, atol=LIMIT)


@torch.inference_mode()
def test_prefix_embeddings(case: tuple[Pi0Model, dict[str, NDArray[Any]], PrefixContext]) -> None:
    model, golden, _ = case
    inputs = golden_input(golden)
    embeddings = model.prefix_embeddings(torch.tensor(inputs.images), torch.tensor(inputs.tokens))
    base = golden["siglip_tokens_base"]
    assert_close(embeddings[: len(base), : base.shape[1]], base)
    length = golden["tokens"].shape[1]
    if "prefix_embeddings" in golden:
        assert_close(embeddings, golden["prefix_embeddings"])
    else:
        assert_close(embeddings[:, -length:], golden["prefix_embeddings_text"])


def test_prefix_cache_holds_the_keys_and_values_of_valid_tokens(case: tuple[Pi0Model, dict[str, NDArray[Any]], PrefixContext]) -> None:
    _, golden, context = case
    valid = golden["prefix_mask"]
    for layer, place in ((context.cache[0], "first"), (context.cache[-1], "last")):
        for tensor, letter in ((layer.keys, "k"), (layer.values, "v")):
            name = f"kv_{letter}_{place}"
            if name not in golden:  # the batched cases have the last layer only
                continue
            expected = golden[name]
            stored = slice(valid.shape[1] - expected.shape[1], valid.shape[1])
            assert_close(tensor.transpose(1, 2)[:, stored][valid[:, stored]], expected[valid[:, stored]])


def test_masks_and_positions(case: tuple[Pi0Model, dict[str, NDArray[Any]], PrefixContext]) -> None:
    model, golden, context = case
    expected = rope(torch.tensor(golden["suffix_positions"]), model.heads.dim)
    torch.testing.assert_close(context.rope, expected, rtol=0, atol=0)
    valid = np.concatenate([golden["prefix_mask"], golden["suffix_mask"]], axis=1)
    blocks = np.cumsum(np.concatenate([golden["prefix_ar_mask"], golden["suffix_ar_mask"]]))
    may_see = (blocks[None, :] <= blocks[:, None])[None] & valid[:, None, :]
    suffix = golden["suffix_mask"].shape[1]
    groups = model.heads.queries // model.heads.keys
    folded = np.broadcast_to(context.mask.numpy() == 0, (len(valid), 1, suffix * groups, valid.shape[1]))
    np.testing.assert_array_equal(folded[:, 0, ::groups], may_see[:, -suffix:])
    np.testing.assert_array_equal(folded[:, 0, groups - 1 :: groups], may_see[:, -suffix:])


@torch.inference_mode()
def test_suffix_tokens_and_velocity_at_the_first_step(case: tuple[Pi0Model, dict[str, NDArray[Any]], PrefixContext]) -> None:
    model, golden, context = case
    first = model.condition(torch.tensor(golden["times_steps10"]))[0]
    noise = torch.tensor(golden["noise"])
    assert_close(model.suffix_tokens(noise, context.state_token, first), golden["suffix_tokens_t1"])
    assert_close(model.velocity(noise, context, first), golden["v_t1"])


def test_time_embedding(case: tuple[Pi0Model, dict[str, NDArray[Any]], PrefixContext]) -> None:
    model, golden, _ = case
    embedded = time_embedding(torch.tensor(golden["times_steps10"]), model.dims.expert.width)
    assert embedded.dtype == torch.float32
    assert_close(embedded, golden["time_embedding_steps10"])


@pytest.mark.parametrize("name", ODD_DIMS)
@torch.inference_mode()
def test_fast_and_plain_agree_at_every_size(name: str) -> None:
    dims = ODD_DIMS[name]
    plain = PlainModel(random_weights(dims), dims)
    model = from_weights(plain)
    inputs = random_input(dims, batch=3, length=9)
    x_t = torch.tensor(random_noise(dims, batch=3, horizon=6))
    times = torch.tensor([1.0, 0.35])
    context = encode(model, inputs, horizon=6)
    valid = plain.prefix(inputs)[1]
    for t, condition in zip(times, model.condition(times), strict=True):
        expected = plain.evaluate(inputs, x_t, float(t))
        velocity = model.velocity(x_t, context, condition)
        torch.testing.assert_close(velocity, expected.velocity, rtol=2e-5, atol=2e-5)
        for layer, keys, values in zip(context.cache, expected.keys, expected.values, strict=True):
            prefix = slice(0, valid.shape[1])
            torch.testing.assert_close(layer.keys.transpose(1, 2)[:, prefix][valid], keys[:, prefix][valid], rtol=2e-5, atol=2e-5)
            torch.testing.assert_close(layer.values.transpose(1, 2)[:, prefix][valid], values[:, prefix][valid], rtol=2e-5, atol=2e-5)
            suffix = slice(valid.shape[1], None)
            torch.testing.assert_close(layer.keys.transpose(1, 2)[:, suffix], keys[:, suffix], rtol=2e-5, atol=2e-5)


@given(groups=st.integers(1, 3), keys=st.integers(1, 3), tokens=st.integers(1, 4), length=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_folded_attention_is_grouped_attention(groups: int, keys: int, tokens: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads = HeadDims(groups * keys, keys, 4)
    q = torch.randn(2, tokens, heads.queries, heads.dim, generator=generator)
    k, v = (torch.randn(2, keys, length, heads.dim, generator=generator) for _ in range(2))
    mask = torch.rand(2, tokens, length, generator=generator) < 0.7
    mask[..., 0] = True
    expected = []
    for head in range(heads.queries):
        logits = q[:, :, head] @ k[:, head // groups].mT / heads.dim**0.5
        expected.append(logits.masked_fill(~mask, float("-inf")).softmax(-1) @ v[:, head // groups])
    torch.testing.assert_close(attend(q, k, v, fold_rows(mask, heads)), torch.cat(expected, dim=-1), rtol=1e-5, atol=1e-5)


def test_rotation_depends_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).unbind()

    def product(at: int, other: int) -> Tensor:
        return (rotate(q, rope(torch.tensor([[at]]), 8)) * rotate(k, rope(torch.tensor([[other]]), 8))).sum()

    torch.testing.assert_close(product(3, 10), product(40, 47), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(product(3, 10), product(3, 11), atol=1e-3)


def test_rotation_keeps_the_dtype_and_is_computed_in_float32() -> None:
    x = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    table = rope(torch.arange(900, 905)[None], 8)
    assert isinstance(table, Rope)
    assert table.cos.dtype == torch.float32
    rounded = rotate(x.bfloat16(), table)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded, rotate(x.bfloat16().float(), table).bfloat16(), rtol=0, atol=0)


def test_bfloat16_keeps_the_sensitive_parameters_in_float32() -> None:
    model = Pi0Model(ODD_DIMS["pi05, grouped heads"], dtype=torch.bfloat16)
    kept = {name for name, slot in model.slots().items() if slot.dtype == torch.float32}
    patterns = ("patch_embedding", "position_embedding", "input_layernorm", "post_attention_layernorm", "model.norm", "language_model.norm")
    top_level = ("action_in_proj", "action_out_proj", "time_mlp")
    assert kept == {name for name in model.slots() if any(p in name for p in patterns) or name.startswith(top_level)}
