"""The JAX → PyTorch layout table at sizes where a wrong reshape shows: the tensors act as the einsums of reference/model.md §4.5."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from action.orbax_reader import OrbaxTensors
from pi0.errors import CheckpointError
from pi0.param_tree import ATTENTION, BLOCK, IMG, LAYERS, LLM
from tests.action.synthetic import ODD_DIMS
from tests.golden_data import CHECKPOINTS
from tests.pi0.orbax_files import random_tree, write_orbax

VLM = "paligemma_with_expert.paligemma.model"
TOWER = f"{VLM}.vision_tower.vision_model"
EXPERTS = {"": f"{VLM}.language_model", "_1": "paligemma_with_expert.gemma_expert.model"}


def read_all(source: OrbaxTensors, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = list(source.read(dict.fromkeys(source.shapes, dtype)))
    assert len({name for name, _ in tensors}) == len(tensors), "a tensor came twice"
    return {name: tensor.clone() for name, tensor in tensors}


@pytest.mark.parametrize("name", ODD_DIMS)
def test_every_tensor_acts_as_its_jax_leaf(name: str, tmp_path: Path) -> None:
    dims = ODD_DIMS[name]
    tree = random_tree(dims)
    leaf = {path: torch.from_numpy(value) for path, value in tree.items()}
    source = OrbaxTensors(write_orbax(tmp_path / "params", tree))
    assert source.dims == dims
    tensors = read_all(source)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(source.shapes)

    def close(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    backbone, layer = dims.backbone, dims.backbone.depth - 1
    for suffix, torch_name in EXPERTS.items():
        at = f"{torch_name}.layers.{layer}."
        x = torch.randn(2, 3, (backbone.vlm if suffix == "" else dims.expert).width)
        attended = torch.randn(2, 3, backbone.heads, backbone.head_dim)
        if backbone.heads == backbone.kv_heads:
            q, k, v = torch.einsum("btd,cndh->cbtnh", x, leaf[f"{LAYERS}/attn/qkv_einsum{suffix}/w"][layer])
        else:
            q = torch.einsum("btd,ndh->btnh", x, leaf[f"{LAYERS}/attn/q_einsum{suffix}/w"][layer])
            k, v = torch.einsum("btd,ckdh->cbtkh", x, leaf[f"{LAYERS}/attn/kv_einsum{suffix}/w"][layer])
        for letter, expected in zip("qkv", (q, k, v), strict=True):
            close(F.linear(x, tensors[f"{at}self_attn.{letter}_proj.weight"]), expected.flatten(2))
        out = torch.einsum("btnh,nhd->btd", attended, leaf[f"{LAYERS}/attn/attn_vec_einsum{suffix}/w"][layer])
        close(F.linear(attended.flatten(2), tensors[f"{at}self_attn.o_proj.weight"]), out)
        gate, up = torch.einsum("btd,cdf->cbtf", x, leaf[f"{LAYERS}/mlp{suffix}/gating_einsum"][layer])
        close(F.linear(x, tensors[f"{at}mlp.gate_proj.weight"]), gate)
        close(F.linear(x, tensors[f"{at}mlp.up_proj.weight"]), up)
        close(F.linear(gate, tensors[f"{at}mlp.down_proj.weight"]), gate @ leaf[f"{LAYERS}/mlp{suffix}/linear"][layer])

    vision = backbone.vision
    at = f"{TOWER}.encoder.layers.{vision.depth - 1}."
    x, attended = torch.randn(2, 3, vision.width), torch.randn(2, 3, vision.heads, vision.head_dim)
    for long in ("query", "key", "value"):
        expected = torch.einsum("btd,dnh->btnh", x, leaf[f"{ATTENTION}/{long}/kernel"][-1]) + leaf[f"{ATTENTION}/{long}/bias"][-1]
        projection = f"{at}self_attn.{long[0]}_proj"
        close(F.linear(x, tensors[f"{projection}.weight"], tensors[f"{projection}.bias"]), expected.flatten(2))
    close(
        F.linear(attended.flatten(2), tensors[f"{at}self_attn.out_proj.weight"]),
        torch.einsum("btnh,nhd->btd", attended, leaf[f"{ATTENTION}/out/kernel"][-1]),
    )
    for index in (0, 1):
        close(tensors[f"{at}mlp.fc{index + 1}.weight"].T, leaf[f"{BLOCK}/MlpBlock_0/Dense_{index}/kernel"][-1])
        close(tensors[f"{at}layer_norm{index + 1}.weight"], leaf[f"{BLOCK}/LayerNorm_{index}/scale"][-1])
    patch = torch.randn(1, 3, vision.patch, vision.patch)
    patched = F.conv2d(patch, tensors[f"{TOWER}.embeddings.patch_embedding.weight"]).flatten()
    close(patched, torch.einsum("bchw,hwcd->d", patch, leaf[f"{IMG}/embedding/kernel"]))
    close(tensors[f"{EXPERTS['']}.embed_tokens.weight"], leaf[f"{LLM}/embedder/input_embedding"])
    close(tensors["action_out_proj.weight"].T, leaf["action_out_proj/kernel"])


def test_values_are_cast_while_they_are_read() -> None:
    source = OrbaxTensors(CHECKPOINTS / "pi0_orbax")
    exact, rounded = read_all(source), read_all(source, torch.bfloat16)
    for name, tensor in exact.items():
        assert rounded[name].dtype == torch.bfloat16
        torch.testing.assert_close(rounded[name], tensor.bfloat16(), rtol=0, atol=0)


def test_a_tree_that_is_no_policy_says_where_it_is(tmp_path: Path) -> None:
    params = write_orbax(tmp_path / "params", {"PaliGemma/llm/final_norm/scale": np.zeros(4, np.float32)})
    with pytest.raises(CheckpointError) as caught:
        OrbaxTensors(tmp_path)
    assert str(caught.value).startswith(f"{params}: the checkpoint has no action expert")


def test_only_what_is_wanted_is_read() -> None:
    source = OrbaxTensors(CHECKPOINTS / "pi0_orbax")
    wanted = {"action_in_proj.bias": torch.float32, f"{EXPERTS['']}.layers.1.self_attn.v_proj.weight": torch.float32}
    assert {name for name, _ in source.read(wanted)} == set(wanted)


def test_lora_adapters_are_merged_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dims = ODD_DIMS["pi05, grouped heads"]
    tree = random_tree(dims)
    backbone, rank = dims.backbone, 2
    rng = np.random.default_rng(0)
    shape = (backbone.depth, backbone.heads, dims.expert.width)
    stem = f"{LAYERS}/attn/q_einsum_1"
    adapter = {
        f"{stem}/lora_a": rng.standard_normal((*shape, rank), dtype=np.float32),
        f"{stem}/lora_b": rng.standard_normal((*shape[:2], rank, backbone.head_dim), dtype=np.float32),
    }
    with caplog.at_level("INFO"):
        adapted = read_all(OrbaxTensors(write_orbax(tmp_path / "adapted", tree | adapter)))
    assert f"Merging LoRA adapters of 1 weights: {stem}/w" in caplog.text
    merged = tree | {f"{stem}/w": tree[f"{stem}/w"] + adapter[f"{stem}/lora_a"] @ adapter[f"{stem}/lora_b"]}
    expected = read_all(OrbaxTensors(write_orbax(tmp_path / "merged", merged)))
    for name, tensor in expected.items():
        torch.testing.assert_close(adapted[name], tensor, rtol=1e-6, atol=1e-6)
