"""JPEG images inside observations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hosting.policy import ObservationError
from hosting.protocol import jpeg

PLENTY = 1 << 30


def picture(height: int = 32, width: int = 48) -> np.ndarray[Any, Any]:
    """Smooth, as camera images are, and different in each channel and direction."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // height, x * 255 // width, np.full_like(y, 80)], axis=-1).astype(np.uint8)


def test_round_trip_is_close_and_rgb() -> None:
    for quality, tolerance in ((90, 6), (95, 4)):
        obs = {"a": jpeg.encode(picture(), quality=quality)}
        image = jpeg.decoded(obs, jpeg.jpeg_paths(obs), max_bytes=PLENTY)["a"]
        assert image.shape == (32, 48, 3) and image.dtype == np.uint8 and not image.flags.writeable
        assert np.abs(image.astype(int) - picture()).max() <= tolerance


def test_images_are_found_wherever_they_are_and_nothing_else_is_touched() -> None:
    data = jpeg.encode(picture())
    obs = {
        "images": {"cam": data, "raw": np.zeros((2, 2, 3), np.uint8)},
        "observation/image": data,
        "note": b"\xff\xd8",
        "list": [data],
        "prompt": "x",
    }
    before = {**obs, "images": dict(obs["images"])}  # type: ignore[call-overload]
    paths = jpeg.jpeg_paths(obs)
    assert paths == [("images", "cam"), ("observation/image",)]
    result = jpeg.decoded(obs, paths, max_bytes=PLENTY)
    assert result["images"]["cam"].shape == result["observation/image"].shape == (32, 48, 3)
    assert result["images"]["raw"] is obs["images"]["raw"] and result["list"] is obs["list"]  # type: ignore[index]
    assert obs.keys() == before.keys() and obs["images"] == before["images"], "the observation itself is not modified"


def test_cameras_that_want_channels_first_get_them() -> None:
    specs = [
        {"path": ["images", "high"], "target_shape": [3, 224, 224], "dtype": "uint8"},
        {"path": ["images", "low"], "target_shape": [224, 224, 3], "dtype": "uint8"},
        {"path": ["images", "odd"], "target_shape": [3, 224, 3], "dtype": "uint8"},
    ]
    chw = jpeg.channels_first(specs)
    assert chw == {("images", "high")}
    obs = {"images": {name: jpeg.encode(picture()) for name in ("high", "low", "odd")}}
    images = jpeg.decoded(obs, jpeg.jpeg_paths(obs), chw=chw, max_bytes=PLENTY)["images"]
    assert [images[name].shape for name in ("high", "low", "odd")] == [(3, 32, 48), (32, 48, 3), (32, 48, 3)]
    np.testing.assert_array_equal(images["high"].transpose(1, 2, 0), images["low"])


def test_a_grey_jpeg_becomes_rgb() -> None:
    import simplejpeg

    data = simplejpeg.encode_jpeg(np.full((8, 8, 1), 77, np.uint8), colorspace="GRAY")
    image = jpeg.decoded({"a": data}, [("a",)], max_bytes=PLENTY)["a"]
    assert image.shape == (8, 8, 3) and np.ptp(image) == 0


def test_sizes_are_checked_on_the_headers() -> None:
    data = jpeg.encode(picture(32, 48))
    size = 32 * 48 * 3
    jpeg.decoded({"a": data}, [("a",)], max_bytes=size)
    with pytest.raises(ObservationError) as error:
        jpeg.decoded({"a": {"b": data}, "c": data}, [("a", "b"), ("c",)], max_bytes=2 * size - 1)
    assert str(error.value) == f"c: the JPEG images decode to more than {2 * size - 1} bytes; resize them before sending"
    # SOF0's height and width say 64,000 x 64,000: 12 GB that nobody sent.
    start = data.index(b"\xff\xc0") + 5
    lying = data[:start] + b"\xfa\x00\xfa\x00" + data[start + 4 :]
    with pytest.raises(ObservationError, match=r"^a: the JPEG is 64000 × 64000 pixels, expected at most 8192 on a side"):
        jpeg.decoded({"a": lying}, [("a",)], max_bytes=PLENTY)


@pytest.mark.parametrize("data", [b"\xff\xd8\xff", b"\xff\xd8\xff\xe0" + b"\0" * 50, jpeg.encode(picture())[:-200]])
def test_a_damaged_image_names_its_key(data: bytes) -> None:
    with pytest.raises(ObservationError, match=r"^images\.cam: the JPEG cannot be read \(.+\)$"):
        jpeg.decoded({"images": {"cam": data}}, [("images", "cam")], max_bytes=PLENTY)


@pytest.mark.parametrize(
    ("image", "quality", "problem"),
    [
        (np.zeros((2, 2, 3)), 90, r"image: got float64 \[2, 2, 3\], expected uint8 \[h, w, 3\]"),
        (np.zeros((2, 2, 4), np.uint8), 90, r"image: got uint8 \[2, 2, 4\]"),
        (np.zeros((0, 2, 3), np.uint8), 90, r"image: got uint8 \[0, 2, 3\]"),
        (np.zeros((2, 2, 3), np.uint8), 0, "quality: got 0, expected 1 to 100"),
    ],
)
def test_what_cannot_be_encoded(image: Any, quality: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        jpeg.encode(image, quality=quality)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_images_decode_or_are_refused(data: st.DataObject) -> None:
    body = bytearray(jpeg.encode(picture(16, 16)))
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(3, len(body) - 1))] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.integers(3, len(body)))]
    try:
        image = jpeg.decoded({"a": bytes(body)}, [("a",)], max_bytes=1 << 20)["a"]
    except ObservationError as error:
        assert str(error).startswith("a: ")
    else:
        assert image.ndim == 3 and image.nbytes <= 1 << 20
