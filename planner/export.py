"""Writes a parameter tree as an Orbax ``params/`` directory that openpi, openpi-flash and this project can restore."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint
from numpy.typing import NDArray

from pi0.param_tree import ATTENTION, BLOCK, IMG, LAYERS, LLM, BackboneDims
from planner.gemma import GemmaParams
from planner.siglip import SiglipParams


def write_params(directory: Path, leaves: Mapping[str, NDArray[np.floating[Any]]]) -> None:
    """``leaves`` (``/``-joined names, reference/model.md §8) → ``directory``, which must not exist yet.

    Raises:
        ValueError: ``directory`` exists.
    """
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *branches, leaf = name.split("/")
        at = tree
        for branch in branches:
            at = at.setdefault(branch, {})
        at[leaf] = value
    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(directory.resolve(), {"params": tree})
    committed = directory / "commit_success.txt"
    if committed.exists():
        # Orbax notes in it where it wrote, a path that means nothing on another machine; a reader asks only whether the file is there.
        committed.write_text(f"Checkpoint commit was successful to {directory.name}")


def backbone_leaves(vision: SiglipParams, language: GemmaParams, dims: BackboneDims) -> dict[str, NDArray[Any]]:
    """A planner's weights under the names and in the layout of a checkpoint: the inverse of :mod:`planner.restore`.

    A model with as many key/value heads as heads would be stored fused; no such planner is trained here.

    Raises:
        ValueError: there are as many key/value heads as heads.
    """
    if dims.heads == dims.kv_heads:
        raise ValueError(f"{dims.heads} heads with as many key/value heads: stored fused, which this cannot write")
    blocks, tower = language.blocks, vision.blocks
    layers, width, size = dims.depth, dims.vlm.width, dims.head_dim
    qkv = np.asarray(blocks.qkv).reshape(layers, width, dims.heads + 2 * dims.kv_heads, size).transpose(0, 2, 1, 3)
    query, key, value = np.split(qkv, [dims.heads, dims.heads + dims.kv_heads], axis=1)
    leaves: dict[str, Any] = {
        f"{LLM}/embedder/input_embedding": language.embedding,
        f"{LLM}/final_norm/scale": language.norm,
        f"{LAYERS}/pre_attention_norm/scale": blocks.norm_attention,
        f"{LAYERS}/pre_ffw_norm/scale": blocks.norm_mlp,
        f"{LAYERS}/attn/q_einsum/w": query,
        f"{LAYERS}/attn/kv_einsum/w": np.stack([key, value], axis=1),
        f"{LAYERS}/attn/attn_vec_einsum/w": np.asarray(blocks.out).reshape(layers, dims.heads, size, width),
        f"{LAYERS}/mlp/gating_einsum": np.stack([np.asarray(blocks.gate), np.asarray(blocks.up)], axis=1),
        f"{LAYERS}/mlp/linear": blocks.down,
        f"{IMG}/pos_embedding": vision.position,
    }
    for name, dense in (
        (f"{IMG}/embedding", vision.patch),
        (f"{IMG}/head", vision.head),
        (f"{ATTENTION}/query", tower.query),
        (f"{ATTENTION}/key", tower.key),
        (f"{ATTENTION}/value", tower.value),
        (f"{ATTENTION}/out", tower.out),
        (f"{BLOCK}/MlpBlock_0/Dense_0", tower.mlp_in),
        (f"{BLOCK}/MlpBlock_0/Dense_1", tower.mlp_out),
    ):
        leaves |= {f"{name}/kernel": dense.kernel, f"{name}/bias": dense.bias}
    for name, norm in (
        (f"{IMG}/Transformer/encoder_norm", vision.norm),
        (f"{BLOCK}/LayerNorm_0", tower.norm_attention),
        (f"{BLOCK}/LayerNorm_1", tower.norm_mlp),
    ):
        leaves |= {f"{name}/scale": norm.scale, f"{name}/bias": norm.bias}
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}
