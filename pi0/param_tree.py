"""The parameter tree of the pi0 family: which leaves there are, and the model's dimensions read off their shapes.

Names and shapes are those of reference/model.md §8 (JAX layout, ``/``-joined, per-layer leaves stacked on axis 0). Both
slots check a checkpoint against :func:`expected_shapes` before they read a value, so a missing, unexpected or misshapen leaf
is listed and nothing is ever left at a random initial value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from pi0.errors import CheckpointError

Shape = tuple[int, ...]
ModelKind = Literal["pi0", "pi05"]

IMAGE_SIZE = 224
"""Height and width of the images that the family's vision tower takes, in pixels."""

IMG = "PaliGemma/img"
LLM = "PaliGemma/llm"
LAYERS = f"{LLM}/layers"
BLOCK = f"{IMG}/Transformer/encoderblock"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_0"

_LISTED = 12
"""How many leaves of each sort an error message lists."""


@dataclass(frozen=True)
class VisionDims:
    """The SigLIP tower: ``tokens`` = grid × grid patches of ``patch`` × ``patch`` pixels."""

    width: int
    depth: int
    heads: int
    head_dim: int
    mlp_dim: int
    patch: int
    tokens: int


@dataclass(frozen=True)
class ExpertDims:
    """What the two Gemma experts of one model may have different."""

    width: int
    mlp_dim: int


@dataclass(frozen=True)
class BackboneDims:
    """The PaliGemma part: the vision tower and expert 0. All a planner needs."""

    vision: VisionDims
    vlm: ExpertDims
    vocab_size: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class ModelDims:
    """A whole pi0 or pi0.5 model. Depth, heads and head size are the same in both experts (they attend jointly)."""

    kind: ModelKind
    backbone: BackboneDims
    expert: ExpertDims
    action_dim: int


def backbone_dims(shapes: Mapping[str, Shape]) -> BackboneDims:
    """Dimensions of the PaliGemma part of a tree with these leaf shapes.

    Raises:
        CheckpointError: a leaf that fixes a dimension is missing or has the wrong rank.
    """
    at = _lookup(shapes)
    patch, _, _, width = at(f"{IMG}/embedding/kernel", 4)
    _, tokens, _ = at(f"{IMG}/pos_embedding", 3)
    vision_depth, _, vision_heads, vision_head_dim = at(f"{ATTENTION}/query/kernel", 4)
    *_, vision_mlp = at(f"{BLOCK}/MlpBlock_0/Dense_0/kernel", 3)
    if math.isqrt(tokens) ** 2 != tokens or math.isqrt(tokens) != IMAGE_SIZE // patch:
        raise CheckpointError(
            f"{IMG}/pos_embedding has {tokens} positions, but {patch}-pixel patches of a {IMAGE_SIZE}×{IMAGE_SIZE} image are "
            f"{(IMAGE_SIZE // patch) ** 2}; only square {IMAGE_SIZE}-pixel towers are supported"
        )
    vocab, vlm_width = at(f"{LLM}/embedder/input_embedding", 2)
    depth, heads, kv_heads, head_dim = _attention_dims(at, shapes, "")
    *_, mlp_dim = at(f"{LAYERS}/mlp/gating_einsum", 4)
    return BackboneDims(
        vision=VisionDims(width, vision_depth, vision_heads, vision_head_dim, vision_mlp, patch, tokens),
        vlm=ExpertDims(vlm_width, mlp_dim),
        vocab_size=vocab,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )


def model_dims(shapes: Mapping[str, Shape]) -> ModelDims:
    """Dimensions of a pi0 or pi0.5 tree with these leaf shapes; which of the two it is shows in the expert's norms.

    Raises:
        CheckpointError: there is no action expert, or a leaf that fixes a dimension is missing.
    """
    at = _lookup(shapes)
    if f"{LLM}/final_norm_1/Dense_0/kernel" in shapes:
        kind: ModelKind = "pi05"
    elif f"{LLM}/final_norm_1/scale" in shapes:
        kind = "pi0"
    else:
        raise CheckpointError(
            f"the checkpoint has no action expert (neither {LLM}/final_norm_1/scale nor .../Dense_0/kernel): "
            "it is not a pi0 or pi0.5 model (pi0-FAST is not supported yet)"
        )
    action_dim, expert_width = at("action_in_proj/kernel", 2)
    *_, expert_mlp = at(f"{LAYERS}/mlp_1/gating_einsum", 4)
    return ModelDims(kind=kind, backbone=backbone_dims(shapes), expert=ExpertDims(expert_width, expert_mlp), action_dim=action_dim)


