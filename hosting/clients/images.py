"""Cameras made small before they are sent: resized as the server would, then optionally JPEG.

The resize is ``resize_with_pad`` of :mod:`pi0.images`, so that the policy sees the same bytes wherever it is done. What is no image
that could be prepared is sent as it is: the server says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from pi0.errors import ObservationError
from pi0.images import parse_image, resize_with_pad

_Path = tuple[str, ...]


def prepare(
    obs: Mapping[str, Any],
    image_specs: Sequence[Mapping[str, Any]],
    *,
    resize: bool = True,
    encode: Literal["jpeg"] | None = None,
    quality: int = 90,
) -> Mapping[str, Any]:
    """``obs`` with its cameras as ``image_specs`` (reference/wire.md §5.1) ask for them; ``obs`` itself when nothing is to be done.

    A spec's path is found in nested maps and in flat keys with slashes alike. Cameras may be uint8 or float in [0, 1], HWC or CHW;
    a camera that has the wanted shape and dtype passes untouched.

    Args:
        resize: letter-box to the wanted size, in the wanted layout, as uint8.
        encode: ``"jpeg"``: RGB JPEG as ``bytes`` instead; the server restores the layout that its specs name.
        quality: of the JPEG, 1 to 100.
    """
    prepared = obs
    for spec in image_specs:
        found = next(_find(prepared, "/".join(map(str, spec["path"])).split("/")), None)
        if found is None:
            continue
        path, image = found
        result = _prepare_one(image, spec, resize=resize, encode=encode, quality=quality)
        if result is not image:
            prepared = _replaced(prepared, path, result)
    return prepared


def _prepare_one(image: Any, spec: Mapping[str, Any], *, resize: bool, encode: Literal["jpeg"] | None, quality: int) -> Any:
    target = tuple(int(size) for size in spec["target_shape"])
    wanted = isinstance(image, np.ndarray) and image.ndim == 3 and spec.get("dtype", "uint8") == "uint8"
    if not wanted or (encode is None and (not resize or (image.shape == target and image.dtype == np.uint8))):
        return image
    channels_first = target[2] != 3
    try:
        hwc = parse_image(image, "image")
    except ObservationError:
        return image
    if resize:
        height, width = target[1:] if channels_first else target[:2]
        hwc = resize_with_pad(hwc, height, width)
    if encode == "jpeg":
        from hosting.protocol import jpeg

        return jpeg.encode(hwc, quality=quality)
    return np.moveaxis(hwc, -1, 0) if channels_first else hwc


def _find(value: Any, parts: list[str]) -> Iterator[tuple[_Path, Any]]:
    if not isinstance(value, Mapping):
        return
    for end in range(len(parts), 0, -1):
        key = "/".join(parts[:end])
        if key not in value:
            continue
        if end == len(parts):
            yield (key,), value[key]
        else:
            for path, found in _find(value[key], parts[end:]):
                yield (key, *path), found


def _replaced(value: Mapping[str, Any], path: _Path, item: Any) -> dict[str, Any]:
    """A copy of ``value`` along ``path`` only."""
    return {**value, path[0]: item if len(path) == 1 else _replaced(value[path[0]], path[1:], item)}
