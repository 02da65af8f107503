"""Loads pi0 / pi0.5 weights from any of the formats they come in, checked leaf by leaf, without a second copy in memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from action.model import Pi0Model, state_dict_shapes
from action.orbax_reader import OrbaxTensors
from action.safetensors_reader import SafetensorsTensors
from pi0.errors import CheckpointError
from pi0.param_tree import ModelDims, Shape, check_shapes

logger = logging.getLogger(__name__)

SAFETENSORS_NAME = "model.safetensors"
DTYPES = (torch.float32, torch.bfloat16)


class TensorSource(Protocol):
    """A checkpoint under the names of openpi's PyTorch ``state_dict``."""

    dims: ModelDims
    where: str
    shapes: Mapping[str, Shape]

    def read(self, wanted: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Tensor]]:
        """Every wanted tensor once, in any order, few in memory at a time; its dtype may be another than wanted."""
        ...


def open_checkpoint(checkpoint_dir: Path) -> TensorSource:
    """Finds out the format of ``checkpoint_dir`` and checks that its tensors are those of a pi0 or pi0.5 model; reads no values.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or tensors are missing, unexpected or of the wrong shape (all are listed).
    """
    checkpoint_dir = Path(checkpoint_dir)
    safetensors = checkpoint_dir / SAFETENSORS_NAME
    if safetensors.is_file():
        source = SafetensorsTensors(safetensors)
        check_shapes(source.shapes, state_dict_shapes(source.dims), source.where)
        return source
    if any((candidate / "_METADATA").is_file() for candidate in (checkpoint_dir / "params", checkpoint_dir)):
        return OrbaxTensors(checkpoint_dir)
    if not checkpoint_dir.is_dir():
        raise CheckpointError(f"checkpoint directory {checkpoint_dir} does not exist")
    found = ", ".join(sorted(entry.name for entry in checkpoint_dir.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"no checkpoint in {checkpoint_dir}: expected {SAFETENSORS_NAME} (openpi or LeRobot) or params/_METADATA (JAX), found {found}"
    )


def load_model(checkpoint_dir: Path, *, dtype: torch.dtype, device: torch.device) -> Pi0Model:
    """The model in ``checkpoint_dir``, which holds ``model.safetensors`` (openpi or LeRobot) or a JAX ``params/`` (or is it).

    Weights are cast to ``dtype`` (float32 or bfloat16; some stay float32, see :class:`Pi0Model`) and moved to ``device`` one tensor at a time.

    Raises:
        CheckpointError: as :func:`open_checkpoint`; or stored data is damaged.
        ValueError: ``dtype`` is neither float32 nor bfloat16.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    started = time.perf_counter()
    source = open_checkpoint(checkpoint_dir)
    model = Pi0Model(source.dims, dtype=dtype).to_empty(device=device).requires_grad_(False).eval()
    unfilled = {name: slot for name, slot in model.slots().items() if not slot.is_meta}
    for name, tensor in source.read({name: slot.dtype for name, slot in unfilled.items()}):
        unfilled.pop(name).copy_(tensor)
    if unfilled:
        raise CheckpointError(f"{source.where} gave no values for {', '.join(sorted(unfilled))}")
    size = sum(parameter.nbytes for parameter in model.parameters())
    logger.info("Loaded %s model from %s: %.2f GB on %s in %.1f s", source.dims.kind, source.where, size / 1e9, device, time.perf_counter() - started)
    return model
