"""The pi0 / pi0.5 network: a prefix of images and text, and the velocity of the actions that attend to it.

:meth:`Pi0Model.encode` runs once per observation, :meth:`Pi0Model.velocity` once per denoising step. Everything that depends
on the flow time only (adaRMS modulations, time contributions) comes from :meth:`Pi0Model.condition`, once per sampler.
``action.plain`` has the same model without any of this. Formulas: reference/model.md §4–6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from action.gemma import (
    Block,
    Cache,
    HeadDims,
    KeyValueBlock,
    LayerCache,
    Modulation,
    Rope,
    attention_mask,
    fold_rows,
    modulate,
    rms_norm,
    rope,
)
from action.siglip import VisionTower
from pi0.param_tree import ExpertDims, ModelDims, Shape

MIN_PERIOD = 4e-3
MAX_PERIOD = 4.0
_FLOAT32 = torch.float32


class PrefixContext(NamedTuple):
    """What stays the same over the denoising steps of one batch.

    ``cache`` holds the prefix and has room for the suffix, which every step overwrites. ``state_token`` ``[B, 1, E]`` is None
    for pi0.5. ``mask`` ``[B, 1, rows, S]`` (:func:`action.gemma.attention_mask`) says which keys a suffix query sees.
    """

    cache: Sequence[Cache]
    rope: Rope
    mask: Tensor
    state_token: Tensor | None


class StepCondition(NamedTuple):
    """What the flow time decides in the action expert, for one step; 2 norms per layer and the final one make R = 2·depth + 1 rows.

    ``gains`` and ``shifts`` are float32 ``[R, D]``, ``gates`` ``[R, D]`` has the dtype of the model; pi0 has neither shifts nor
    gates, but the time's part of its action MLP ``action_time`` float32 ``[D]``.
    """

    gains: Tensor | Sequence[Tensor]
    shifts: Tensor | Sequence[Tensor] | None
    gates: Tensor | Sequence[Tensor] | None
    action_time: Tensor | None

    def unbound(self) -> StepCondition:
        """The same as rows that are taken apart already, for eager code: each view is made once, not in every step."""
        gains, shifts, gates = (part.unbind() if isinstance(part, Tensor) else part for part in self[:3])
        assert gains is not None
        return StepCondition(gains, shifts, gates, self.action_time)

    def modulation(self, row: int) -> Modulation:
        return Modulation(
            self.gains[row],
            None if self.shifts is None else self.shifts[row],
            None if self.gates is None else self.gates[row],
        )


def time_embedding(times: Tensor, width: int) -> Tensor:
    """Sine-cosine embedding of flow times ``[n]`` → float32 ``[n, width]`` (reference/model.md §6.1; float64 inside, as openpi's PyTorch)."""
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angles = times.double()[:, None] / period * (2 * math.pi)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


class Pi0Model(nn.Module):
    """A pi0 or pi0.5 model of any size. Built on the meta device; ``action.checkpoint.load_model`` gives it memory and weights.

    ``dtype`` is that of the transformers. Gemma's norms, patch and position embeddings, the projections of states and actions
    and the time MLP stay float32 (reference/model.md §10.3).
    """

    def __init__(self, dims: ModelDims, *, dtype: torch.dtype) -> None:
        super().__init__()
        backbone, width = dims.backbone, dims.expert.width
        self.dims = dims
        self.dtype = dtype
        self.heads = HeadDims(backbone.heads, backbone.kv_heads, backbone.head_dim)
        vlm, adaptive = backbone.vlm, dims.kind == "pi05"

        def linear(fan_in: int, fan_out: int) -> nn.Linear:
            return nn.Linear(fan_in, fan_out, dtype=_FLOAT32, device="meta")

        self.vision = VisionTower(backbone.vision, vlm.width, dtype)
        self.embedding = nn.Embedding(backbone.vocab_size, vlm.width, dtype=dtype, device="meta")
        self.vlm_blocks = _blocks(backbone.depth - 1, vlm, self.heads, adaptive=False, dtype=dtype)
        self.vlm_last = KeyValueBlock(vlm.width, vlm.mlp_dim, self.heads, dtype=dtype)
        self.expert_blocks = _blocks(backbone.depth, dims.expert, self.heads, adaptive=adaptive, dtype=dtype)
        self.expert_norm = rms_norm(width, adaptive)
        self.action_in = linear(dims.action_dim, width)
        self.action_out = linear(width, dims.action_dim)
        self.state = None if adaptive else linear(dims.action_dim, width)
        self.time_in = linear(width if adaptive else 2 * width, width)
        self.time_out = linear(width, width)

    @property
    def device(self) -> torch.device:
        return self.action_in.weight.device

    def prefix_embeddings(self, images: Tensor, tokens: Tensor) -> Tensor:
        """``images`` uint8 ``[B, C, 224, 224, 3]`` and ``tokens`` int ``[B, L]`` → ``[B, P, D]``, P = C × image tokens + L."""
        image_tokens = self.vision(images.flatten(0, 1)).unflatten(0, images.shape[:2]).flatten(1, 2)
        text = self.embedding(tokens) * math.sqrt(self.dims.backbone.vlm.width)
        return torch.cat([image_tokens, text], dim=1)

    def encode(self, images: Tensor, image_masks: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor, horizon: int) -> PrefixContext:
        """Runs the prefix of a batch and prepares its denoising steps.

        ``images`` uint8 ``[B, C, 224, 224, 3]``, ``image_masks`` bool ``[B, C]``, ``tokens`` int ``[B, L]``, ``token_mask`` bool ``[B, L]``,
        ``state`` float32 ``[B, A]`` (read by pi0 only). Padding takes no position and is never attended to, so neither a masked camera nor
        the length L changes the result.
        """
        x = self.prefix_embeddings(images, tokens)
        valid = torch.cat([image_masks.repeat_interleave(self.dims.backbone.vision.tokens, dim=1), token_mask], dim=1)
        batch, prefix = valid.shape
        suffix = horizon if self.state is None else 1 + horizon
        cache = [LayerCache(*self._empty_cache(batch, prefix + suffix)) for _ in range(self.dims.backbone.depth)]
        # Queries at padding see the valid keys too: nothing reads what they give, and no softmax runs over an empty row.
        mask = attention_mask(valid[:, None, None, :], self.dtype)
        table = rope(valid.cumsum(dim=1) - 1, self.heads.dim)
        *lower, last = (LayerCache(keys[:, :, :prefix], values[:, :, :prefix]) for keys, values in cache)
        for block, layer in zip(self.vlm_blocks, lower, strict=True):
            x = block(x, block.attention_norm.modulation(), block.mlp_norm.modulation(), table, layer, mask)
        self.vlm_last(x, self.vlm_last.attention_norm.modulation(), table, last)
        positions = valid.sum(dim=1, keepdim=True) + torch.arange(suffix, device=valid.device)
        return PrefixContext(
            cache=cache,
            rope=rope(positions, self.heads.dim),
            mask=attention_mask(self._suffix_mask(valid, suffix), self.dtype),
            state_token=None if self.state is None else self.state(state)[:, None],
        )

    def condition(self, times: Tensor) -> list[StepCondition]:
        """The conditions of the steps at ``times`` ``[n]``, which are the same for every batch."""
        embedded = time_embedding(times, self.dims.expert.width).to(self.device)
        norms = [norm for block in self.expert_blocks for norm in (block.attention_norm, block.mlp_norm)] + [self.expert_norm]
        if self.dims.kind == "pi0":
            gains = torch.stack([norm.modulation().gain for norm in norms])
            time_half = self.time_in.weight[:, self.dims.expert.width :]
            return [StepCondition(gains, None, None, row) for row in F.linear(embedded, time_half, self.time_in.bias)]
        condition = F.silu(self.time_out(F.silu(self.time_in(embedded))))
        per_norm = [norm.modulation(condition) for norm in norms]
        gains, shifts, gates = (torch.stack(part, dim=1) for part in zip(*per_norm, strict=True))
        return [StepCondition(*rows, action_time=None) for rows in zip(gains, shifts, gates.to(self.dtype), strict=True)]

    def suffix_tokens(self, x_t: Tensor, state_token: Tensor | None, condition: StepCondition) -> Tensor:
        """What enters the action expert: ``x_t`` ``[B, horizon, A]`` → float32 ``[B, T, E]``, the state token first for pi0."""
        tokens: Tensor = self.action_in(x_t)
        if state_token is None or condition.action_time is None:
            return tokens
        action_half = self.time_in.weight[:, : self.dims.expert.width]
        tokens = self.time_out(F.silu(F.linear(tokens, action_half) + condition.action_time))
        return torch.cat([state_token, tokens], dim=1)

    def velocity(self, x_t: Tensor, context: PrefixContext, condition: StepCondition) -> Tensor:
        """The flow's velocity at ``x_t``, both float32 ``[B, horizon, A]``."""
        x = self.suffix_tokens(x_t, context.state_token, condition).to(self.dtype)
        for index, (block, layer) in enumerate(zip(self.expert_blocks, context.cache, strict=True)):
            x = block(x, condition.modulation(2 * index), condition.modulation(2 * index + 1), context.rope, layer, context.mask)
        last = modulate(x[:, -x_t.shape[1] :], condition.modulation(2 * len(self.expert_blocks)))
        velocity: Tensor = self.action_out(last.float())
        return velocity

    def slots(self) -> dict[str, Tensor]:
        """Where every tensor of an openpi ``state_dict`` goes: its name → a view into the parameter that holds it.

        A view on the meta device of a loaded model marks a tensor that is never read: its shape counts, its values do not.
        """
        vlm, expert = "paligemma_with_expert.paligemma.model", "paligemma_with_expert.gemma_expert.model"
        width = self.dims.backbone.vlm.width
        slots: dict[str, Tensor] = {f"{vlm}.{name}": slot for name, slot in self.vision.slots().items()}
        slots[f"{vlm}.language_model.embed_tokens.weight"] = self.embedding.weight
        slots[f"{vlm}.language_model.norm.weight"] = torch.empty(width, dtype=_FLOAT32, device="meta")
        slots |= _layer_slots(f"{vlm}.language_model", [*self.vlm_blocks, self.vlm_last]) | _layer_slots(expert, self.expert_blocks)
        slots |= {f"{expert}.norm.{name}": slot for name, slot in self.expert_norm.slots().items()}
        time_mlp = "time_mlp" if self.dims.kind == "pi05" else "action_time_mlp"
        for name, module in (
            ("action_in_proj", self.action_in),
            ("action_out_proj", self.action_out),
            ("state_proj", self.state),
            (f"{time_mlp}_in", self.time_in),
            (f"{time_mlp}_out", self.time_out),
        ):
            if module is not None:
                slots |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
        return slots

    def _empty_cache(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        shape = (batch, self.heads.keys, length, self.heads.dim)
        return torch.empty(shape, dtype=self.dtype, device=self.device), torch.empty(shape, dtype=self.dtype, device=self.device)

    def _suffix_mask(self, valid: Tensor, suffix: int) -> Tensor:
        everything = F.pad(valid, (0, suffix), value=True)
        if self.state is None:
            return everything[:, None, None, :]
        # pi0's state token comes first and does not see the actions; they see everything.
        state_row = F.pad(valid, (0, 1), value=True)
        rows = torch.stack([F.pad(state_row, (0, suffix - 1), value=False), *[everything] * (suffix - 1)], dim=1)
        return fold_rows(rows, self.heads)


def state_dict_shapes(dims: ModelDims) -> dict[str, Shape]:
    """Every tensor of the openpi ``state_dict`` of a model with these dimensions, and its shape."""
    return {name: tuple(slot.shape) for name, slot in Pi0Model(dims, dtype=_FLOAT32).slots().items()}


def _blocks(depth: int, dims: ExpertDims, heads: HeadDims, *, adaptive: bool, dtype: torch.dtype) -> Sequence[Block]:
    blocks = nn.ModuleList(Block(dims.width, dims.mlp_dim, heads, adaptive=adaptive, dtype=dtype) for _ in range(depth))
    return cast("Sequence[Block]", blocks)


def _layer_slots(prefix: str, blocks: Sequence[Block | KeyValueBlock]) -> dict[str, Tensor]:
    return {f"{prefix}.layers.{index}.{name}": slot for index, block in enumerate(blocks) for name, slot in block.slots().items()}
