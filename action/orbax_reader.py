"""A JAX (Orbax) checkpoint seen as openpi's PyTorch tensors, without jax (table of reference/model.md §10.1).

Leaves are read one at a time and handed out layer by layer, so no second copy of the weights ever exists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from action.model import state_dict_shapes
from pi0.errors import CheckpointError
from pi0.lora import LoraMerged
from pi0.orbax import OrbaxParams
from pi0.param_tree import ATTENTION, BLOCK, IMG, LAYERS, LLM, Shape, check_shapes, model_dims, model_shapes

logger = logging.getLogger(__name__)

_VLM = "paligemma_with_expert.paligemma.model"
_EXPERT = "paligemma_with_expert.gemma_expert.model"
_TOWER = f"{_VLM}.vision_tower.vision_model"
_FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")

Layout = Callable[[Tensor], Tensor]
"""From one layer of a JAX leaf to the PyTorch tensor."""


def _same(w: Tensor) -> Tensor:
    return w


def _transposed(w: Tensor) -> Tensor:
    return w.T


def _heads_out(w: Tensor) -> Tensor:
    """Gemma's (heads, D, H) → (heads·H, D)."""
    return w.transpose(1, 2).flatten(0, 1)


def _heads_in(w: Tensor) -> Tensor:
    """(heads, H, D) → (D, heads·H), whatever D is."""
    return w.flatten(0, 1).T


def _vision_heads_out(w: Tensor) -> Tensor:
    """SigLIP's (width, heads, H) → (heads·H, width)."""
    return w.flatten(1).T


def _part(index: int, layout: Layout) -> Layout:
    return lambda w: layout(w[index])


def _expert(suffix: str, prefix: str) -> dict[str, dict[str, Layout]]:
    layer = prefix + ".layers.{i}."
    attention, ffn = layer + "self_attn.", layer + "mlp."
    leaves: dict[str, dict[str, Layout]] = {
        f"{LAYERS}/attn/q_einsum{suffix}/w": {attention + "q_proj.weight": _heads_out},
        f"{LAYERS}/attn/kv_einsum{suffix}/w": {attention + f"{n}_proj.weight": _part(i, _heads_out) for i, n in enumerate("kv")},
        f"{LAYERS}/attn/qkv_einsum{suffix}/w": {attention + f"{n}_proj.weight": _part(i, _heads_out) for i, n in enumerate("qkv")},
        f"{LAYERS}/attn/attn_vec_einsum{suffix}/w": {attention + "o_proj.weight": _heads_in},
        f"{LAYERS}/mlp{suffix}/gating_einsum": {ffn + f"{n}_proj.weight": _part(i, _transposed) for i, n in enumerate(("gate", "up"))},
        f"{LAYERS}/mlp{suffix}/linear": {ffn + "down_proj.weight": _transposed},
    }
    for jax_norm, torch_norm in (
        (f"{LAYERS}/pre_attention_norm{suffix}", layer + "input_layernorm"),
        (f"{LAYERS}/pre_ffw_norm{suffix}", layer + "post_attention_layernorm"),
        (f"{LLM}/final_norm{suffix}", f"{prefix}.norm"),
    ):
        leaves[f"{jax_norm}/scale"] = {f"{torch_norm}.weight": _same}
        leaves[f"{jax_norm}/Dense_0/kernel"] = {f"{torch_norm}.dense.weight": _transposed}
        leaves[f"{jax_norm}/Dense_0/bias"] = {f"{torch_norm}.dense.bias": _same}
    return leaves


