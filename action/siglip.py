"""The SigLIP vision tower with PaliGemma's projection (reference/model.md §2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi0.param_tree import VisionDims

LAYER_NORM_EPSILON = 1e-6


class VisionBlock(nn.Module):
    """One pre-LayerNorm transformer layer without a mask."""

    def __init__(self, dims: VisionDims, dtype: torch.dtype) -> None:
        super().__init__()

        def linear(fan_in: int, fan_out: int) -> nn.Linear:
            return nn.Linear(fan_in, fan_out, dtype=dtype, device="meta")

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(dims.width, eps=LAYER_NORM_EPSILON, dtype=dtype, device="meta")

        self.heads = dims.heads
        self.attention_norm = norm()
        self.qkv = linear(dims.width, 3 * dims.heads * dims.head_dim)
        self.out = linear(dims.heads * dims.head_dim, dims.width)
        self.mlp_norm = norm()
        self.fc1 = linear(dims.width, dims.mlp_dim)
        self.fc2 = linear(dims.mlp_dim, dims.width)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[images, tokens, width]`` after this layer."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x)), approximate="tanh"))
        return x

    def slots(self) -> dict[str, Tensor]:
        """Where each tensor of openpi's layer goes: name → view into a parameter."""
        slots: dict[str, Tensor] = {}
        for name, weight, bias in zip("qkv", self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True):
            slots |= {f"self_attn.{name}_proj.weight": weight, f"self_attn.{name}_proj.bias": bias}
        for name, module in (
            ("self_attn.out_proj", self.out),
            ("layer_norm1", self.attention_norm),
            ("layer_norm2", self.mlp_norm),
            ("mlp.fc1", self.fc1),
            ("mlp.fc2", self.fc2),
        ):
            slots |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
        return slots


class VisionTower(nn.Module):
    """uint8 images → image tokens of the language model's width. Patches and positions are float32 in every dtype mode."""

    def __init__(self, dims: VisionDims, out_width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch = dims.patch
        self.grid = math.isqrt(dims.tokens)
        self.dtype = dtype
        self.patch_embedding = nn.Linear(3 * dims.patch**2, dims.width, dtype=torch.float32, device="meta")
        self.position_embedding = nn.Parameter(torch.empty(dims.tokens, dims.width, dtype=torch.float32, device="meta"))
        self.blocks = cast("Sequence[VisionBlock]", nn.ModuleList(VisionBlock(dims, dtype) for _ in range(dims.depth)))
        self.final_norm = nn.LayerNorm(dims.width, eps=LAYER_NORM_EPSILON, dtype=dtype, device="meta")
        self.projector = nn.Linear(dims.width, out_width, dtype=dtype, device="meta")

    def forward(self, images: Tensor) -> Tensor:
        """``images`` uint8 ``[images, 224, 224, 3]`` (RGB) → ``[images, tokens, out_width]``."""
        side = self.grid * self.patch
        pixels = images[:, :side, :side].float() / 255.0 * 2.0 - 1.0
        # A convolution whose stride is its kernel size is a matrix product over the flattened patches.
        patches = pixels.unflatten(2, (self.grid, self.patch)).unflatten(1, (self.grid, self.patch)).transpose(2, 3).flatten(3).flatten(1, 2)
        x = (self.patch_embedding(patches) + self.position_embedding).to(self.dtype)
        for block in self.blocks:
            x = block(x)
        projected: Tensor = self.projector(self.final_norm(x))
        return projected

    def slots(self) -> dict[str, Tensor]:
        """Where each tensor of openpi's tower goes, projector included: name below ``paligemma.model`` → view into a parameter."""
        tower = "vision_tower.vision_model"
        slots: dict[str, Tensor] = {
            f"{tower}.embeddings.patch_embedding.weight": self.patch_embedding.weight.unflatten(1, (self.patch, self.patch, 3)).permute(0, 3, 1, 2),
            f"{tower}.embeddings.patch_embedding.bias": self.patch_embedding.bias,
            f"{tower}.embeddings.position_embedding.weight": self.position_embedding,
            f"{tower}.post_layernorm.weight": self.final_norm.weight,
            f"{tower}.post_layernorm.bias": self.final_norm.bias,
            "multi_modal_projector.linear.weight": self.projector.weight,
            "multi_modal_projector.linear.bias": self.projector.bias,
        }
        for index, block in enumerate(self.blocks):
            slots |= {f"{tower}.encoder.layers.{index}.{name}": slot for name, slot in block.slots().items()}
        return slots
