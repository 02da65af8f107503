"""Camera images as the family takes them: uint8, 224 × 224, letter-boxed.

Two resizes exist upstream and differ by rounding; both are here because "the same numbers" needs both
(reference/embodiments.md §8): Pillow's, which clients and the action policy use, and the float one inside the JAX model,
which the planner meets when a camera is not 224 × 224.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pi0.errors import ObservationError
from pi0.param_tree import IMAGE_SIZE

MAX_SIDE = 8192
"""Longest side of an image, in pixels, that is taken from a client."""

_RANGE_TOLERANCE = 1e-3
"""How far a float image may leave [0, 1], as interpolation makes it do."""


def convert_to_uint8(image: NDArray[Any]) -> NDArray[Any]:
    """Float [0, 1] → uint8 by truncation of 255·x, as openpi's client does (no range check, so it wraps); others unchanged."""
    if np.issubdtype(image.dtype, np.floating):
        with np.errstate(invalid="ignore"):
            return (255 * image).astype(np.uint8)
    return image


def resize_with_pad(images: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """``[..., h, w, 3]`` uint8 → ``[..., height, width, 3]``: Pillow's bilinear resize that keeps the aspect, on black.

    The bytes are those of openpi's client (reference/embodiments.md §8.1). An image of that size already is returned unchanged.
    """
    if images.shape[-3:-1] == (height, width):
        return images
    flat = images.reshape(-1, *images.shape[-3:])
    resized = np.stack([_letterbox(image, height, width) for image in flat])
    return resized.reshape(*images.shape[:-3], *resized.shape[-3:])


def _letterbox(image: NDArray[Any], height: int, width: int) -> NDArray[np.uint8]:
    new_height, new_width = _fitted(image.shape[0], image.shape[1], height, width)
    canvas = np.zeros((height, width, image.shape[2]), np.uint8)
    if new_height and new_width:
        top, left = (height - new_height) // 2, (width - new_width) // 2
        resized = Image.fromarray(image).resize((new_width, new_height), resample=Image.Resampling.BILINEAR)
        canvas[top : top + new_height, left : left + new_width] = np.asarray(resized)
    return canvas


def resize_with_pad_linear(image: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """``[..., h, w, c]`` float32 in [-1, 1] or uint8 → ``[..., height, width, c]``: antialiased linear resize, padded with -1 or 0.

    The model-side resize of openpi's JAX code (reference/embodiments.md §8.2): rounded once, for uint8 half to even.
    """
    if image.shape[-3:-1] == (height, width):
        return image
    is_uint8 = image.dtype == np.uint8
    new_height, new_width = _fitted(image.shape[-3], image.shape[-2], height, width)
    rows = _linear_weights(image.shape[-3], new_height)
    columns = _linear_weights(image.shape[-2], new_width)
    resized = np.einsum("yh,...hwc,xw->...yxc", rows, image.astype(np.float32), columns, optimize=True)
    resized = np.clip(np.round(resized), 0, 255).astype(np.uint8) if is_uint8 else np.clip(resized, -1.0, 1.0).astype(np.float32)
    canvas = np.full((*image.shape[:-3], height, width, image.shape[-1]), 0 if is_uint8 else -1.0, resized.dtype)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    canvas[..., top : top + new_height, left : left + new_width, :] = resized
    return canvas


def parse_image(image: object, key: str) -> NDArray[np.uint8]:
    """A client's image under ``key`` → uint8 ``[h, w, 3]``. Float images are [0, 1]; a leading axis of size 3 means CHW.

    Raises:
        ObservationError: not an array, wrong rank or channels, a dtype that is neither uint8 nor float, NaN, or out of range.
    """
    array = check_image(image, key)
    if array.dtype != np.uint8:
        low, high = float(array.min()), float(array.max())
        if low < -_RANGE_TOLERANCE or high > 1 + _RANGE_TOLERANCE:
            raise ObservationError(f"{key}: float image with values from {low:.4g} to {high:.4g}, expected [0, 1]; send uint8 or divide by 255")
        array = convert_to_uint8(np.clip(array, 0, 1))
    result: NDArray[np.uint8] = array
    return result


def check_image(image: object, key: str) -> NDArray[Any]:
    """A client's image under ``key`` as HWC, uint8 or finite float, values untouched.

    Raises:
        ObservationError: as :func:`parse_image`, but any finite range of floats passes.
    """
    if not isinstance(image, np.ndarray):
        raise ObservationError(f"{key}: expected an image array [height, width, 3], got {type(image).__name__}")
    if image.ndim != 3 or 3 not in (image.shape[0], image.shape[2]):
        raise ObservationError(f"{key}: image has shape {list(image.shape)}, expected [height, width, 3] or [3, height, width]")
    if image.shape[0] == 3:  # upstream's rule, also when the last axis has size 3 as well
        image = np.moveaxis(image, 0, -1)
    if 0 in image.shape or max(image.shape) > MAX_SIDE:
        raise ObservationError(f"{key}: image is {image.shape[0]} × {image.shape[1]} pixels, expected 1 to {MAX_SIDE} on each side")
    if 0 in _fitted(image.shape[0], image.shape[1], IMAGE_SIZE, IMAGE_SIZE):
        raise ObservationError(
            f"{key}: image is {image.shape[0]} × {image.shape[1]} pixels, so narrow that nothing of it is left at {IMAGE_SIZE} × {IMAGE_SIZE}; "
            f"expected at most {IMAGE_SIZE} times as long as wide"
        )
    if image.dtype != np.uint8:
        if not np.issubdtype(image.dtype, np.floating):
            raise ObservationError(f"{key}: image has dtype {image.dtype}, expected uint8 (0 to 255) or float (0 to 1)")
        if not np.isfinite(image).all():
            raise ObservationError(f"{key}: image holds NaN or infinity")
    return image


def _fitted(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """Size of the image inside the letter box; sizes are truncated, not rounded, as upstream."""
    ratio = max(width / target_width, height / target_height)
    return int(height / ratio), int(width / ratio)


def _linear_weights(size: int, new_size: int) -> NDArray[np.float32]:
    """``[new_size, size]`` weights of a linear resize with half-pixel centres, the triangle widened when it shrinks."""
    # float32 throughout: the sample positions are where upstream's own rounding shows.
    scale = np.float32(size / new_size if new_size else 1.0)
    support = max(scale, np.float32(1.0))
    centres = (np.arange(new_size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    distance = np.abs(centres[:, None] - np.arange(size, dtype=np.float32)[None, :]) / support
    weights = np.maximum(np.float32(0.0), np.float32(1.0) - distance)
    total = weights.sum(axis=1, keepdims=True)
    normalized: NDArray[np.float32] = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return normalized
