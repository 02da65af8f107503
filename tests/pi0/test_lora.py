"""``pi0.lora``: merged weights act as the adapted layer does (formulas of reference/model.md §4.9)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from pi0.errors import CheckpointError
from pi0.lora import LoraMerged

L, B, T, N, K, D, H, F, R = 2, 3, 4, 3, 2, 10, 6, 7, 2
RNG = np.random.default_rng(3)


class Memory:
    """Leaves in memory."""

    def __init__(self, leaves: dict[str, NDArray[Any]]) -> None:
        self.leaves = leaves

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaves)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: value.shape for name, value in self.leaves.items()}

    def read(self, name: str, dtype: np.dtype[Any] | None = None) -> NDArray[Any]:
        return self.leaves[name].astype(dtype or self.leaves[name].dtype)


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape, dtype=np.float32)


def adapted(stem: str, shape: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    """A weight and its adapter: ``stem`` is ``…/q_einsum/`` for einsum layers, ``…/linear_`` for the feed-forward ones."""
    weight = stem + "w" if stem.endswith("/") else stem.rstrip("_")
    return {weight: normal(*shape), stem + "lora_a": normal(*shape[:-1], R), stem + "lora_b": normal(*shape[:-2], R, shape[-1])}


@pytest.mark.parametrize(
    ("stem", "shape", "subscripts"),
    [
        # The adapted layer computes base + (x·a)·b with these einsums (weight, a, b), one layer at a time.
        ("attn/q_einsum/", (L, N, D, H), ("BTD,NDH->BTNH", "BTD,NDL->BTNL", "BTNL,NLH->BTNH")),
        ("attn/kv_einsum_1/", (L, 2, K, D, H), ("BTD,CKDH->CBTKH", "BTD,CKDL->CBTKL", "CBTKL,CKLH->CBTKH")),
        ("attn/attn_vec_einsum/", (L, N, H, D), ("BTNH,NHD->BTD", "BTNH,NHL->BTL", "BTL,NLD->BTD")),
        ("mlp/gating_einsum_", (L, 2, D, F), ("BTD,CDF->CBTF", "BTD,CDL->CBTL", "CBTL,CLF->CBTF")),
        ("mlp_1/linear_", (L, F, D), ("BTF,FD->BTD", "BTF,FL->BTL", "BTL,LD->BTD")),
    ],
)
def test_a_merged_weight_acts_as_weight_and_adapter(stem: str, shape: tuple[int, ...], subscripts: tuple[str, str, str]) -> None:
    leaves = adapted(stem, shape)
    weight, down, up = leaves
    merged = LoraMerged(Memory(leaves))
    assert list(merged) == [weight]
    assert merged.merged_leaves == (weight,)
    assert merged.shapes() == {weight: shape}
    value = merged.read(weight)
    base, first, second = subscripts
    sizes = {"B": B, "T": T, "N": N, "H": H, "D": D, "F": F}
    for layer in range(L):
        x = normal(*(sizes[axis] for axis in base.split(",")[0]))
        expected = np.einsum(base, x, leaves[weight][layer]) + np.einsum(second, np.einsum(first, x, leaves[down][layer]), leaves[up][layer])
        np.testing.assert_allclose(np.einsum(base, x, value[layer]), expected, rtol=0, atol=2e-4)


def test_the_merge_is_done_in_float32_and_cast_once() -> None:
    leaves = {name: value.astype(ml_dtypes.bfloat16) for name, value in adapted("mlp/linear_", (L, F, D)).items()}
    exact = LoraMerged(Memory(leaves)).read("mlp/linear")
    assert exact.dtype == np.float32
    rounded = LoraMerged(Memory(leaves)).read("mlp/linear", np.dtype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(rounded, exact.astype(ml_dtypes.bfloat16))


def test_leaves_without_an_adapter_pass_through() -> None:
    leaves = adapted("attn/q_einsum/", (L, N, D, H)) | {"final_norm/scale": normal(D).astype(ml_dtypes.bfloat16)}
    merged = LoraMerged(Memory(leaves))
    assert list(merged) == ["attn/q_einsum/w", "final_norm/scale"]
    assert merged.read("final_norm/scale").dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(merged.read("final_norm/scale"), leaves["final_norm/scale"])


@pytest.mark.parametrize("missing", ["attn/q_einsum/w", "attn/q_einsum/lora_a", "attn/q_einsum/lora_b"])
def test_an_incomplete_adapter_is_an_error(missing: str) -> None:
    leaves = adapted("attn/q_einsum/", (L, N, D, H))
    del leaves[missing]
    with pytest.raises(CheckpointError, match=r"LoRA leaf attn/q_einsum/lora_[ab] is incomplete: attn/q_einsum/w, .* must all be present"):
        LoraMerged(Memory(leaves))


@pytest.mark.parametrize(
    ("leaf", "shape"), [("lora_a", (L, N, D + 1, R)), ("lora_b", (L, N, R, H + 1)), ("lora_b", (L, N, R + 1, H)), ("lora_a", ())]
)
def test_an_adapter_that_does_not_fit_is_an_error(leaf: str, shape: tuple[int, ...]) -> None:
    leaves = adapted("attn/q_einsum/", (L, N, D, H))
    leaves[f"attn/q_einsum/{leaf}"] = normal(*shape)
    with pytest.raises(CheckpointError, match=r"LoRA leaves of attn/q_einsum/w \(2, 3, 10, 6\) do not fit it"):
        LoraMerged(Memory(leaves))
