"""A ``model.safetensors`` of openpi or LeRobot seen as openpi's PyTorch tensors (reference/model.md §10–11).

Shapes give every dimension but how attention features are split into heads. With one key/value head, as in every published
pi0 / pi0.5 model, the head size is the number of rows of ``k_proj``; a vision tower of width 1152 is So400m/14 with 16 heads. Anything else has to be
said in a file ``model_dims.json`` (or ``tiny_model.json``) beside the weights::

    {"vlm": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 256}, "siglip": {"num_heads": 16}}

Either part may be left out where the rule above holds; what is there is checked against the shapes.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from action.model import MAX_PERIOD, MIN_PERIOD
from pi0.errors import CheckpointError
from pi0.param_tree import IMAGE_SIZE, BackboneDims, ExpertDims, ModelDims, ModelKind, Shape, VisionDims

logger = logging.getLogger(__name__)

SIDECARS = ("model_dims.json", "tiny_model.json")

_VLM = "paligemma_with_expert.paligemma.model"
_TEXT = f"{_VLM}.language_model"
_EXPERT = "paligemma_with_expert.gemma_expert.model"
_TOWER = f"{_VLM}.vision_tower.vision_model"
_EMBEDDING = f"{_TEXT}.embed_tokens.weight"
_TIED_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
_UNUSED_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
_SO400M_WIDTH, _SO400M_HEADS = 1152, 16
_FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
KINDS: tuple[ModelKind, ...] = get_args(ModelKind)
# Tensors are copied out of a memory map, whose pages count as used until it is closed.
_MAPPED_BYTES = 1 << 30


class SafetensorsTensors:
    """The tensors of one ``model.safetensors`` under openpi's names.

    Raises:
        CheckpointError: the file is damaged, of another model family, not floating point, or its head counts cannot be told.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._path = path
        stored: dict[str, Shape] = {}
        with _open(path) as file:
            for name in file.offset_keys():
                entry = file.get_slice(name)
                if entry.get_dtype() not in _FLOAT_DTYPES:
                    raise CheckpointError(f"tensor {name} of {path} is {entry.get_dtype()}, expected one of {', '.join(_FLOAT_DTYPES)}")
                stored[name] = tuple(entry.get_shape())
        kind, self._stored_names = _canonical_names(list(stored), path)
        _check_lerobot_config(path.parent / "config.json", kind)
        self.shapes: Mapping[str, Shape] = {name: stored[original] for name, original in self._stored_names.items()}
        self.dims = _model_dims(kind, self.shapes, path)

    def read(self, wanted: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Tensor]]:
        """Every wanted tensor once, in file order and in the stored dtype, one in memory at a time."""
        names = [name for name in self._stored_names if name in wanted]
        while names:
            mapped = 0
            with _open(self._path) as file:
                while names and mapped < _MAPPED_BYTES:
                    name = names.pop(0)
                    tensor = file.get_tensor(self._stored_names[name])
                    mapped += tensor.nbytes
                    yield name, tensor
                    del tensor


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {str(error).splitlines()[0]}; fetch it again") from error


def _canonical_names(stored: list[str], path: Path) -> tuple[ModelKind, dict[str, str]]:
    """The kind of model, and openpi's name → stored name of every tensor that counts (reference/model.md §11.1)."""
    names: dict[str, str] = {}
    for original in stored:
        name = original.removeprefix("model.")
        if name in names:
            raise CheckpointError(f"{path} holds {name} twice, as {names[name]} and {original}")
        names[name] = original
    memory = sorted(name for name in names if name.startswith("proprio_history_proj."))
    if memory:
        raise CheckpointError(
            f"{path} uses LeRobot's proprioceptive memory ({', '.join(memory)}), which is not supported; use a checkpoint without it"
        )
    if f"{_EXPERT}.norm.dense.weight" in names:
        kind: ModelKind = "pi05"
    elif f"{_EXPERT}.norm.weight" in names:
        kind = "pi0"
    else:
        raise CheckpointError(
            f"{path} is not a pi0 or pi0.5 model: neither {_EXPERT}.norm.weight nor .norm.dense.weight is among "
            f"its {len(names)} tensors ({', '.join(sorted(names)[:4])}, …)"
        )
    names.pop(_UNUSED_HEAD, None)
    head = names.pop(_TIED_HEAD, None)
    if head is not None:
        names.setdefault(_EMBEDDING, head)
    time_mlp, other_time_mlp = ("time_mlp", "action_time_mlp") if kind == "pi05" else ("action_time_mlp", "time_mlp")
    for old in [name for name in names if name.startswith(f"{other_time_mlp}_")]:
        names.setdefault(time_mlp + old.removeprefix(other_time_mlp), names.pop(old))
    if kind == "pi05":
        leftovers = [name for name in names if name.startswith("state_proj.") or _is_replaced_norm(name, names)]
        for name in leftovers:
            del names[name]
        if leftovers:
            logger.info("%s: left out %d tensors that pi0.5 does not have: %s", path, len(leftovers), ", ".join(sorted(leftovers)))
    return kind, names


def _is_replaced_norm(name: str, names: Mapping[str, str]) -> bool:
    """Whether ``name`` is a plain norm weight of the expert that has an adaptive one in its place."""
    return name.startswith(_EXPERT) and name.endswith("norm.weight") and f"{name.removesuffix('weight')}dense.weight" in names


