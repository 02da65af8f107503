from __future__ import annotations

import jax
import numpy as np
import pytest

from planner import image_tokens, siglip
from planner.image_tokens import AT_ONCE, KEPT, ImageEncoder
from planner.restore import restore_from
from tests.planner.oracle import RandomParams
from tests.planner.test_decoder import ODD_SIZES, random_images

DIMS = ODD_SIZES["fused qkv"]


@pytest.fixture
def encoder() -> ImageEncoder:
    params, _ = restore_from(RandomParams(DIMS), np.array([1, 2], np.int32), np.dtype(np.float32), where="random")
    return ImageEncoder(params.vision, DIMS.vision, DIMS.vlm.width, np.float32)


@pytest.mark.parametrize("at_once", [AT_ONCE[-1:], AT_ONCE])
def test_each_picture_is_encoded_as_alone_and_once(encoder: ImageEncoder, at_once: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_at_once", at_once)
    images = random_images(5)
    params, _ = restore_from(RandomParams(DIMS), np.array([1, 2], np.int32), np.dtype(np.float32), where="random")
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(siglip.encode_images(params.vision, DIMS.vision, np.stack(images), np.dtype(np.float32)))
    order = [3, 0, 3, 1, 4, 2, 0]
    for _ in range(2):
        tokens = encoder([images[place].copy() for place in order])
        for place, got in zip(order, tokens, strict=True):
            np.testing.assert_allclose(got, expected[place], atol=1e-4)
    assert (encoder.encoded, encoder.reused) == (5, 9)
    assert encoder([]) == []


def test_pictures_that_differ_in_one_pixel_are_two(encoder: ImageEncoder) -> None:
    """Also where the sample that is compared first does not tell them apart, together or one after the other."""
    (image,) = random_images(1)
    other = image.copy()
    other.flat[1] += 0.25
    together = encoder([image, other, image])
    assert encoder.encoded == 2 and not np.array_equal(together[0], together[1])
    np.testing.assert_array_equal(together[0], together[2])
    (again,) = encoder([other])
    np.testing.assert_allclose(again, together[1], atol=1e-5)
    (first,) = encoder([image])
    np.testing.assert_allclose(first, together[0], atol=1e-5)


def test_only_the_latest_pictures_are_kept(encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_tokens, "KEPT", 3)
    images = random_images(4)
    encoder(images[:3])
    encoder(images[:1])
    encoder(images[3:])  # the second is the one that was not asked for the longest
    assert encoder.encoded == 4
    encoder([images[0], images[2], images[3]])
    assert encoder.encoded == 4
    encoder([images[1]])
    assert encoder.encoded == 5 and KEPT == 32


def test_a_picture_is_what_it_was_when_it_came(encoder: ImageEncoder) -> None:
    """A caller may use its array again."""
    (image,) = random_images(1)
    (before,) = encoder([image])
    image[:] = 0.5
    (after,) = encoder([image])
    assert not np.array_equal(before, after) and encoder.encoded == 2
    image[0, 0, 1] = 0.25  # seen by no sample
    encoder([image])
    assert encoder.encoded == 3
