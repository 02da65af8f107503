"""Models of odd sizes with random weights, their inputs, and checkpoints of them; and the golden model cases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from action.model import state_dict_shapes
from action.sampler import ModelInput
from pi0.cameras import MODEL_CAMERAS
from pi0.param_tree import BackboneDims, ExpertDims, ModelDims, VisionDims
from tests.golden_data import CHECKPOINTS, GOLDEN

CPU = torch.device("cpu")
PI05_CHECKPOINTS = tuple(CHECKPOINTS / f"pi05_{form}" for form in ("orbax", "orbax_bf16_sharded", "pytorch", "lerobot"))
PI0_CHECKPOINTS = tuple(CHECKPOINTS / f"pi0_{form}" for form in ("orbax", "pytorch"))

ODD_DIMS: dict[str, ModelDims] = {
    # Width ≠ heads × head size everywhere; several query heads on each of several key/value heads.
    "pi05, grouped heads": ModelDims(
        kind="pi05",
        backbone=BackboneDims(VisionDims(40, 2, 5, 6, 24, 32, 49), ExpertDims(36, 50), 77, depth=3, heads=6, kv_heads=2, head_dim=10),
        expert=ExpertDims(26, 30),
        action_dim=7,
    ),
    "pi0, as many key/value heads as heads": ModelDims(
        kind="pi0",
        backbone=BackboneDims(VisionDims(20, 1, 1, 20, 16, 28, 64), ExpertDims(30, 22), 33, depth=2, heads=3, kv_heads=3, head_dim=14),
        expert=ExpertDims(24, 18),
        action_dim=5,
    ),
    # Patches of 45 pixels leave a border that the tower does not see.
    "pi0, one layer": ModelDims(
        kind="pi0",
        backbone=BackboneDims(VisionDims(16, 3, 2, 8, 20, 45, 16), ExpertDims(18, 26), 50, depth=1, heads=5, kv_heads=1, head_dim=6),
        expert=ExpertDims(32, 14),
        action_dim=3,
    ),
    "pi05, one head": ModelDims(
        kind="pi05",
        backbone=BackboneDims(VisionDims(12, 1, 3, 4, 20, 56, 16), ExpertDims(14, 26), 21, depth=2, heads=1, kv_heads=1, head_dim=4),
        expert=ExpertDims(10, 14),
        action_dim=9,
    ),
}


def golden_case(name: str) -> dict[str, NDArray[Any]]:
    with np.load(GOLDEN / "model" / f"{name}.npz") as case:
        return dict(case)


def golden_input(case: Mapping[str, NDArray[Any]]) -> ModelInput:
    return ModelInput(
        images=np.stack([case[f"image/{camera}"] for camera in MODEL_CAMERAS], axis=1),
        image_masks=np.stack([case[f"image_mask/{camera}"] for camera in MODEL_CAMERAS], axis=1),
        tokens=case["tokens"],
        token_mask=case["token_mask"],
        state=case["state"],
    )


def rows(inputs: ModelInput, index: slice) -> ModelInput:
    """Some rows of a batch."""
    return ModelInput(*(getattr(inputs, name)[index] for name in ("images", "image_masks", "tokens", "token_mask", "state")))


def random_weights(dims: ModelDims, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of an openpi ``state_dict``, random, none of them trivially zero."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in state_dict_shapes(dims).items():
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 and "embed" not in name else 4
        weights[name] = torch.randn(shape, generator=generator) / fan_in**0.5
    return weights


def random_input(dims: ModelDims, *, batch: int, length: int, seed: int = 0) -> ModelInput:
    """Random images, prompts of different lengths, and different cameras masked in every row."""
    rng = np.random.default_rng(seed)
    valid = rng.integers(1, length, size=batch)
    masks = np.array([[True, row % 2 == 0, row % 3 != 0] for row in range(batch)])
    return ModelInput(
        images=rng.integers(0, 256, size=(batch, 3, 224, 224, 3), dtype=np.uint8),
        image_masks=masks,
        tokens=rng.integers(0, dims.backbone.vocab_size, size=(batch, length), dtype=np.int32),
        token_mask=np.arange(length) < valid[:, None],
        state=rng.standard_normal((batch, dims.action_dim), dtype=np.float32),
    )


def random_noise(dims: ModelDims, *, batch: int, horizon: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((batch, horizon, dims.action_dim), dtype=np.float32)


def head_counts(dims: ModelDims) -> dict[str, Any]:
    """What a ``model_dims.json`` says."""
    b = dims.backbone
    return {"vlm": {"num_heads": b.heads, "num_kv_heads": b.kv_heads, "head_dim": b.head_dim}, "siglip": {"num_heads": b.vision.heads}}


def write_safetensors(directory: Path, weights: Mapping[str, Tensor], heads: Mapping[str, Any] | None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), str(directory / "model.safetensors"))
    if heads is not None:
        (directory / "model_dims.json").write_text(json.dumps(heads))
    return directory
