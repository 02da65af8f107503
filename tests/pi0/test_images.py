import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0.errors import ObservationError
from pi0.images import MAX_SIDE, convert_to_uint8, parse_image, resize_with_pad, resize_with_pad_linear
from tests.golden_data import GOLDEN

PIL = np.load(GOLDEN / "transforms" / "resize_pil.npz")
JAX = np.load(GOLDEN / "transforms" / "resize_jax.npz")
UINT8 = np.load(GOLDEN / "transforms" / "convert_to_uint8.npz")


def cases(archive):
    return [(row["name"], row["height"], row["width"]) for row in json.loads(str(archive["index_json"]))]


@pytest.mark.parametrize(("name", "height", "width"), cases(PIL))
def test_pil_resize_is_exact(name, height, width):
    np.testing.assert_array_equal(resize_with_pad(PIL[f"{name}/in"], height, width), PIL[f"{name}/out"])


@pytest.mark.parametrize(("name", "height", "width"), cases(JAX))
def test_model_side_resize(name, height, width):
    out, expected = resize_with_pad_linear(JAX[f"{name}/in"], height, width), JAX[f"{name}/out"]
    assert out.dtype == expected.dtype
    np.testing.assert_allclose(out.astype(np.float64), expected.astype(np.float64), atol=1 if out.dtype == np.uint8 else 1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["float32", "float64", "uint8"])
def test_convert_to_uint8(kind):
    np.testing.assert_array_equal(convert_to_uint8(UINT8[f"{kind}_in"]), UINT8[f"{kind}_out"])


def test_parse_image_layouts():
    hwc = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(parse_image(hwc, "k"), hwc)
    np.testing.assert_array_equal(parse_image(np.moveaxis(hwc, -1, 0), "k"), hwc)
    np.testing.assert_array_equal(parse_image(hwc / np.float32(255), "k").astype(int), (hwc / np.float32(255) * 255).astype(np.uint8))
    assert parse_image(np.ones((3, 4, 3), np.uint8), "k").shape == (4, 3, 3), "the first axis decides when both are 3"


IMAGE = np.zeros((4, 4, 3), np.float32)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([[1, 2, 3]], "cam: expected an image array [height, width, 3], got list"),
        (None, "cam: expected an image array [height, width, 3], got NoneType"),
        (np.zeros((4, 4), np.uint8), "cam: image has shape [4, 4], expected [height, width, 3] or [3, height, width]"),
        (np.zeros((4, 4, 4), np.uint8), "cam: image has shape [4, 4, 4], expected [height, width, 3] or [3, height, width]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "cam: image has shape [1, 4, 4, 3], expected [height, width, 3] or [3, height, width]"),
        (np.zeros((0, 4, 3), np.uint8), f"cam: image is 0 × 4 pixels, expected 1 to {MAX_SIDE} on each side"),
        (np.zeros((1, MAX_SIDE + 1, 3), np.uint8), f"cam: image is 1 × {MAX_SIDE + 1} pixels, expected 1 to {MAX_SIDE} on each side"),
        (
            np.zeros((1, 225, 3), np.uint8),
            "cam: image is 1 × 225 pixels, so narrow that nothing of it is left at 224 × 224; expected at most 224 times as long as wide",
        ),
        (np.zeros((4, 4, 3), np.int64), "cam: image has dtype int64, expected uint8 (0 to 255) or float (0 to 1)"),
        (np.zeros((4, 4, 3), np.bool_), "cam: image has dtype bool, expected uint8 (0 to 255) or float (0 to 1)"),
        (np.full((4, 4, 3), "x"), "cam: image has dtype <U1, expected uint8 (0 to 255) or float (0 to 1)"),
        (IMAGE * np.nan, "cam: image holds NaN or infinity"),
        (IMAGE + np.inf, "cam: image holds NaN or infinity"),
        (IMAGE + 255, "cam: float image with values from 255 to 255, expected [0, 1]; send uint8 or divide by 255"),
        (IMAGE - 0.5, "cam: float image with values from -0.5 to -0.5, expected [0, 1]; send uint8 or divide by 255"),
    ],
)
def test_parse_image_errors(image, message):
    with pytest.raises(ObservationError) as caught:
        parse_image(image, "cam")
    assert str(caught.value) == message


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_both_resizes_agree_within_rounding(height, width, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    a, b = resize_with_pad(image, 40, 40), resize_with_pad_linear(image, 40, 40)
    assert a.shape == b.shape == (40, 40, 3)
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
