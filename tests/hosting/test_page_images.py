from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hosting.page_images import MAX_SHOWN_SIDE, MAX_UPLOAD_PIXELS, MAX_UPLOAD_SIDE, from_upload, to_jpeg
from pi0.errors import ObservationError


def shown(image: Any) -> Any:
    return simplejpeg.decode_jpeg(to_jpeg(image), colorspace="RGB")


def file(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "value"),
    [
        (np.full((8, 10, 3), 200, np.uint8), 200),
        (np.full((3, 8, 10), 200, np.uint8), 200),
        (np.full((8, 10, 1), 200, np.uint8), 200),
        (np.full((1, 8, 10), 0.5, np.float32), 127),
        (np.full((8, 10, 3), 0.5, np.float64), 127),
        (np.full((8, 10, 3), -0.5, np.float32), 63),
        (np.full((8, 10, 3), 200.0, np.float16), 200),
        (np.full((8, 10, 3), np.nan, np.float32), 0),
    ],
)
def test_every_form_of_an_image_is_shown(image: Any, value: int) -> None:
    picture = shown(image)
    assert picture.shape == (8, 10, 3) and np.abs(picture.astype(int) - value).max() <= 2


@pytest.mark.parametrize("shape", [(4000, 100, 3), (3, 1200, 1800)])
def test_a_large_one_is_made_smaller(shape: tuple[int, ...]) -> None:
    picture = shown(np.zeros(shape, np.uint8))
    assert max(picture.shape[:2]) == MAX_SHOWN_SIDE


def test_views_with_any_strides_are_shown() -> None:
    assert shown(np.zeros((16, 20, 3), np.uint8)[::-2, ::-2]).shape == (8, 10, 3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_every_png_becomes_rgb(mode: str) -> None:
    array = from_upload(file(Image.new(mode, (20, 10))))
    assert array.shape == (10, 20, 3) and array.dtype == np.uint8


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_jpeg_becomes_rgb(mode: str) -> None:
    assert from_upload(file(Image.new(mode, (20, 10)), "JPEG")).shape == (10, 20, 3)


def test_a_photo_stands_upright() -> None:
    picture = Image.new("RGB", (20, 10))
    picture.paste((255, 0, 0), (0, 0, 10, 10))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    array = from_upload(file(picture, "JPEG", exif=exif, quality=95))
    assert array.shape == (20, 10, 3) and array[2, 5, 0] > 200 and array[17, 5, 0] < 50


def test_a_large_one_is_decoded_small() -> None:
    array = from_upload(file(Image.new("RGB", (4000, 3000)), "JPEG"))
    assert array.shape == (768, MAX_UPLOAD_SIDE, 3)


@pytest.mark.parametrize(("width", "height"), [(6000, 6000), (2**31 - 1, 1), (40_000, 40_000)])
def test_a_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    assert width * height > MAX_UPLOAD_PIXELS
    with pytest.raises(ObservationError, match=r"^image: "):
        from_upload(bomb)


@pytest.mark.parametrize(
    "body", [b"", b"GIF89a", file(Image.new("RGB", (8, 8)), "GIF"), file(Image.new("RGB", (8, 8)), "BMP"), b"%!PS-Adobe-3.0 EPSF-3.0"]
)
def test_anything_else_is_refused(body: bytes) -> None:
    with pytest.raises(ObservationError, match="it begins as neither does"):
        from_upload(body)


WHOLE = {kind: file(Image.effect_noise((64, 48), 60).convert("RGB"), kind) for kind in ("PNG", "JPEG")}


@given(kind=st.sampled_from(["PNG", "JPEG"]), data=st.data())
def test_a_damaged_one_is_refused_or_shown_but_nothing_else(kind: str, data: st.DataObject) -> None:
    body = bytearray(WHOLE[kind])
    for place in data.draw(st.lists(st.integers(0, len(body) - 1), max_size=8)):
        body[place] = data.draw(st.integers(0, 255))
    del body[data.draw(st.integers(0, len(body))) :]
    try:
        array = from_upload(bytes(body))
    except ObservationError as error:
        assert str(error).startswith("image: ")
    else:
        assert array.ndim == 3 and array.shape[2] == 3
