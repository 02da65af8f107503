"""Writes a model in memory: openpi's ``model.safetensors``, and the vision tower as a JAX checkpoint's leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from action.checkpoint import SAFETENSORS_NAME
from action.model import Pi0Model
from action.safetensors_reader import SIDECARS
from pi0.param_tree import ATTENTION, BLOCK, IMG, ModelDims


def save_model(model: Pi0Model, target_dir: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """A model in memory → ``target_dir/model.safetensors`` plus the head counts. What a policy never reads is written as zeros."""
    tensors = {name: (torch.zeros(slot.shape) if slot.is_meta else slot.detach()).to(dtype) for name, slot in model.slots().items()}
    _write(tensors, model.dims, target_dir)


def tower_leaves(model: Pi0Model) -> dict[str, NDArray[np.float32]]:
    """The vision tower of ``model`` with the projection behind it, under the names and in the layout of a JAX checkpoint (reference/model.md §8)."""
    tower, dims = model.vision, model.dims.backbone.vision
    heads = (dims.heads, dims.head_dim)

    def stacked(*tensors: torch.Tensor) -> NDArray[np.float32]:
        return torch.stack(tensors).detach().float().numpy()

    leaves = {
        f"{IMG}/embedding/kernel": stacked(tower.patch_embedding.weight.T.unflatten(0, (tower.patch, tower.patch, 3)))[0],
        f"{IMG}/embedding/bias": stacked(tower.patch_embedding.bias)[0],
        f"{IMG}/pos_embedding": stacked(tower.position_embedding),
        f"{IMG}/Transformer/encoder_norm/scale": stacked(tower.final_norm.weight)[0],
        f"{IMG}/Transformer/encoder_norm/bias": stacked(tower.final_norm.bias)[0],
        f"{IMG}/head/kernel": stacked(tower.projector.weight.T)[0],
        f"{IMG}/head/bias": stacked(tower.projector.bias)[0],
        f"{ATTENTION}/out/kernel": stacked(*(block.out.weight.T.unflatten(0, heads) for block in tower.blocks)),
        f"{ATTENTION}/out/bias": stacked(*(block.out.bias for block in tower.blocks)),
    }
    for index, name in enumerate(("query", "key", "value")):
        leaves[f"{ATTENTION}/{name}/kernel"] = stacked(*(block.qkv.weight.chunk(3)[index].T.unflatten(1, heads) for block in tower.blocks))
        leaves[f"{ATTENTION}/{name}/bias"] = stacked(*(block.qkv.bias.chunk(3)[index].unflatten(0, heads) for block in tower.blocks))
    for index, name in enumerate(("fc1", "fc2")):
        layers = [getattr(block, name) for block in tower.blocks]
        leaves[f"{BLOCK}/MlpBlock_0/Dense_{index}/kernel"] = stacked(*(layer.weight.T for layer in layers))
        leaves[f"{BLOCK}/MlpBlock_0/Dense_{index}/bias"] = stacked(*(layer.bias for layer in layers))
    for index, name in enumerate(("attention_norm", "mlp_norm")):
        norms = [getattr(block, name) for block in tower.blocks]
        leaves[f"{BLOCK}/LayerNorm_{index}/scale"] = stacked(*(norm.weight for norm in norms))
        leaves[f"{BLOCK}/LayerNorm_{index}/bias"] = stacked(*(norm.bias for norm in norms))
    return leaves


def _write(tensors: Mapping[str, torch.Tensor], dims: ModelDims, target_dir: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target_dir / SAFETENSORS_NAME)
    backbone = dims.backbone
    sidecar = {
        "vlm": {"num_heads": backbone.heads, "num_kv_heads": backbone.kv_heads, "head_dim": backbone.head_dim},
        "siglip": {"num_heads": backbone.vision.heads},
    }
    (target_dir / SIDECARS[0]).write_text(json.dumps(sidecar, indent=2) + "\n")
