"""Pictures on their way to and from the page: an observation's array becomes a JPEG, an uploaded file an array. Pure; slow, so for a thread."""

from __future__ import annotations

import io
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from hosting.logs import one_line
from hosting.protocol import jpeg
from pi0.errors import ObservationError

MAX_SHOWN_SIDE: Final = 960
"""Larger pictures are made smaller before they are sent to the page."""

MAX_UPLOAD_PIXELS: Final = 32_000_000
"""Above what telephones take as a rule (12 to 24 megapixels); a colour picture of so many holds 128 MB while it is decoded."""

MAX_UPLOAD_SIDE: Final = 1024
"""What an upload is made to fit; the models see 224 × 224 of it."""

_QUALITY = 85


def to_jpeg(image: NDArray[Any]) -> bytes:
    """``[h, w, c]`` or ``[c, h, w]``, 1 or 3 channels, uint8 or float in [0, 1], [-1, 1] or [0, 255] → JPEG, at most ``MAX_SHOWN_SIDE`` on a side."""
    array = image if image.shape[2] in (1, 3) else np.moveaxis(image, 0, -1)
    step = max(1, max(array.shape[:2]) // (2 * MAX_SHOWN_SIDE))
    array = array[::step, ::step]  # of a very large one, Pillow need not see every pixel
    if array.dtype != np.uint8:
        array = _to_uint8(array)
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    if max(array.shape[:2]) > MAX_SHOWN_SIDE:
        picture = Image.fromarray(np.ascontiguousarray(array))
        picture.thumbnail((MAX_SHOWN_SIDE, MAX_SHOWN_SIDE), Image.Resampling.BILINEAR)
        array = np.asarray(picture)
    return jpeg.encode(array, quality=_QUALITY)


def _to_uint8(image: NDArray[Any]) -> NDArray[np.uint8]:
    """As the planner reads float images, and for those that no model takes, whatever looks right."""
    with np.errstate(invalid="ignore", over="ignore"):
        values = np.nan_to_num(image.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if high > 1.5:
        scaled = values
    elif low < -0.01:
        scaled = (values + 1) * 127.5
    else:
        scaled = values * 255
    return np.clip(scaled, 0, 255).astype(np.uint8)


def from_upload(body: bytes) -> NDArray[np.uint8]:
    """A JPEG or PNG file → ``[h, w, 3]`` RGB, upright as its EXIF data says, at most ``MAX_UPLOAD_SIDE`` on a side.

    Raises:
        ObservationError: it is neither, is damaged, or has more than ``MAX_UPLOAD_PIXELS``.
    """
    try:
        with Image.open(io.BytesIO(body), formats=("JPEG", "PNG")) as picture:
            width, height = picture.size
            if width * height > MAX_UPLOAD_PIXELS:
                raise ObservationError(
                    f"image: has {width} × {height} pixels, expected at most {MAX_UPLOAD_PIXELS // 1_000_000} million; make it smaller"
                )
            picture.draft("RGB", (MAX_UPLOAD_SIDE, MAX_UPLOAD_SIDE))  # a JPEG is decoded no larger than it need be
            upright = ImageOps.exif_transpose(picture).convert("RGB")
    except ObservationError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they like
        reason = one_line(str(error)) if not isinstance(error, UnidentifiedImageError) else "it begins as neither does"
        raise ObservationError(f"image: cannot be read as JPEG or PNG ({reason[:200]}); send another file") from error
    upright.thumbnail((MAX_UPLOAD_SIDE, MAX_UPLOAD_SIDE), Image.Resampling.BILINEAR)
    return np.asarray(upright)
