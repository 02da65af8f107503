"""Writes Orbax ``params/`` directories of any tree for tests, with tensorstore alone (layout: reference/model.md §9.1)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from pi0.param_tree import ModelDims, model_shapes


def write_orbax(params: Path, tree: Mapping[str, NDArray[Any]], *, trailing: str | None = "value", top: str = "params", **metadata: Any) -> Path:
    """``tree`` (names joined with ``/``) as an OCDBT store in ``params``; every path gets the ``trailing`` component."""
    params.mkdir(parents=True)
    paths = {name: (top, *name.split("/"), *([trailing] if trailing else [])) for name in tree}
    for name, value in tree.items():
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": f"{params}/"}, "path": ".".join(paths[name]) + "/"},
        }
        ts.open(spec, create=True, dtype=ts.dtype(value.dtype), shape=value.shape).result().write(value).result()
    content = {
        "tree_metadata": {str(path): {} for path in paths.values()},
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        **metadata,
    }
    (params / "_METADATA").write_text(json.dumps(content))
    return params


def random_tree(dims: ModelDims, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random float32 leaves of a whole model in JAX layout."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in model_shapes(dims).items()}
