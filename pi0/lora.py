"""Merges LoRA leaves into the weights they adapt, so that no adapter is ever dropped silently.

The formulas are those of reference/model.md §4.9. Every shipped LoRA variant has alpha equal to its rank, so the low-rank
product is added with factor 1 (the rank-independent factor is not stored in a checkpoint).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pi0.errors import CheckpointError


class ParamSource(Protocol):
    """Leaves by name: shapes at once, values on request."""

    def __iter__(self) -> Iterator[str]: ...
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def read(self, name: str, dtype: np.dtype[Any] | None = None) -> NDArray[Any]: ...


class LoraMerged:
    """``source`` without its LoRA leaves: reading an adapted weight returns it with its adapter added in float32.

    Raises:
        CheckpointError: an adapter has no counterpart or no weight to adapt, or its shapes do not fit the weight.
    """

    def __init__(self, source: ParamSource) -> None:
        self._source = source
        stored = source.shapes()
        adapters = {name for name in stored if name.endswith("lora_a") or name.endswith("lora_b")}
        self._adapted: dict[str, tuple[str, str]] = {}
        for name in sorted(adapters):
            stem = name[: -len("lora_a")]
            weight = stem + "w" if stem.endswith("/") else stem.rstrip("_")
            down, up = stem + "lora_a", stem + "lora_b"
            if down not in adapters or up not in adapters or weight not in stored:
                raise CheckpointError(f"LoRA leaf {name} is incomplete: {weight}, {down} and {up} must all be present")
            rank = stored[down][-1:]
            expected_down = (*stored[weight][:-1], *rank)
            expected_up = (*stored[weight][:-2], *rank, *stored[weight][-1:])
            if stored[down] != expected_down or stored[up] != expected_up:
                raise CheckpointError(
                    f"LoRA leaves of {weight} {stored[weight]} do not fit it: {down} is {stored[down]}, expected {expected_down}; "
                    f"{up} is {stored[up]}, expected {expected_up}"
                )
            self._adapted[weight] = (down, up)
        self._shapes = {name: shape for name, shape in stored.items() if name not in adapters}

    @property
    def merged_leaves(self) -> tuple[str, ...]:
        """The weights that had an adapter, for the log."""
        return tuple(sorted(self._adapted))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the leaves that are left."""
        return dict(self._shapes)

    def read(self, name: str, dtype: np.dtype[Any] | None = None) -> NDArray[Any]:
        """Leaf ``name``, its adapter merged in, cast to ``dtype``."""
        if name not in self._adapted:
            return self._source.read(name, dtype)
        float32 = np.dtype(np.float32)
        down, up = (self._source.read(leaf, float32) for leaf in self._adapted[name])
        if "attn_vec_einsum" in name:
            # The second factor contracts the heads as well, so all heads share one sum (not a product per head).
            up = up.sum(axis=-3, keepdims=True)
        weight = self._source.read(name, float32)
        merged: NDArray[Any] = weight if dtype in (None, float32) else np.empty(weight.shape, dtype)
        for layer in range(len(weight)):  # the adapter's product for a whole leaf would be another copy of the leaf
            merged[layer] = weight[layer] + down[layer] @ up[layer]
        return merged
