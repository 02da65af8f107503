"""The sampler against openpi's actions, from every checkpoint format, and against itself in other batches and lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from action.checkpoint import load_model
from action.model import Pi0Model
from action.plain import PlainModel
from action.sampler import FlowSampler, ModelInput, flow_times
from tests.action.synthetic import (
    CPU,
    ODD_DIMS,
    PI0_CHECKPOINTS,
    PI05_CHECKPOINTS,
    golden_case,
    golden_input,
    head_counts,
    random_input,
    random_noise,
    random_weights,
    rows,
    write_safetensors,
)

FLOAT32_LIMIT = 2e-4
BFLOAT16_MAX, BFLOAT16_RMS = 0.15, 0.03
CHECKPOINT_PATHS = [pytest.param(path, id=path.name) for path in (*PI05_CHECKPOINTS, *PI0_CHECKPOINTS)]


@functools.cache
def loaded(path: Path, dtype: torch.dtype = torch.float32) -> Pi0Model:
    return load_model(path, dtype=dtype, device=CPU)


def kind(path: Path) -> str:
    return path.name.split("_")[0]


@pytest.mark.parametrize("path", CHECKPOINT_PATHS)
@pytest.mark.parametrize("batch", ["b1", "b3"])
@pytest.mark.parametrize("steps", [5, 10])
def test_float32_actions(path: Path, batch: str, steps: int) -> None:
    golden = golden_case(f"{kind(path)}_{batch}_f32")
    actions = FlowSampler(loaded(path), num_steps=steps).sample(golden_input(golden), golden["noise"])
    assert actions.dtype == np.float32
    for name in (f"actions_steps{steps}", f"actions_steps{steps}_torch"):
        np.testing.assert_allclose(actions, golden[name], rtol=0, atol=FLOAT32_LIMIT, err_msg=name)


@pytest.mark.parametrize("path", CHECKPOINT_PATHS)
@pytest.mark.parametrize("steps", [5, 10])
def test_bfloat16_actions(path: Path, steps: int) -> None:
    golden = golden_case(f"{kind(path)}_b1_bf16")
    actions = FlowSampler(loaded(path, torch.bfloat16), num_steps=steps).sample(golden_input(golden), golden["noise"])
    names = [f"actions_steps{steps}", f"actions_steps{steps}_torch"] + (["actions_steps10_float32"] if steps == 10 else [])
    for name in names:
        error = actions - golden[name]
        assert np.abs(error).max() <= BFLOAT16_MAX, name
        assert np.sqrt(np.mean(error**2)) <= BFLOAT16_RMS, name


@pytest.mark.parametrize("steps", [5, 10])
def test_times_are_the_reference_s_bit_for_bit(steps: int) -> None:
    np.testing.assert_array_equal(flow_times(steps), golden_case("pi0_b1_f32")[f"times_steps{steps}"])


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_times_run_from_one_in_equal_steps(steps: int) -> None:
    np.testing.assert_allclose(flow_times(steps), 1 - np.arange(steps) / steps, atol=1e-5)


@pytest.mark.parametrize("name", ["pi05_b3_f32", "pi0_b3_f32"])
def test_a_batch_is_its_rows(name: str) -> None:
    golden = golden_case(name)
    inputs, noise = golden_input(golden), golden["noise"]
    sampler = FlowSampler(loaded(PI05_CHECKPOINTS[0] if name.startswith("pi05") else PI0_CHECKPOINTS[0]))
    together = sampler.sample(inputs, noise)
    for row in range(3):
        one = slice(row, row + 1)
        np.testing.assert_allclose(sampler.sample(rows(inputs, one), noise[one]), together[one], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["pi05_b1_f32", "pi0_b1_f32"])
def test_the_padded_prompt_length_does_not_matter(name: str) -> None:
    golden = golden_case(name)
    inputs, noise = golden_input(golden), golden["noise"]
    sampler = FlowSampler(loaded(PI05_CHECKPOINTS[0] if name.startswith("pi05") else PI0_CHECKPOINTS[0]))
    shortest = int(inputs.token_mask.sum())
    padded = sampler.sample(inputs, noise)
    for length in (shortest, shortest + 1):
        cut = replace(inputs, tokens=inputs.tokens[:, :length], token_mask=inputs.token_mask[:, :length])
        np.testing.assert_allclose(sampler.sample(cut, noise), padded, rtol=0, atol=2e-5)


@pytest.mark.parametrize("masks", [[True, False, True], [False, True, False], [False, False, False]])
def test_what_a_masked_camera_shows_does_not_matter(masks: list[bool]) -> None:
    golden = golden_case("pi05_b1_f32")
    inputs = replace(golden_input(golden), image_masks=np.array([masks]))
    sampler = FlowSampler(loaded(PI05_CHECKPOINTS[0]), num_steps=3)
    blacked = inputs.images.copy()
    blacked[:, [not mask for mask in masks]] = 0
    expected = sampler.sample(inputs, golden["noise"])
    np.testing.assert_array_equal(sampler.sample(replace(inputs, images=blacked), golden["noise"]), expected)
    unmasked = replace(inputs, image_masks=np.ones((1, 3), dtype=np.bool_))
    assert np.abs(sampler.sample(unmasked, golden["noise"]) - expected).max() > 1e-2


@pytest.mark.parametrize("name", ODD_DIMS)
@pytest.mark.parametrize("steps", [1, 4])
def test_fast_and_plain_sampling_agree_at_every_size(name: str, steps: int, tmp_path: Path) -> None:
    dims = ODD_DIMS[name]
    directory = write_safetensors(tmp_path, random_weights(dims), head_counts(dims))
    inputs, noise = random_input(dims, batch=2, length=11), random_noise(dims, batch=2, horizon=5)
    actions = FlowSampler(load_model(directory, dtype=torch.float32, device=CPU), num_steps=steps).sample(inputs, noise)
    np.testing.assert_allclose(actions, PlainModel.load(directory).sample(inputs, noise, steps), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["pi05_b1_f32", "pi0_b3_f32"])
def test_the_model_is_one_graph_with_static_shapes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``torch.compile`` is given must trace without a break and be the same program for every step, its cache writes included."""
    compiled: list[Any] = []
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def compile_for_test(function: Callable[..., Any], *, mode: str, **options: Any) -> Any:
        compiled.append((mode, options["fullgraph"], options["dynamic"]))
        return torch_compile(function, backend=backend, **options)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_for_test)
    torch.compiler.reset()
    golden = golden_case(name)
    sampler = FlowSampler(loaded(PI05_CHECKPOINTS[0] if name.startswith("pi05") else PI0_CHECKPOINTS[0]), compile_mode="max-autotune")
    for _ in range(2):
        actions = sampler.sample(golden_input(golden), golden["noise"])
        np.testing.assert_allclose(actions, golden["actions_steps10"], rtol=0, atol=FLOAT32_LIMIT)
    assert compiled == [("max-autotune", True, False)] * 2
    assert len(graphs) == 2, "one graph for the prefix and one for all steps"
    torch.compiler.reset()


