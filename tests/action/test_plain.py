"""The plain path against openpi's intermediate results: it is the yardstick, so it is checked array by array."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from action.plain import PlainModel, PlainOutputs
from tests.action.synthetic import golden_case, golden_input
from tests.golden_data import CHECKPOINTS

LIMIT = 2e-4


@pytest.fixture(scope="module", params=["pi05", "pi0"])
def case(request: pytest.FixtureRequest) -> tuple[PlainModel, dict[str, NDArray[Any]], PlainOutputs]:
    model = PlainModel.load(CHECKPOINTS / f"{request.param}_orbax")
    golden = golden_case(f"{request.param}_b1_f32")
    return model, golden, model.evaluate(golden_input(golden), torch.tensor(golden["noise"]), 1.0)


def test_prefix_and_suffix_embeddings(case: tuple[PlainModel, dict[str, NDArray[Any]], PlainOutputs]) -> None:
    model, golden, outputs = case
    embeddings, mask = model.prefix(golden_input(golden))
    np.testing.assert_array_equal(mask.numpy(), golden["prefix_mask"])
    np.testing.assert_allclose(embeddings.numpy(), golden["prefix_embeddings"], rtol=0, atol=LIMIT)
    np.testing.assert_allclose(outputs.suffix_tokens.numpy(), golden["suffix_tokens_t1"], rtol=0, atol=LIMIT)
    if "adarms_cond_t1" in golden:
        assert outputs.condition is not None
        np.testing.assert_allclose(outputs.condition.numpy(), golden["adarms_cond_t1"], rtol=0, atol=LIMIT)
    else:
        assert outputs.condition is None


def test_time_embedding(case: tuple[PlainModel, dict[str, NDArray[Any]], PlainOutputs]) -> None:
    model, golden, _ = case
    embedded = np.stack([model.time_embedding(float(t)).numpy() for t in golden["times_steps10"]])
    np.testing.assert_allclose(embedded, golden["time_embedding_steps10"], rtol=0, atol=LIMIT)


def test_transformer_outputs(case: tuple[PlainModel, dict[str, NDArray[Any]], PlainOutputs]) -> None:
    _, golden, outputs = case
    valid = golden["prefix_mask"]
    length = valid.shape[1]
    for name, value in {
        "prefix_out": outputs.prefix_out,
        "kv_k_first": outputs.keys[0][:, :length],
        "kv_v_first": outputs.values[0][:, :length],
        "kv_k_last": outputs.keys[-1][:, :length],
        "kv_v_last": outputs.values[-1][:, :length],
    }.items():
        np.testing.assert_allclose(value.numpy()[valid], golden[name][valid], rtol=0, atol=LIMIT, err_msg=name)
    np.testing.assert_allclose(outputs.suffix_out.numpy(), golden["suffix_out_t1"], rtol=0, atol=LIMIT)
    np.testing.assert_allclose(outputs.velocity.numpy(), golden["v_t1"], rtol=0, atol=LIMIT)


def test_actions(case: tuple[PlainModel, dict[str, NDArray[Any]], PlainOutputs]) -> None:
    model, golden, _ = case
    for steps in (5, 10):
        actions = model.sample(golden_input(golden), golden["noise"], steps)
        np.testing.assert_allclose(actions, golden[f"actions_steps{steps}"], rtol=0, atol=LIMIT)