def _check_lerobot_config(path: Path, kind: ModelKind) -> None:
    """LeRobot's ``config.json`` names the model and the periods of its time embedding, which the weights do not tell; openpi's has none of it."""
    if not path.is_file():
        return
    config = _read_json(path)
    for field, period in (("min_period", MIN_PERIOD), ("max_period", MAX_PERIOD)):
        if config.get(field, period) != period:
            raise CheckpointError(f"{path} says {field} {config[field]!r}; only models with {period} are supported, as all published ones are")
    declared = config.get("type")
    if declared is not None and declared != kind:
        raise CheckpointError(
            f"{path} says type {declared!r}, but the weights beside it are those of a {kind} model; supported types are {', '.join(KINDS)}"
        )


def _model_dims(kind: ModelKind, shapes: Mapping[str, Shape], path: Path) -> ModelDims:
    def at(name: str, rank: int) -> Shape:
        if name not in shapes:
            raise CheckpointError(f"{path} has no tensor {name}; without it the model's dimensions cannot be told")
        if len(shapes[name]) != rank or 0 in shapes[name]:
            raise CheckpointError(f"tensor {name} of {path} has shape {list(shapes[name])}, expected {rank} axes, none of them empty")
        return shapes[name]

    width, _, patch, _ = at(f"{_TOWER}.embeddings.patch_embedding.weight", 4)
    tokens, _ = at(f"{_TOWER}.embeddings.position_embedding.weight", 2)
    if tokens != (IMAGE_SIZE // patch) ** 2:
        raise CheckpointError(
            f"{path}: the vision tower has {tokens} positions, but {patch}-pixel patches of a {IMAGE_SIZE}×{IMAGE_SIZE} image are "
            f"{(IMAGE_SIZE // patch) ** 2}; only {IMAGE_SIZE}-pixel towers are supported"
        )
    vision_features, _ = at(f"{_TOWER}.encoder.layers.0.self_attn.q_proj.weight", 2)
    vision_mlp, _ = at(f"{_TOWER}.encoder.layers.0.mlp.fc1.weight", 2)
    vocab_size, vlm_width = at(_EMBEDDING, 2)
    query_rows, _ = at(f"{_TEXT}.layers.0.self_attn.q_proj.weight", 2)
    key_rows, _ = at(f"{_TEXT}.layers.0.self_attn.k_proj.weight", 2)
    vlm_mlp, _ = at(f"{_TEXT}.layers.0.mlp.gate_proj.weight", 2)
    expert_mlp, _ = at(f"{_EXPERT}.layers.0.mlp.gate_proj.weight", 2)
    expert_width, action_dim = at("action_in_proj.weight", 2)
    heads, kv_heads, head_dim, vision_heads = _head_counts(path, width, vision_features, query_rows, key_rows)
    return ModelDims(
        kind=kind,
        backbone=BackboneDims(
            vision=VisionDims(width, _depth(shapes, f"{_TOWER}.encoder"), vision_heads, vision_features // vision_heads, vision_mlp, patch, tokens),
            vlm=ExpertDims(vlm_width, vlm_mlp),
            vocab_size=vocab_size,
            depth=_depth(shapes, _TEXT),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
        ),
        expert=ExpertDims(expert_width, expert_mlp),
        action_dim=action_dim,
    )


def _depth(shapes: Mapping[str, Shape], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.layers\.(\d+)\.")
    return 1 + max(int(match[1]) for match in map(pattern.match, shapes) if match)


def _head_counts(path: Path, vision_width: int, vision_features: int, query_rows: int, key_rows: int) -> tuple[int, int, int, int]:
    """(heads, kv heads, head dim, vision heads), by the rule of the module docstring."""
    sidecar = next((path.parent / name for name in SIDECARS if (path.parent / name).is_file()), None)
    declared = _read_json(sidecar) if sidecar is not None else {}
    if "vlm" in declared:
        heads, kv_heads, head_dim = (_count(sidecar, declared, "vlm", key) for key in ("num_heads", "num_kv_heads", "head_dim"))
        if heads * head_dim != query_rows or kv_heads * head_dim != key_rows:
            raise CheckpointError(
                f"{sidecar}: vlm has {heads} heads and {kv_heads} kv heads of {head_dim}, "
                f"but the weights have {query_rows} query and {key_rows} key features"
            )
    else:
        heads, kv_heads, head_dim = query_rows // key_rows, 1, key_rows
    if head_dim % 2 or heads * head_dim != query_rows or heads % kv_heads:
        raise CheckpointError(
            f"{path}: {query_rows} query and {key_rows} key features are not {heads} heads of {head_dim} that share {kv_heads}; "
            + _ask(path, "vlm", "num_heads", "num_kv_heads", "head_dim")
        )
    if "siglip" in declared:
        vision_heads = _count(sidecar, declared, "siglip", "num_heads")
    elif vision_width == _SO400M_WIDTH:
        vision_heads = _SO400M_HEADS
    else:
        raise CheckpointError(
            f"{path}: the number of attention heads of a vision tower of width {vision_width} is not in the file; "
            + _ask(path, "siglip", "num_heads")
        )
    if vision_features % vision_heads:
        raise CheckpointError(f"{sidecar or path}: {vision_heads} vision heads do not divide the tower's {vision_features} query features")
    return heads, kv_heads, head_dim, vision_heads


def _ask(path: Path, part: str, *counts: str) -> str:
    example = json.dumps({part: dict.fromkeys(counts, "…")}, ensure_ascii=False)
    return f"write {example} to {path.parent / SIDECARS[0]}"


def _count(sidecar: Path | None, declared: Mapping[str, Any], part: str, key: str) -> int:
    value = declared[part].get(key) if isinstance(declared[part], dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{sidecar}: {part}.{key} is {value!r}, expected a positive whole number")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content
