"""Reads an Orbax ``params/`` directory (OCDBT, zarr v2) leaf by leaf, without importing jax.

Both slots read JAX checkpoints and only one of them has jax, so the reader is built on tensorstore alone. It knows the two
quirks of these trees (reference/model.md §9.2): a top-level ``params`` key, and, in checkpoints written by training, a
trailing ``value`` component on every path. Nothing is read before it is asked for, so a caller that needs a part of the
tree pays for that part only.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0.errors import CheckpointError

_TOP_LEVEL = "params"
_TRAILING = "value"


def params_directory(checkpoint_dir: Path) -> Path:
    """The Orbax ``params/`` directory of ``checkpoint_dir``, which may be the checkpoint root or ``params/`` itself.

    Raises:
        CheckpointError: neither holds a ``_METADATA`` file.
    """
    for candidate in (checkpoint_dir / _TOP_LEVEL, checkpoint_dir):
        if (candidate / "_METADATA").is_file():
            return candidate
    raise CheckpointError(
        f"no Orbax checkpoint in {checkpoint_dir}: expected a file params/_METADATA (or _METADATA, when the path is the params "
        "directory itself). Check the path, or fetch the checkpoint again if a download was cut short."
    )


class OrbaxParams:
    """The parameter tree of one Orbax checkpoint: names and shapes at once, values on request.

    Names join the path with ``/`` without the two quirks, e.g. ``PaliGemma/llm/final_norm/scale``.

    Raises:
        CheckpointError: the directory or its metadata is missing, unreadable, or not an OCDBT zarr v2 tree.
    """

    def __init__(self, checkpoint_dir: Path) -> None:
        self.directory = params_directory(Path(checkpoint_dir))
        self._stored_names, self._all_chunks_stored = _read_metadata(self.directory / "_METADATA")
        if not (self.directory / "manifest.ocdbt").is_file():
            raise CheckpointError(
                f"{self.directory} has _METADATA but no manifest.ocdbt: only Orbax checkpoints in OCDBT storage are supported, "
                "or this one is incomplete"
            )
        self._stores: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored_names)

    def __len__(self) -> int:
        return len(self._stored_names)

    def __contains__(self, name: object) -> bool:
        return name in self._stored_names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of leaf ``name`` as stored."""
        return tuple(int(n) for n in self._open(name).shape)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all leaves as stored."""
        return {name: self.shape(name) for name in self}

    def dtype(self, name: str) -> np.dtype[Any]:
        """Stored dtype of leaf ``name`` (``bfloat16`` is the ml_dtypes one)."""
        dtype: np.dtype[Any] = np.dtype(self._open(name).dtype.numpy_dtype)
        return dtype

    def read(self, name: str, dtype: np.dtype[Any] | None = None) -> NDArray[Any]:
        """Leaf ``name`` as an array, cast to ``dtype`` chunk by chunk while it is read.

        Raises:
            CheckpointError: the stored data is missing or damaged.
        """
        import tensorstore as ts

        store = self._open(name)
        if dtype is not None and np.dtype(store.dtype.numpy_dtype) != np.dtype(dtype):
            store = ts.cast(store, np.dtype(dtype))
        try:
            value: NDArray[Any] = store.read().result()
        except ValueError as error:
            raise CheckpointError(f"cannot read leaf {name} of {self.directory}: {_first_line(error)}") from error
        return value

    def _open(self, name: str) -> Any:
        import tensorstore as ts

        if name not in self._stored_names:
            raise CheckpointError(f"{self.directory} has no leaf {name}")
        if name not in self._stores:
            # A path, not a file:// URL, in which "%", "#" and "?" (hub revisions have them) would mean something else.
            base = {"driver": "file", "path": f"{self.directory.resolve()}/"}
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": base, "path": self._stored_names[name] + "/"},
                # Unless the writer left out chunks that hold only the fill value, a missing chunk is a damaged checkpoint.
                "fill_missing_data_reads": not self._all_chunks_stored,
            }
            try:
                self._stores[name] = ts.open(spec, read=True, open=True).result()
            except ValueError as error:
                raise CheckpointError(f"cannot open leaf {name} of {self.directory}: {_first_line(error)}") from error
        return self._stores[name]


def _read_metadata(path: Path) -> tuple[dict[str, str], bool]:
    """``_METADATA`` → {name without quirks: name in the store}, and whether every chunk was written."""
    try:
        metadata = json.loads(path.read_text())
        keys = list(metadata["tree_metadata"])
        paths = [tuple(str(part) for part in ast.literal_eval(key)) for key in keys]
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not Orbax tree metadata: {_first_line(error)}") from error
    if metadata.get("use_zarr3"):
        raise CheckpointError(f"{path}: zarr v3 storage is not supported; save the checkpoint with use_zarr3=False")
    if not paths or not all(paths):
        raise CheckpointError(f"{path} lists no parameters")
    strip_value = all(parts[-1] == _TRAILING for parts in paths)
    names: dict[str, str] = {}
    for parts in paths:
        if parts[0] != _TOP_LEVEL:
            raise CheckpointError(
                f"{path}: leaf {'/'.join(parts)} is not below the top-level key 'params'; is this the params item of an openpi checkpoint?"
            )
        names["/".join(parts[1:-1] if strip_value else parts[1:])] = ".".join(parts)
    return names, bool(metadata.get("store_array_data_equal_to_fill_value", False))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
