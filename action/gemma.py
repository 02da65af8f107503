"""The Gemma blocks that both experts of a pi0 / pi0.5 model are made of (reference/model.md §4).

The query, key and value projections are one weight, and so are gate and up. All query heads of one key/value head are
folded into the query length, so grouped attention is two plain matrix products for any number of key/value heads.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RMS_EPSILON = 1e-6
ROPE_MAX_WAVELENGTH = 10_000.0


class HeadDims(NamedTuple):
    """Attention sizes: ``queries`` heads share ``keys`` key/value heads of ``dim`` features."""

    queries: int
    keys: int
    dim: int


class Modulation(NamedTuple):
    """What an RMSNorm does after normalising: ``y = n · gain + shift``; ``gate`` multiplies the branch that follows.

    ``gain`` and ``shift`` are float32 ``[D]``, ``gate`` ``[D]`` has the dtype of the stream. A plain RMSNorm has only a gain.
    """

    gain: Tensor
    shift: Tensor | None = None
    gate: Tensor | None = None


class Rope(NamedTuple):
    """Cosines of the rotary embedding and its sines, negative in the first half, float32 ``[B, T, 1, H]``."""

    cos: Tensor
    sin: Tensor


class Attended(NamedTuple):
    """Rotated keys and values that queries see, each ``[B, K, S, H]``."""

    keys: Tensor
    values: Tensor


class Cache(Protocol):
    """The keys and values of one layer so far."""

    def append(self, k: Tensor, v: Tensor) -> Attended:
        """Those so far and, after them, ``k`` and ``v`` ``[B, T, K, H]``."""


class LayerCache(NamedTuple):
    """Rotated keys and values of one layer, each ``[B, K, S, H]``, allocated once and written in place."""

    keys: Tensor
    values: Tensor

    def append(self, k: Tensor, v: Tensor) -> Attended:
        """Writes ``k`` and ``v`` ``[B, T, K, H]`` to the last T positions."""
        tokens = k.shape[1]
        first = self.keys.shape[2] - tokens
        self.keys.narrow(2, first, tokens).copy_(k.transpose(1, 2))
        self.values.narrow(2, first, tokens).copy_(v.transpose(1, 2))
        return Attended(self.keys, self.values)


def rope(positions: Tensor, head_dim: int) -> Rope:
    """Rotary tables of integer ``positions`` ``[B, T]`` (half-split layout, reference/model.md §4.6)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = (positions[..., None] / ROPE_MAX_WAVELENGTH**exponents)[:, :, None, :]
    cos, sin = angles.cos(), angles.sin()
    return Rope(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates the heads ``x`` ``[B, T, heads, H]`` in float32 and returns them in their own dtype."""
    x32 = x.float()
    return torch.addcmul(x32 * rope.cos, x32.roll(x.shape[-1] // 2, -1), rope.sin).to(x.dtype)


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Grouped attention of ``q`` ``[B, T, N, H]`` over ``keys`` and ``values`` ``[B, K, S, H]`` → ``[B, T, N·H]``.

    ``mask`` ``[B, 1, rows, S]``, of :func:`attention_mask`, has one row for all queries or, as :func:`fold_rows` makes it, one per folded query.
    """
    tokens, groups = q.shape[1], q.shape[2] // keys.shape[1]
    folded = q.unflatten(2, (keys.shape[1], groups)).transpose(1, 2).flatten(2, 3)
    attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
    unfolded: Tensor = attended.unflatten(2, (tokens, groups)).transpose(1, 2).flatten(2)
    return unfolded


def attention_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores, 0 where ``visible``, else -inf. SDPA would make it of a boolean mask in every layer and step."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, -torch.inf)


def fold_rows(mask: Tensor, heads: HeadDims) -> Tensor:
    """A mask ``[B, T, S]`` with its own row per token, in the order in which :func:`attend` folds the queries."""
    return mask.repeat_interleave(heads.queries // heads.keys, dim=1)[:, None]


def modulate(x: Tensor, modulation: Modulation) -> Tensor:
    """RMSNorm of ``x`` ``[B, T, D]`` in float32, returned in the dtype of ``x`` (reference/model.md §4.2, §4.3)."""
    normalised = F.rms_norm(x.float(), x.shape[-1:], eps=RMS_EPSILON)
    if modulation.shift is None:
        return (normalised * modulation.gain).to(x.dtype)
    return torch.addcmul(modulation.shift, normalised, modulation.gain).to(x.dtype)


def _residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return x + branch if gate is None else torch.addcmul(x, branch, gate)


class RMSNorm(nn.Module):
    """A plain norm: ``scale`` ``[D]`` is stored as an offset from 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width, dtype=torch.float32, device="meta"))

    def modulation(self, condition: Tensor | None = None) -> Modulation:
        return Modulation(1.0 + self.scale)

    def slots(self) -> dict[str, Tensor]:
        return {"weight": self.scale}


class AdaRMSNorm(nn.Module):
    """An adaptive norm (pi0.5 expert): scale, shift and gate are a linear function of the condition ``[C, D]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width, dtype=torch.float32, device="meta")

    def modulation(self, condition: Tensor | None = None) -> Modulation:
        """One row per condition, all float32 ``[C, D]``."""
        assert condition is not None, "an adaptive norm needs a condition"
        scale, shift, gate = self.dense(condition).chunk(3, dim=-1)
        return Modulation(1.0 + scale, shift, gate)

    def slots(self) -> dict[str, Tensor]:
        return {"dense.weight": self.dense.weight, "dense.bias": self.dense.bias}


def rms_norm(width: int, adaptive: bool) -> RMSNorm | AdaRMSNorm:
    """The norm of an expert: adaptive in the action expert of pi0.5."""
    return AdaRMSNorm(width) if adaptive else RMSNorm(width)


class Block(nn.Module):
    """One layer of one expert. The caller computes the modulations, which do not depend on the tokens."""

    def __init__(self, width: int, mlp_dim: int, heads: HeadDims, *, adaptive: bool, dtype: torch.dtype) -> None:
        super().__init__()

        def linear(fan_in: int, fan_out: int) -> nn.Linear:
            return nn.Linear(fan_in, fan_out, bias=False, dtype=dtype, device="meta")

        self.heads = heads
        self.attention_norm = rms_norm(width, adaptive)
        self.qkv = linear(width, (heads.queries + 2 * heads.keys) * heads.dim)
        self.out = linear(heads.queries * heads.dim, width)
        self.mlp_norm = rms_norm(width, adaptive)
        self.gate_up = linear(width, 2 * mlp_dim)
        self.down = linear(mlp_dim, width)

    def forward(self, x: Tensor, attention: Modulation, mlp: Modulation, rope: Rope, cache: Cache, mask: Tensor) -> Tensor:
        """``x`` ``[B, T, D]`` after this layer. Its keys and values are appended to ``cache``."""
        heads = self.heads
        projected = self.qkv(modulate(x, attention)).unflatten(-1, (-1, heads.dim))
        rotated = rotate(projected[:, :, : heads.queries + heads.keys], rope)
        q, k = rotated.split([heads.queries, heads.keys], dim=2)
        seen = cache.append(k, projected[:, :, heads.queries + heads.keys :])
        x = _residual(x, self.out(attend(q, seen.keys, seen.values, mask)), attention.gate)
        gate, up = self.gate_up(modulate(x, mlp)).chunk(2, dim=-1)
        return _residual(x, self.down(F.gelu(gate, approximate="tanh") * up), mlp.gate)

    def slots(self) -> dict[str, Tensor]:
        """Where each tensor of openpi's layer goes: name → view into a parameter."""
        n, k = self.heads.queries * self.heads.dim, self.heads.keys * self.heads.dim
        q_proj, k_proj, v_proj = self.qkv.weight.split([n, k, k])
        gate_proj, up_proj = self.gate_up.weight.chunk(2)
        return {
            "self_attn.q_proj.weight": q_proj,
            "self_attn.k_proj.weight": k_proj,
            "self_attn.v_proj.weight": v_proj,
            "self_attn.o_proj.weight": self.out.weight,
            "mlp.gate_proj.weight": gate_proj,
            "mlp.up_proj.weight": up_proj,
            "mlp.down_proj.weight": self.down.weight,
            **{f"input_layernorm.{name}": slot for name, slot in self.attention_norm.slots().items()},
            **{f"post_attention_layernorm.{name}": slot for name, slot in self.mlp_norm.slots().items()},
        }


class KeyValueBlock(nn.Module):
    """The last layer of the prefix: nothing reads its output, only its keys and values, so that is all it computes and holds."""

    def __init__(self, width: int, mlp_dim: int, heads: HeadDims, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = RMSNorm(width)
        self.kv = nn.Linear(width, 2 * heads.keys * heads.dim, bias=False, dtype=dtype, device="meta")
        self._unread = Block(width, mlp_dim, heads, adaptive=False, dtype=dtype).slots()

    def forward(self, x: Tensor, attention: Modulation, rope: Rope, cache: Cache) -> None:
        """Appends the keys and values of ``x`` ``[B, T, D]`` to ``cache``."""
        k, v = self.kv(modulate(x, attention)).unflatten(-1, (-1, self.heads.dim)).chunk(2, dim=2)
        cache.append(rotate(k, rope), v)

    def slots(self) -> dict[str, Tensor]:
        """As :meth:`Block.slots`; what is never read stays on the meta device, which keeps its shape and no values."""
        k_proj, v_proj = self.kv.weight.chunk(2)
        return self._unread | {
            "self_attn.k_proj.weight": k_proj,
            "self_attn.v_proj.weight": v_proj,
            "input_layernorm.weight": self.attention_norm.scale,
        }