def test_inputs_are_not_modified_and_may_be_read_only() -> None:
    golden = golden_case("pi0_b1_f32")
    inputs, noise = golden_input(golden), golden["noise"].copy()
    for array in (inputs.images, inputs.image_masks, inputs.tokens, inputs.token_mask, inputs.state, noise):
        array.flags.writeable = False
    sampler = FlowSampler(loaded(PI0_CHECKPOINTS[0]), num_steps=2)
    np.testing.assert_array_equal(sampler.sample(inputs, noise), sampler.sample(inputs, noise))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((1, 3, 224, 224, 3), np.float32)}, r"images is float32 \[1, 3, 224, 224, 3\], expected uint8 \[1, 3, 224, 224, 3\]"),
        ({"images": np.zeros((1, 3, 3, 224, 224), np.uint8)}, r"images is uint8 \[1, 3, 3, 224, 224\], expected uint8 \[1, 3, 224, 224, 3\]"),
        ({"token_mask": np.ones((1, 47), np.bool_)}, r"token_mask is bool \[1, 47\], expected bool \[1, 48\]"),
        ({"state": np.zeros((1, 14), np.float32)}, r"state is float32 \[1, 14\], expected float32 \[1, 32\]"),
        ({"tokens": np.full((1, 48), 1024, np.int32)}, "tokens hold ids 1024 to 1024, but the model's vocabulary has 1024"),
        ({"tokens": np.full((1, 48), -1, np.int32)}, "tokens hold ids -1 to -1"),
        ({"noise": np.zeros((12, 32), np.float32)}, r"noise is float32 \[12, 32\], expected float32 \[1, horizon, 32\]"),
        ({"noise": np.zeros((1, 12, 31), np.float32)}, r"noise is float32 \[1, 12, 31\], expected float32 \[1, 12, 32\]"),
        ({"noise": np.zeros((1, 12, 32))}, r"noise is float64 \[1, 12, 32\], expected float32 \[1, 12, 32\]"),
    ],
)
def test_inputs_of_the_wrong_shape_or_dtype_are_named(change: dict[str, NDArray[Any]], message: str) -> None:
    golden = golden_case("pi0_b1_f32")
    inputs: ModelInput = replace(golden_input(golden), **{name: value for name, value in change.items() if name != "noise"})
    noise = change.get("noise", golden["noise"])
    with pytest.raises(ValueError, match=message):
        FlowSampler(loaded(PI0_CHECKPOINTS[0])).sample(inputs, noise)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="num_steps is 0, expected at least 1"):
        FlowSampler(loaded(PI0_CHECKPOINTS[0]), num_steps=0)
    with pytest.raises(ValueError, match="compile_mode is 'fast', expected None or one of default, reduce-overhead"):
        FlowSampler(loaded(PI0_CHECKPOINTS[0]), compile_mode="fast")
