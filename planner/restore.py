"""Checkpoint → weights on the device: the planner's part only, straight to the wanted dtype.

Leaves are read one at a time, the largest first, so that the transient copy of a leaf on its way to the device is largest
while the device is still empty: peak memory stays within 1.3 × the restored weights. (A float32 checkpoint whose leaves are
stored as single chunks and restored as bfloat16 needs 1.6 ×: such a chunk can only be decoded whole.) Some leaves are laid
out anew on the way (queries, keys and values side by side; gate and up apart), so that no product has to transpose or slice
a weight.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from pi0.errors import CheckpointError
from pi0.lora import LoraMerged, ParamSource
from pi0.orbax import OrbaxParams
from pi0.param_tree import ATTENTION, BLOCK, IMG, LAYERS, LLM, BackboneDims, backbone_dims, backbone_shapes, check_shapes, is_action_leaf
from planner.decoder import PlannerParams
from planner.gemma import GemmaBlockParams, GemmaParams
from planner.siglip import DenseParams, EncoderBlockParams, LayerNormParams, SiglipParams

logger = logging.getLogger(__name__)

Array = NDArray[Any]

_FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class _Group:
    """Stored leaves that are read together, and the weights they become: ``layout(*stored)`` gives one array per target."""

    stored: tuple[str, ...]
    targets: tuple[str, ...]
    layout: Callable[..., tuple[Array, ...]] = lambda leaf: (leaf,)


def restore(
    checkpoint_dir: str | Path, head_ids: NDArray[np.int32], dtype: np.dtype[Any], *, tokens: int | None = None
) -> tuple[PlannerParams, BackboneDims]:
    """Reads the planner's weights of an openpi checkpoint directory (its root or its ``params/``).

    Args:
        checkpoint_dir: a local directory.
        head_ids: ids of the tokens that may be generated, ascending.
        dtype: of all weights.
        tokens: how many the tokenizer has; None stands for one more than the last of ``head_ids``.

    Raises:
        CheckpointError: no checkpoint there, leaves are missing, unexpected or of the wrong shape (all are listed), one is not
            floating point, or the embedding has fewer rows than the tokenizer has tokens.
    """
    stored = OrbaxParams(Path(checkpoint_dir))
    for name in stored:
        if not is_action_leaf(name) and stored.dtype(name).name not in _FLOAT_DTYPES:
            raise CheckpointError(f"leaf {name} of {stored.directory} is {stored.dtype(name)}, expected one of {', '.join(_FLOAT_DTYPES)}")
    return restore_from(LoraMerged(stored), head_ids, dtype, tokens=tokens, where=str(stored.directory))


def restore_from(
    source: ParamSource, head_ids: NDArray[np.int32], dtype: np.dtype[Any], *, tokens: int | None = None, where: str
) -> tuple[PlannerParams, BackboneDims]:
    """As :func:`restore`, from any source of leaves; ``where`` names it in errors."""
    shapes = {name: shape for name, shape in source.shapes().items() if not is_action_leaf(name)}
    try:
        dims = backbone_dims(shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    check_shapes(shapes, backbone_shapes(dims), where)
    # Prompts may hold tokens that are never generated; jax would read another row for one that has none.
    last = int(head_ids[-1]) if tokens is None else tokens - 1
    if last >= dims.vocab_size:
        raise CheckpointError(
            f"{where}: the embedding has {dims.vocab_size} rows, but the tokenizer has a token {last}; "
            "give the tokenizer that belongs to this checkpoint"
        )
    groups = _groups(shapes)
    weights: dict[str, jax.Array] = {}
    for group in sorted(groups, key=lambda group: -sum(math.prod(shapes[name]) for name in group.stored)):
        arrays = group.layout(*(source.read(name, dtype) for name in group.stored))
        for target, array in zip(group.targets, arrays, strict=True):
            # Waiting lets the host's copy go before the next leaf is read.
            weights[target] = jax.device_put(array).block_until_ready()
        del arrays, array
    params = _assemble(weights, jnp.asarray(head_ids, jnp.int32))
    logger.info("restored %.1f MB of %s planner weights from %s", parameter_bytes(params) / 1e6, np.dtype(dtype).name, where)
    return params, dims


def parameter_bytes(params: PlannerParams) -> int:
    """Bytes of all weights."""
    return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(params))


def _groups(names: Iterable[str]) -> list[_Group]:
    attention = f"{LAYERS}/attn"
    fused = f"{attention}/qkv_einsum/w"
    apart = (f"{attention}/q_einsum/w", f"{attention}/kv_einsum/w")
    special = [
        _Group((fused,), ("qkv",), lambda qkv: (_columns(qkv[:, 0], qkv[:, 1], qkv[:, 2]),))
        if fused in names
        else _Group(apart, ("qkv",), lambda q, kv: (_columns(q, kv[:, 0], kv[:, 1]),)),
        _Group((f"{attention}/attn_vec_einsum/w",), ("out",), lambda w: (w.reshape(w.shape[0], -1, w.shape[-1]),)),
        _Group((f"{LAYERS}/mlp/gating_einsum",), ("gate", "up"), lambda w: (w[:, 0], w[:, 1])),
    ]
    handled = {name for group in special for name in group.stored}
    return special + [_Group((name,), (name,)) for name in names if name not in handled]


def _columns(*projections: Array) -> Array:
    """Projections ``[L, n, W, H]`` → one matrix per layer ``[L, W, (n + …)·H]``."""
    layers, _, width, _ = projections[0].shape
    return np.concatenate([p.transpose(0, 2, 1, 3).reshape(layers, width, -1) for p in projections], axis=-1)


def _assemble(weights: dict[str, jax.Array], head_ids: jax.Array) -> PlannerParams:
    def norm(name: str) -> LayerNormParams:
        return LayerNormParams(weights[f"{name}/scale"], weights[f"{name}/bias"])

    def dense(name: str) -> DenseParams:
        return DenseParams(weights[f"{name}/kernel"], weights[f"{name}/bias"])

    embedding = weights[f"{LLM}/embedder/input_embedding"]
    return PlannerParams(
        vision=SiglipParams(
            patch=dense(f"{IMG}/embedding"),
            position=weights[f"{IMG}/pos_embedding"],
            blocks=EncoderBlockParams(
                norm_attention=norm(f"{BLOCK}/LayerNorm_0"),
                query=dense(f"{ATTENTION}/query"),
                key=dense(f"{ATTENTION}/key"),
                value=dense(f"{ATTENTION}/value"),
                out=dense(f"{ATTENTION}/out"),
                norm_mlp=norm(f"{BLOCK}/LayerNorm_1"),
                mlp_in=dense(f"{BLOCK}/MlpBlock_0/Dense_0"),
                mlp_out=dense(f"{BLOCK}/MlpBlock_0/Dense_1"),
            ),
            norm=norm(f"{IMG}/Transformer/encoder_norm"),
            head=dense(f"{IMG}/head"),
        ),
        language=GemmaParams(
            embedding=embedding,
            blocks=GemmaBlockParams(
                norm_attention=weights[f"{LAYERS}/pre_attention_norm/scale"],
                qkv=weights["qkv"],
                out=weights["out"],
                norm_mlp=weights[f"{LAYERS}/pre_ffw_norm/scale"],
                gate=weights["gate"],
                up=weights["up"],
                down=weights[f"{LAYERS}/mlp/linear"],
            ),
            norm=weights[f"{LLM}/final_norm/scale"],
        ),
        head=jnp.take(embedding, head_ids, axis=0),
        head_ids=head_ids,
    )