def backbone_shapes(dims: BackboneDims) -> dict[str, Shape]:
    """Every leaf of the PaliGemma part and its shape."""
    v, width, depth = dims.vision, dims.vlm.width, dims.vision.depth
    shapes: dict[str, Shape] = {
        f"{IMG}/embedding/kernel": (v.patch, v.patch, 3, v.width),
        f"{IMG}/embedding/bias": (v.width,),
        f"{IMG}/pos_embedding": (1, v.tokens, v.width),
        f"{BLOCK}/MlpBlock_0/Dense_0/kernel": (depth, v.width, v.mlp_dim),
        f"{BLOCK}/MlpBlock_0/Dense_0/bias": (depth, v.mlp_dim),
        f"{BLOCK}/MlpBlock_0/Dense_1/kernel": (depth, v.mlp_dim, v.width),
        f"{BLOCK}/MlpBlock_0/Dense_1/bias": (depth, v.width),
        f"{ATTENTION}/out/kernel": (depth, v.heads, v.head_dim, v.width),
        f"{ATTENTION}/out/bias": (depth, v.width),
        f"{IMG}/Transformer/encoder_norm/scale": (v.width,),
        f"{IMG}/Transformer/encoder_norm/bias": (v.width,),
        f"{IMG}/head/kernel": (v.width, width),
        f"{IMG}/head/bias": (width,),
        f"{LLM}/embedder/input_embedding": (dims.vocab_size, width),
        f"{LLM}/final_norm/scale": (width,),
        f"{LAYERS}/pre_attention_norm/scale": (dims.depth, width),
        f"{LAYERS}/pre_ffw_norm/scale": (dims.depth, width),
    }
    for norm in ("LayerNorm_0", "LayerNorm_1"):
        shapes[f"{BLOCK}/{norm}/scale"] = shapes[f"{BLOCK}/{norm}/bias"] = (depth, v.width)
    for name in ("query", "key", "value"):
        shapes[f"{ATTENTION}/{name}/kernel"] = (depth, v.width, v.heads, v.head_dim)
        shapes[f"{ATTENTION}/{name}/bias"] = (depth, v.heads, v.head_dim)
    return shapes | _expert_shapes(dims, dims.vlm, "")


def model_shapes(dims: ModelDims) -> dict[str, Shape]:
    """Every leaf of a whole model and its shape: 50 for pi0, 51 for pi0.5."""
    width, depth = dims.expert.width, dims.backbone.depth
    shapes = backbone_shapes(dims.backbone) | _expert_shapes(dims.backbone, dims.expert, "_1")
    shapes |= _linear("action_in_proj", dims.action_dim, width) | _linear("action_out_proj", width, dims.action_dim)
    match dims.kind:
        case "pi0":
            shapes[f"{LLM}/final_norm_1/scale"] = (width,)
            for norm in ("pre_attention_norm_1", "pre_ffw_norm_1"):
                shapes[f"{LAYERS}/{norm}/scale"] = (depth, width)
            shapes |= _linear("state_proj", dims.action_dim, width)
            shapes |= _linear("action_time_mlp_in", 2 * width, width) | _linear("action_time_mlp_out", width, width)
        case "pi05":
            shapes |= _linear(f"{LLM}/final_norm_1/Dense_0", width, 3 * width)
            for norm in ("pre_attention_norm_1", "pre_ffw_norm_1"):
                shapes[f"{LAYERS}/{norm}/Dense_0/kernel"] = (depth, width, 3 * width)
                shapes[f"{LAYERS}/{norm}/Dense_0/bias"] = (depth, 3 * width)
            shapes |= _linear("time_mlp_in", width, width) | _linear("time_mlp_out", width, width)
    return shapes


