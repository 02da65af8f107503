"""Camera images as JPEG inside an observation: a ``bytes`` value that begins as a JPEG does.

A 224 × 224 camera is 150 kB raw and about 10 kB as JPEG of quality 90, for 0.15 ms at each end (docs/benchmarks.md). It is lossy, and so
only ever the client's choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0.errors import ObservationError

_MAGIC = b"\xff\xd8\xff"
_MAX_SIDE = 8192

Path = tuple[str, ...]


def encode(image: NDArray[np.uint8], *, quality: int = 90) -> bytes:
    """``[h, w, 3]`` RGB uint8 → JPEG; colour at half the resolution below quality 95, at the full one from there on.

    Raises:
        ValueError: the array is not such an image, or ``quality`` is not in 1–100.
    """
    import simplejpeg

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image: got {image.dtype} {list(image.shape)}, expected uint8 [h, w, 3]")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality: got {quality}, expected 1 to 100")
    subsampling = "420" if quality < 95 else "444"
    jpeg: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling=subsampling)
    return jpeg


def jpeg_paths(observation: Mapping[str, Any]) -> list[Path]:
    """Where in ``observation`` there are JPEG images."""
    return [path for path, value in _leaves(observation, ()) if isinstance(value, bytes) and value[:3] == _MAGIC]


def channels_first(image_specs: Sequence[Mapping[str, Any]]) -> frozenset[Path]:
    """The cameras that a policy wants as ``[3, h, w]`` (reference/wire.md §5.1)."""
    return frozenset(tuple(map(str, spec["path"])) for spec in image_specs if spec["target_shape"][2] != 3 and spec["target_shape"][0] == 3)


def decoded(
    observation: Mapping[str, Any], paths: Sequence[Path], *, chw: frozenset[Path] = frozenset(), max_bytes: int, taken_bytes: int = 0
) -> dict[str, Any]:
    """``observation`` with the images at ``paths`` as uint8 RGB arrays, ``[h, w, 3]`` or, where ``chw`` says so, ``[3, h, w]``.

    Args:
        max_bytes: how much all decoded images of a request may hold; checked on their headers.
        taken_bytes: what those of its other observations hold.

    Raises:
        ObservationError: an image is damaged or too large; names its key.
    """
    import simplejpeg

    images: dict[Path, bytes] = {path: _at(observation, path) for path in paths}
    left = max_bytes - taken_bytes
    for path, jpeg in images.items():
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg, strict=True)
        except ValueError as error:
            raise _damaged(path, error) from error
        if max(height, width) > _MAX_SIDE:
            raise ObservationError(
                f"{_dotted(path)}: the JPEG is {width} × {height} pixels, expected at most {_MAX_SIDE} on a side; resize it before sending"
            )
        left -= height * width * 3
        if left < 0:
            raise ObservationError(f"{_dotted(path)}: the JPEG images decode to more than {max_bytes} bytes; resize them before sending")
    result = dict(observation)
    for path, jpeg in images.items():
        try:
            image = simplejpeg.decode_jpeg(jpeg, colorspace="RGB", strict=True)
        except ValueError as error:
            raise _damaged(path, error) from error
        image.flags.writeable = False
        _put(result, path, image.transpose(2, 0, 1) if path in chw else image)
    return result


def image_bytes(observation: Mapping[str, Any], paths: Sequence[Path]) -> int:
    """What the decoded images at ``paths`` hold."""
    return sum(_at(observation, path).nbytes for path in paths)


def _leaves(value: Mapping[Any, Any], path: Path) -> list[tuple[Path, Any]]:
    found: list[tuple[Path, Any]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            found += _leaves(item, (*path, key))
        else:
            found.append(((*path, key), item))
    return found


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _put(value: dict[str, Any], path: Path, item: Any) -> None:
    for key in path[:-1]:
        value[key] = value = dict(value[key])
    value[path[-1]] = item


def _damaged(path: Path, error: ValueError) -> ObservationError:
    return ObservationError(f"{_dotted(path)}: the JPEG cannot be read ({' '.join(str(error).split())})")


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))
