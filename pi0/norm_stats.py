"""Normalisation statistics: the file, and the two formulas with upstream's width rules (reference/embodiments.md §7)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0.errors import CheckpointError

Array = NDArray[np.float64]

_EPS = 1e-6


@dataclass(frozen=True)
class Stats:
    """Statistics of one key over its last axis; each ``[d]`` float64, ``d`` the robot's width or the padded one."""

    mean: Array
    std: Array
    q01: Array | None
    q99: Array | None


def load_norm_stats(checkpoint_dir: Path, asset_id: str, *, quantiles: bool) -> dict[str, Stats]:
    """``<checkpoint_dir>/assets/<asset_id>/norm_stats.json`` → key → statistics.

    ``checkpoint_dir`` may be the checkpoint root or its ``params/``. With ``quantiles`` every key must have q01 and q99.

    Raises:
        CheckpointError: the file is missing (names the assets that are there) or is not norm stats.
    """
    root = checkpoint_dir
    if not (root / "assets").exists():  # then it may be params/, or a link to it
        root = next((path.parent for path in (root, root.resolve()) if path.name == "params"), root)
    path = root / "assets" / asset_id / "norm_stats.json"
    if not path.is_file():
        assets = root / "assets"
        there = sorted(str(p.parent.relative_to(assets)) for p in assets.rglob("norm_stats.json")) if assets.is_dir() else []
        raise CheckpointError(
            f"no norm stats for asset {asset_id!r}: {path} does not exist (assets in this checkpoint: {', '.join(there) or 'none'}); "
            "use the config the checkpoint was trained with, or add the file"
        )
    try:
        entries = json.loads(path.read_text())["norm_stats"]
        return {str(key): _parse(entry, quantiles, f"{path}: {key}") for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a norm-stats file ({type(error).__name__}: {error}); expected {{'norm_stats': {{key: {{mean, std, q01, q99}}}}}}"
        ) from error


def normalize(x: NDArray[Any], stats: Stats, *, quantiles: bool) -> Array:
    """``[..., d]`` robot units → normalised; statistics wider than ``x`` are cut to its width.

    Raises:
        CheckpointError: the statistics are narrower than ``x``.
    """
    d = x.shape[-1]
    if len(stats.mean) < d:
        raise CheckpointError(f"norm stats are {len(stats.mean)} wide, but the data is {d} wide; these are another robot's statistics")
    if not quantiles:
        normalized: Array = (x - stats.mean[:d]) / (stats.std[:d] + _EPS)
        return normalized
    q01, q99 = _quantiles(stats)
    normalized = (x - q01[:d]) / (q99[:d] - q01[:d] + _EPS) * 2.0 - 1.0
    return normalized


def unnormalize(x: NDArray[Any], stats: Stats, *, quantiles: bool) -> Array:
    """``[..., D]`` normalised → robot units. Columns beyond the statistics' width are padding: z-score scales them by 1 + 1e-6, quantile leaves them.

    Raises:
        CheckpointError: the statistics are wider than ``x``.
    """
    d, width = x.shape[-1], len(stats.mean)
    if width > d:
        raise CheckpointError(f"norm stats are {width} wide, but the model's actions are {d} wide; these are another model's statistics")
    if not quantiles:
        mean = np.pad(stats.mean, (0, d - width), constant_values=0.0)
        std = np.pad(stats.std, (0, d - width), constant_values=1.0)
        result: Array = x * (std + _EPS) + mean
        return result
    q01, q99 = _quantiles(stats)
    head = (x[..., :width] + 1.0) / 2.0 * (q99 - q01 + _EPS) + q01
    result = np.concatenate([head, x[..., width:].astype(head.dtype)], axis=-1)
    return result


def _parse(entry: Mapping[str, Any], quantiles: bool, where: str) -> Stats:
    def vector(name: str) -> Array | None:
        values = entry.get(name)
        if values is None:
            return None
        array = np.asarray(values, np.float64)
        if array.ndim != 1 or not np.isfinite(array).all():
            raise CheckpointError(
                f"{where}.{name}: expected a list of finite numbers, got {'shape ' + str(array.shape) if array.ndim != 1 else 'NaN or infinity'}"
            )
        return array

    mean, std, q01, q99 = vector("mean"), vector("std"), vector("q01"), vector("q99")
    if mean is None or std is None:
        raise CheckpointError(f"{where}: mean and std are required")
    if quantiles and (q01 is None or q99 is None):
        raise CheckpointError(f"{where}: q01 and q99 are required, because this config normalises with quantiles")
    widths = {len(v) for v in (mean, std, q01, q99) if v is not None}
    if len(widths) != 1:
        raise CheckpointError(f"{where}: mean, std, q01 and q99 have different lengths {sorted(widths)}")
    return Stats(mean, std, q01, q99)


def _quantiles(stats: Stats) -> tuple[Array, Array]:
    if stats.q01 is None or stats.q99 is None:
        raise CheckpointError("quantile normalisation needs q01 and q99, but the norm stats have none")
    return stats.q01, stats.q99