def is_action_leaf(name: str) -> bool:
    """Whether ``name`` belongs to the action expert or its projections, which a planner leaves unread."""
    top = name.split("/", 1)[0]
    if top != "PaliGemma":
        return top in {"action_in_proj", "action_out_proj", "state_proj", "action_time_mlp_in", "action_time_mlp_out", "time_mlp_in", "time_mlp_out"}
    return any(part.endswith("_1") and not part.startswith(("LayerNorm", "Dense")) for part in name.split("/"))


def check_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str) -> None:
    """Requires ``found`` to be exactly ``expected``.

    Raises:
        CheckpointError: lists the missing, unexpected and wrongly shaped leaves of ``where``.
    """
    problems = [
        _listing("missing", (name for name in expected if name not in found)),
        _listing("unexpected", (name for name in found if name not in expected)),
        _listing(
            "wrong shape",
            (f"{name} is {found[name]}, expected {shape}" for name, shape in expected.items() if name in found and tuple(found[name]) != shape),
        ),
    ]
    if any(problems):
        raise CheckpointError(f"{where} does not fit the model its shapes describe; " + "; ".join(p for p in problems if p))


def _listing(label: str, names: Iterable[str]) -> str:
    listed = sorted(names)
    if not listed:
        return ""
    more = f", and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return f"{label} ({len(listed)}): {', '.join(listed[:_LISTED])}{more}"


def _lookup(shapes: Mapping[str, Shape]) -> Callable[[str, int], Shape]:
    def at(name: str, rank: int) -> Shape:
        if name not in shapes:
            raise CheckpointError(f"leaf {name} is missing; without it the model's dimensions cannot be told")
        if len(shapes[name]) != rank:
            raise CheckpointError(f"leaf {name} has shape {shapes[name]}, expected {rank} axes")
        if 0 in shapes[name]:
            raise CheckpointError(f"leaf {name} has shape {shapes[name]}: an axis is empty")
        return shapes[name]

    return at


def _attention_dims(at: Callable[[str, int], Shape], shapes: Mapping[str, Shape], suffix: str) -> tuple[int, int, int, int]:
    """(depth, heads, kv heads, head dim) of one expert; a model with as many kv heads as heads stores one fused einsum."""
    fused = f"{LAYERS}/attn/qkv_einsum{suffix}/w"
    if fused in shapes:
        depth, _, heads, _, head_dim = at(fused, 5)
        return depth, heads, heads, head_dim
    depth, heads, _, head_dim = at(f"{LAYERS}/attn/q_einsum{suffix}/w", 4)
    _, _, kv_heads, _, _ = at(f"{LAYERS}/attn/kv_einsum{suffix}/w", 5)
    return depth, heads, kv_heads, head_dim


def _expert_shapes(dims: BackboneDims, expert: ExpertDims, suffix: str) -> dict[str, Shape]:
    depth, heads, kv, head_dim = dims.depth, dims.heads, dims.kv_heads, dims.head_dim
    attn = f"{LAYERS}/attn"
    shapes: dict[str, Shape] = {
        f"{attn}/attn_vec_einsum{suffix}/w": (depth, heads, head_dim, expert.width),
        f"{LAYERS}/mlp{suffix}/gating_einsum": (depth, 2, expert.width, expert.mlp_dim),
        f"{LAYERS}/mlp{suffix}/linear": (depth, expert.mlp_dim, expert.width),
    }
    if kv == heads:
        shapes[f"{attn}/qkv_einsum{suffix}/w"] = (depth, 3, heads, expert.width, head_dim)
    else:
        shapes[f"{attn}/q_einsum{suffix}/w"] = (depth, heads, expert.width, head_dim)
        shapes[f"{attn}/kv_einsum{suffix}/w"] = (depth, 2, kv, expert.width, head_dim)
    return shapes


def _linear(name: str, fan_in: int, fan_out: int) -> dict[str, Shape]:
    return {f"{name}/kernel": (fan_in, fan_out), f"{name}/bias": (fan_out,)}
