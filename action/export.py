"""Converts a JAX (Orbax) checkpoint to openpi's ``model.safetensors``, adapters merged, every leaf accounted for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from action.checkpoint import SAFETENSORS_NAME
from action.orbax_reader import OrbaxTensors
from action.safetensors_reader import SIDECARS


def convert_to_safetensors(orbax_dir: Path, target_dir: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """``orbax_dir`` (a checkpoint root or its ``params/``) → ``target_dir/model.safetensors`` plus the head counts, which its shapes do not tell.

    The whole model is in memory once. Neither assets nor tokenizer are copied.

    Raises:
        CheckpointError: ``orbax_dir`` is not a pi0 or pi0.5 checkpoint.
    """
    source = OrbaxTensors(orbax_dir)
    tensors = {name: tensor.contiguous() for name, tensor in source.read(dict.fromkeys(source.shapes, dtype))}
    save_file(tensors, target_dir / SAFETENSORS_NAME)
    backbone = source.dims.backbone
    sidecar = {
        "vlm": {"num_heads": backbone.heads, "num_kv_heads": backbone.kv_heads, "head_dim": backbone.head_dim},
        "siglip": {"num_heads": backbone.vision.heads},
    }
    (target_dir / SIDECARS[0]).write_text(json.dumps(sidecar, indent=2) + "\n")
