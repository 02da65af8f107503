"""The plain path: the same model written straight from reference/model.md §2–6, to compare the fast one with.

No fused weights, no cache, nothing precomputed: every step runs prefix and suffix of both experts together, with the full
attention mask, in float32. Only tests and benchmarks use it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from action.checkpoint import open_checkpoint
from action.sampler import ModelInput
from pi0.param_tree import ModelDims

_VLM = "paligemma_with_expert.paligemma.model"
_TOWER = f"{_VLM}.vision_tower.vision_model"
_EXPERTS = (f"{_VLM}.language_model", "paligemma_with_expert.gemma_expert.model")
_MASKED_LOGIT = -2.3819763e38


@dataclass
class PlainOutputs:
    """Everything one evaluation computes. ``keys`` and ``values``: per layer ``[B, P + T, K, H]``, keys rotated."""

    velocity: Tensor
    prefix_out: Tensor
    suffix_out: Tensor
    suffix_tokens: Tensor
    condition: Tensor | None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class PlainModel:
    """A model as its tensors under openpi's names (float32, CPU) and its dimensions."""

    def __init__(self, weights: Mapping[str, Tensor], dims: ModelDims) -> None:
        self.weights = weights
        self.dims = dims

    @classmethod
    def load(cls, checkpoint_dir: Path) -> PlainModel:
        """Reads any checkpoint that ``action.checkpoint`` reads.

        Raises:
            CheckpointError: as :func:`action.checkpoint.open_checkpoint`.
        """
        source = open_checkpoint(checkpoint_dir)
        names = dict.fromkeys(source.shapes, torch.float32)
        return cls({name: tensor.float() for name, tensor in source.read(names)}, source.dims)

    @torch.inference_mode()
    def sample(self, inputs: ModelInput, noise: NDArray[np.float32], num_steps: int = 10) -> NDArray[np.float32]:
        """Integrates ``noise`` ``[B, horizon, action_dim]`` from t = 1 to 0."""
        x, t = torch.tensor(noise), np.float32(1.0)
        for _ in range(num_steps):
            x = x - self.evaluate(inputs, x, float(t)).velocity / num_steps
            t = t - np.float32(1 / num_steps)
        actions: NDArray[np.float32] = x.numpy()
        return actions

    @torch.inference_mode()
    def evaluate(self, inputs: ModelInput, x_t: Tensor, t: float) -> PlainOutputs:
        """The velocity at ``x_t`` ``[B, horizon, A]`` and time ``t``, with all intermediate results."""
        prefix, prefix_mask = self.prefix(inputs)
        suffix, condition = self.suffix(inputs, x_t, t)
        valid = torch.cat([prefix_mask, torch.ones(suffix.shape[:2], dtype=torch.bool)], dim=1)
        starts_block = torch.zeros(valid.shape[1], dtype=torch.bool)
        starts_block[prefix.shape[1]] = True
        if self.dims.kind == "pi0":
            starts_block[prefix.shape[1] + 1] = True
        blocks = starts_block.cumsum(0)
        mask = (blocks[None, :] <= blocks[:, None]) & valid[:, None, :] & valid[:, :, None]
        positions = valid.cumsum(1) - 1
        outputs = PlainOutputs(torch.empty(0), prefix, suffix, suffix, condition)
        streams = [prefix, suffix]
        for layer in range(self.dims.backbone.depth):
            streams = self._layer(layer, streams, condition, positions, mask, outputs)
        outputs.prefix_out, _ = self._norm(streams[0], f"{_EXPERTS[0]}.norm", None)
        outputs.suffix_out, _ = self._norm(streams[1], f"{_EXPERTS[1]}.norm", condition)
        outputs.velocity = self._linear(outputs.suffix_out[:, -x_t.shape[1] :], "action_out_proj")
        return outputs

    def prefix(self, inputs: ModelInput) -> tuple[Tensor, Tensor]:
        """Prefix embeddings ``[B, P, D]`` and their mask ``[B, P]``."""
        images = [self.image_tokens(torch.tensor(camera)) for camera in np.moveaxis(inputs.images, 1, 0)]
        text = F.embedding(torch.tensor(inputs.tokens), self.weights[f"{_EXPERTS[0]}.embed_tokens.weight"])
        masks = [torch.tensor(mask)[:, None].expand(-1, self.dims.backbone.vision.tokens) for mask in inputs.image_masks.T]
        return torch.cat([*images, text * math.sqrt(text.shape[-1])], dim=1), torch.cat([*masks, torch.tensor(inputs.token_mask)], dim=1)

    def image_tokens(self, images: Tensor) -> Tensor:
        """SigLIP: uint8 ``[B, 224, 224, 3]`` → ``[B, tokens, D]``."""
        dims = self.dims.backbone.vision
        pixels = images.float().permute(0, 3, 1, 2) / 255 * 2 - 1
        embedding = f"{_TOWER}.embeddings.patch_embedding"
        patches = F.conv2d(pixels, self.weights[f"{embedding}.weight"], self.weights[f"{embedding}.bias"], stride=dims.patch)
        x = patches.flatten(2).transpose(1, 2) + self.weights[f"{_TOWER}.embeddings.position_embedding.weight"]
        for layer in range(dims.depth):
            name = f"{_TOWER}.encoder.layers.{layer}"
            y = self._layer_norm(x, f"{name}.layer_norm1")
            q, k, v = (self._linear(y, f"{name}.self_attn.{n}_proj").unflatten(-1, (dims.heads, dims.head_dim)) for n in "qkv")
            probabilities = (torch.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(dims.head_dim)).softmax(-1)
            x = x + self._linear(torch.einsum("bnts,bsnh->btnh", probabilities, v).flatten(2), f"{name}.self_attn.out_proj")
            y = self._linear(self._layer_norm(x, f"{name}.layer_norm2"), f"{name}.mlp.fc1")
            x = x + self._linear(F.gelu(y, approximate="tanh"), f"{name}.mlp.fc2")
        return self._linear(self._layer_norm(x, f"{_TOWER}.post_layernorm"), f"{_VLM}.multi_modal_projector.linear")

    def suffix(self, inputs: ModelInput, x_t: Tensor, t: float) -> tuple[Tensor, Tensor | None]:
        """Suffix tokens ``[B, T, E]`` and, for pi0.5, the adaRMS condition ``[B, E]``."""
        actions = self._linear(x_t, "action_in_proj")
        time = self.time_embedding(t).expand(x_t.shape[0], -1)
        if self.dims.kind == "pi05":
            return actions, F.silu(self._linear(F.silu(self._linear(time, "time_mlp_in")), "time_mlp_out"))
        both = torch.cat([actions, time[:, None].expand_as(actions)], dim=-1)
        actions = self._linear(F.silu(self._linear(both, "action_time_mlp_in")), "action_time_mlp_out")
        return torch.cat([self._linear(torch.tensor(inputs.state), "state_proj")[:, None], actions], dim=1), None

    def time_embedding(self, t: float) -> Tensor:
        """Sine-cosine embedding of one flow time → ``[E]``."""
        half = self.dims.expert.width // 2
        angles = [2 * math.pi * t / (4e-3 * 1000.0 ** (j / (half - 1))) for j in range(half)]
        return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float32)

    def _layer(
        self, layer: int, streams: list[Tensor], condition: Tensor | None, positions: Tensor, mask: Tensor, outputs: PlainOutputs
    ) -> list[Tensor]:
        backbone = self.dims.backbone
        names = [f"{expert}.layers.{layer}" for expert in _EXPERTS]
        normed = [self._norm(x, f"{name}.input_layernorm", condition) for x, name in zip(streams, names, strict=True)]
        q, k, v = (
            torch.cat([self._linear(y, f"{name}.self_attn.{n}_proj") for (y, _), name in zip(normed, names, strict=True)], dim=1).unflatten(
                -1, (-1, backbone.head_dim)
            )
            for n in "qkv"
        )
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        outputs.keys.append(k)
        outputs.values.append(v)
        groups = backbone.heads // backbone.kv_heads
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        logits = torch.einsum("btnh,bsnh->bnts", q * backbone.head_dim**-0.5, k)
        probabilities = torch.where(mask[:, None], logits, _MASKED_LOGIT).softmax(-1)
        attended = torch.einsum("bnts,bsnh->btnh", probabilities, v).flatten(2).split([x.shape[1] for x in streams], dim=1)
        after: list[Tensor] = []
        for x, a, name, (_, gate) in zip(streams, attended, names, normed, strict=True):
            x = x + self._linear(a, f"{name}.self_attn.o_proj") * gate
            y, mlp_gate = self._norm(x, f"{name}.post_attention_layernorm", condition)
            hidden = F.gelu(self._linear(y, f"{name}.mlp.gate_proj"), approximate="tanh") * self._linear(y, f"{name}.mlp.up_proj")
            after.append(x + self._linear(hidden, f"{name}.mlp.down_proj") * mlp_gate)
        return after

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _layer_norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps=1e-6)

    def _norm(self, x: Tensor, name: str, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """RMSNorm or adaRMSNorm, whichever the weights have: the normed stream and the gate of its branch."""
        n = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        if f"{name}.weight" in self.weights:
            return n * (1 + self.weights[f"{name}.weight"]), torch.ones(())
        assert condition is not None, f"{name} is adaptive, but this model has no condition"
        scale, shift, gate = self._linear(condition, f"{name}.dense")[:, None].chunk(3, dim=-1)
        return n * (1 + scale) + shift, gate

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angles = (positions[..., None] / 10_000.0 ** (torch.arange(half) / half))[:, :, None]
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1)
