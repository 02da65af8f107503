"""The demo's models before they have learnt anything: their size, and their first values."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from demo.training.tokenizer import VOCABULARY
from pi0.param_tree import ATTENTION, IMG, LLM, BackboneDims, ExpertDims, ModelDims, VisionDims, model_shapes

DIMS: Final = ModelDims(
    kind="pi05",
    backbone=BackboneDims(
        vision=VisionDims(width=96, depth=3, heads=3, head_dim=32, mlp_dim=256, patch=32, tokens=49),
        vlm=ExpertDims(width=128, mlp_dim=256),
        vocab_size=VOCABULARY,
        depth=4,
        heads=4,
        kv_heads=1,
        head_dim=32,
    ),
    expert=ExpertDims(width=96, mlp_dim=256),
    action_dim=3,
)
"""π0.5's architecture, a thousandth of its size."""

SCALE: Final = 4
"""The models are trained on pictures that are this much smaller: 56 instead of 224 pixels, in patches of 8 instead of 32."""

_OCTAVES = 7


def first_leaves(seed: int, numbers: dict[int, int]) -> dict[str, NDArray[np.float32]]:
    """A value for every leaf: matrices scaled by their fan-in, norms the identity, the action expert's adaptive norms closed (as openpi's).

    Args:
        numbers: token id → the number 0…255 that it stands for. Their embeddings are a smooth code of the number, so that near numbers look
            alike from the start.
    """
    rng = np.random.default_rng(seed)
    leaves: dict[str, NDArray[np.float32]] = {}
    for name, shape in model_shapes(DIMS).items():
        if _is_layer_norm_scale(name):
            leaves[name] = np.ones(shape, np.float32)
        elif name.endswith(("/scale", "/bias")) or "_norm_1/Dense_0" in name:
            leaves[name] = np.zeros(shape, np.float32)
        elif name.endswith("pos_embedding"):
            leaves[name] = rng.normal(0, 0.02, shape).astype(np.float32)
        else:
            leaves[name] = rng.normal(0, _fan_in(name, shape) ** -0.5, shape).astype(np.float32)
    embedding = leaves[f"{LLM}/embedder/input_embedding"]
    ids, values = np.array(list(numbers)), np.array(list(numbers.values()))
    embedding[ids] = _smooth_code(rng, values, embedding.shape[1])
    return leaves


def _is_layer_norm_scale(name: str) -> bool:
    return name.startswith(IMG) and name.endswith("/scale")


def _fan_in(name: str, shape: tuple[int, ...]) -> int:
    if name.endswith("input_embedding"):
        return shape[-1]  # times sqrt(width) it is of unit size
    if name == f"{IMG}/embedding/kernel":
        return shape[0] * shape[1] * shape[2]
    if name.startswith(ATTENTION) or "attn_vec_einsum" in name:
        # (…, heads, head dim, width) projects the heads back; (…, width, heads, head dim) projects into them.
        return shape[-3] * shape[-2] if name.endswith(("out/kernel", "/w")) else shape[-3]
    return shape[-2]


def _smooth_code(rng: np.random.Generator, values: NDArray[np.intp], width: int) -> NDArray[np.float32]:
    """``[n, width]``: sines and cosines of the values in octaves from half a turn over all of them, mixed at random."""
    angles = values[:, None] / 256 * np.pi * 2.0 ** np.arange(_OCTAVES)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    code: NDArray[np.float32] = (waves @ rng.normal(0, 1, (2 * _OCTAVES, width)) * (_OCTAVES * width) ** -0.5).astype(np.float32)
    return code
