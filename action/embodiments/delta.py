"""Actions relative to the current state, for checkpoints that were trained on them (reference/embodiments.md §7.3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = tuple[bool, ...]


def delta_mask(*runs: int) -> Mask:
    """Which columns are relative: a positive run counts relative columns, a negative one absolute columns. ``(6, -1)`` is six, then one not."""
    return tuple(run > 0 for run in runs for _ in range(abs(run)))


def absolute_actions(actions: Array, state: Array, mask: Sequence[bool]) -> Array:
    """Relative ``[..., H, A]`` → absolute: adds ``state[..., d]`` to the columns in ``mask`` (``len(mask) <= d <= A``)."""
    return _shifted(actions, state, mask, 1.0)


def delta_actions(actions: Array, state: Array, mask: Sequence[bool]) -> Array:
    """The inverse of :func:`absolute_actions`: what a policy with this mask is trained on."""
    return _shifted(actions, state, mask, -1.0)


def _shifted(actions: Array, state: Array, mask: Sequence[bool], sign: float) -> Array:
    width = len(mask)
    shifted = np.array(actions, np.float64)
    shifted[..., :width] += sign * np.where(mask, state[..., :width], 0.0)[..., np.newaxis, :]
    return shifted
