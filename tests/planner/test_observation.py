from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pi0.errors import ObservationError
from planner.observation import prepare_cameras, prepare_image

PIXELS = np.zeros((224, 224, 3), np.uint8)


def test_ranges_and_layouts_give_the_same_image() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
    expected = pixels.astype(np.float64) / 127.5 - 1
    forms = [pixels, np.moveaxis(pixels, -1, 0), pixels / 255, (pixels / 255).astype(np.float32), expected, np.moveaxis(expected, -1, 0)]
    for form in forms:
        prepared = prepare_image(form, "cam")
        assert prepared.dtype == np.float32
        np.testing.assert_allclose(prepared, expected, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([np.uint8, np.float32, np.float64, np.float16]), st.booleans())
def test_any_size_becomes_224_and_stays_in_range(height: int, width: int, dtype: Any, channels_first: bool) -> None:
    assume(max(height, width) <= 224 * min(height, width))  # a narrower one has no pixel at 224 × 224
    image = np.random.default_rng(0).integers(0, 2, (3, height, width) if channels_first else (height, width, 3)).astype(dtype)
    prepared = prepare_image(image, "cam")
    assert prepared.shape == (224, 224, 3)
    assert prepared.min() >= -1
    assert prepared.max() <= 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("a picture", "cam: expected an image array"),
        (np.zeros((224, 224), np.uint8), "cam: image has shape [224, 224]"),
        (np.zeros((1, 224, 224, 3), np.uint8), "cam: image has shape [1, 224, 224, 3]"),
        (np.zeros((224, 224, 4), np.uint8), "cam: image has shape [224, 224, 4]"),
        (np.zeros((0, 224, 3), np.uint8), "cam: image is 0 × 224 pixels"),
        (np.zeros((224, 224, 3), np.int32), "cam: image has dtype int32"),
        (np.zeros((224, 224, 3), np.bool_), "cam: image has dtype bool"),
        (np.full((224, 224, 3), np.nan, np.float32), "cam: image holds NaN"),
        (np.full((224, 224, 3), np.inf, np.float32), "cam: image holds NaN or infinity"),
        (np.full((224, 224, 3), 255, np.float32), "cam: float image with values from 255 to 255, expected [0, 1] or [-1, 1]"),
        (np.full((224, 224, 3), -1.5, np.float32), "cam: float image with values from -1.5 to -1.5"),
    ],
)
def test_bad_images_are_errors_that_name_the_key(image: Any, message: str) -> None:
    with pytest.raises(ObservationError) as error:
        prepare_image(image, "cam")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_errors_name_the_key_that_the_client_sent() -> None:
    with pytest.raises(ObservationError, match=r"^cam_left_wrist: image has dtype int64"):
        prepare_cameras({"cam_high": PIXELS, "cam_left_wrist": PIXELS.astype(np.int64)}, "mask")


def test_masked_cameras_are_left_out_and_grey_ones_filled_in_model_order() -> None:
    white = np.full((224, 224, 3), 255, np.uint8)
    observed = {"right_wrist_0_rgb": white, "base_0_rgb": PIXELS}
    assert [image.mean() for image in prepare_cameras(observed, "mask")] == [-1, 1]
    assert [image.mean() for image in prepare_cameras(observed, "grey")] == [-1, 0, 1]
    assert [image.mean() for image in prepare_cameras({}, "grey")] == [0, 0, 0]


@pytest.mark.parametrize("missing_cameras", ["mask", "grey"])
def test_unknown_cameras_only_is_an_error_naming_them(missing_cameras: Any) -> None:
    with pytest.raises(ObservationError, match=r"found: cam_low, webcam"):
        prepare_cameras({"webcam": PIXELS, "cam_low": PIXELS}, missing_cameras)


def test_no_camera_is_an_error_unless_grey_ones_are_wanted() -> None:
    with pytest.raises(ObservationError, match=r"found: none"):
        prepare_cameras({}, "mask")


def test_one_camera_under_two_names_is_an_error() -> None:
    with pytest.raises(ObservationError, match=r"camera base_0_rgb was already given as cam_high"):
        prepare_cameras({"cam_high": PIXELS, "base_0_rgb": PIXELS}, "mask")