def _leaves() -> dict[str, dict[str, Layout]]:
    """JAX leaf → {PyTorch name: layout}; ``{i}`` in a name runs over the leaf's first axis."""
    leaves: dict[str, dict[str, Layout]] = {
        f"{IMG}/embedding/kernel": {f"{_TOWER}.embeddings.patch_embedding.weight": lambda w: w.permute(3, 2, 0, 1)},
        f"{IMG}/embedding/bias": {f"{_TOWER}.embeddings.patch_embedding.bias": _same},
        f"{IMG}/pos_embedding": {f"{_TOWER}.embeddings.position_embedding.weight": _part(0, _same)},
        f"{IMG}/Transformer/encoder_norm/scale": {f"{_TOWER}.post_layernorm.weight": _same},
        f"{IMG}/Transformer/encoder_norm/bias": {f"{_TOWER}.post_layernorm.bias": _same},
        f"{IMG}/head/kernel": {f"{_VLM}.multi_modal_projector.linear.weight": _transposed},
        f"{IMG}/head/bias": {f"{_VLM}.multi_modal_projector.linear.bias": _same},
        f"{LLM}/embedder/input_embedding": {f"{_VLM}.language_model.embed_tokens.weight": _same},
    }
    layer = _TOWER + ".encoder.layers.{i}."
    for index in (0, 1):
        leaves[f"{BLOCK}/LayerNorm_{index}/scale"] = {layer + f"layer_norm{index + 1}.weight": _same}
        leaves[f"{BLOCK}/LayerNorm_{index}/bias"] = {layer + f"layer_norm{index + 1}.bias": _same}
        leaves[f"{BLOCK}/MlpBlock_0/Dense_{index}/kernel"] = {layer + f"mlp.fc{index + 1}.weight": _transposed}
        leaves[f"{BLOCK}/MlpBlock_0/Dense_{index}/bias"] = {layer + f"mlp.fc{index + 1}.bias": _same}
    for name in ("query", "key", "value"):
        leaves[f"{ATTENTION}/{name}/kernel"] = {layer + f"self_attn.{name[0]}_proj.weight": _vision_heads_out}
        leaves[f"{ATTENTION}/{name}/bias"] = {layer + f"self_attn.{name[0]}_proj.bias": Tensor.flatten}
    leaves[f"{ATTENTION}/out/kernel"] = {layer + "self_attn.out_proj.weight": _heads_in}
    leaves[f"{ATTENTION}/out/bias"] = {layer + "self_attn.out_proj.bias": _same}
    for name in ("action_in_proj", "action_out_proj", "state_proj", "action_time_mlp_in", "action_time_mlp_out", "time_mlp_in", "time_mlp_out"):
        leaves[f"{name}/kernel"] = {f"{name}.weight": _transposed}
        leaves[f"{name}/bias"] = {f"{name}.bias": _same}
    return leaves | _expert("", f"{_VLM}.language_model") | _expert("_1", _EXPERT)


class OrbaxTensors:
    """The tensors of one Orbax checkpoint under openpi's PyTorch names. LoRA adapters are merged.

    Raises:
        CheckpointError: the tree is unreadable, holds leaves that are not floating point, or is not that of a pi0 or pi0.5 model.
    """

    def __init__(self, checkpoint_dir: Path) -> None:
        params = OrbaxParams(checkpoint_dir)
        self.where = str(params.directory)
        for name in params:
            if params.dtype(name).name not in _FLOAT_DTYPES:
                raise CheckpointError(f"leaf {name} of {self.where} is {params.dtype(name)}, expected one of {', '.join(_FLOAT_DTYPES)}")
        self._params = LoraMerged(params)
        if self._params.merged_leaves:
            logger.info("Merging LoRA adapters of %d weights: %s", len(self._params.merged_leaves), ", ".join(self._params.merged_leaves))
        shapes = self._params.shapes()
        try:
            self.dims = model_dims(shapes)
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {error}") from error
        check_shapes(shapes, model_shapes(self.dims), self.where)
        self.shapes: Mapping[str, Shape] = state_dict_shapes(self.dims)

    def read(self, wanted: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Tensor]]:
        """Every wanted tensor once, in its dtype (float32 or bfloat16), one leaf in memory at a time.

        Raises:
            CheckpointError: stored data is missing or damaged.
        """
        leaves = _leaves()
        for leaf in self._params:
            targets = [
                (name, layout, index)
                for pattern, layout in leaves[leaf].items()
                for name, index in _expand(pattern, self._params.shapes()[leaf][0])
                if name in wanted
            ]
            if not targets:
                continue
            value = _as_tensor(self._params.read(leaf, _numpy_dtype(wanted[targets[0][0]])))
            for name, layout, index in targets:
                yield name, layout(value if index is None else value[index])


def _expand(pattern: str, layers: int) -> list[tuple[str, int | None]]:
    if "{i}" not in pattern:
        return [(pattern, None)]
    return [(pattern.format(i=index), index) for index in range(layers)]


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[np.generic]:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if dtype == torch.bfloat16 else np.float32)


def _as_tensor(value: np.ndarray) -> Tensor:
    if value.dtype.name == "bfloat16":  # which torch does not know as a numpy dtype
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)
