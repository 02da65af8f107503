"""What the client does to cameras must be what the server would have done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from action.embodiments import Aloha, Droid, Libero
from hosting.clients.images import prepare
from pi0.images import convert_to_uint8, parse_image, resize_with_pad

HWC = {"path": ["observation/image"], "target_shape": [224, 224, 3], "dtype": "uint8"}
CHW = {"path": ["images", "cam_high"], "target_shape": [3, 224, 224], "dtype": "uint8"}


def random_image(shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), first=st.booleans(), floats=st.booleans(), spec=st.sampled_from([HWC, CHW]))
def test_the_server_gets_what_it_would_have_made_itself(height: int, width: int, first: bool, floats: bool, spec: dict[str, Any]) -> None:
    image: np.ndarray[Any, Any] = random_image((3, height, width) if first else (height, width, 3), height * 301 + width)
    if floats:
        image = (image / np.float32(255)).astype(np.float32)
    obs = {"observation/image": image, "images": {"cam_high": image}}
    prepared = prepare(obs, [spec])
    sent = prepared["observation/image"] if spec is HWC else prepared["images"]["cam_high"]
    try:
        expected = resize_with_pad(parse_image(image, "image"), 224, 224)
    except Exception:  # noqa: BLE001 - what the server refuses goes to it as it is, and gets its words
        assert sent is image
        return
    if spec is CHW:
        expected = np.moveaxis(expected, -1, 0)
    assert sent.dtype == np.uint8 and (sent == expected).all()
    assert obs["images"]["cam_high"] is image, "the caller's observation stays as it is"  # type: ignore[index]


def test_floats_are_truncated_as_openpis_clients_do() -> None:
    image = np.linspace(0, 1, 224 * 224 * 3, dtype=np.float64).reshape(224, 224, 3)
    assert (prepare({"observation/image": image}, [HWC])["observation/image"] == convert_to_uint8(image)).all()


def test_what_matches_already_is_not_touched() -> None:
    obs = {"observation/image": random_image((224, 224, 3)), "prompt": "x"}
    assert prepare(obs, [HWC, CHW]) is obs
    nested = {"images": {"cam_high": random_image((3, 224, 224)), "other": 1}}
    assert prepare(nested, [CHW]) is nested


@pytest.mark.parametrize(
    "obs",
    [{"images": {"cam_high": 0}}, {"images/cam_high": 0}],
    ids=["nested", "flat"],
)
def test_a_path_is_found_nested_and_flat(obs: dict[str, Any]) -> None:
    image = random_image((480, 640, 3))
    key = next(iter(obs))
    full = {key: {"cam_high": image} if isinstance(obs[key], dict) else image, "state": np.ones(14)}
    prepared = prepare(full, [CHW])
    sent = prepared[key]["cam_high"] if isinstance(prepared[key], dict) else prepared[key]
    assert sent.shape == (3, 224, 224) and prepared["state"] is full["state"]


def test_a_flat_spec_is_found_in_nested_maps() -> None:
    prepared = prepare({"observation": {"image": random_image((10, 20, 3)), "state": 1}}, [HWC])
    assert prepared["observation"]["image"].shape == (224, 224, 3) and prepared["observation"]["state"] == 1


@pytest.mark.parametrize(
    "image",
    [
        None,
        "text",
        b"\xff\xd8\xff",
        [[1]],
        np.zeros((2, 224, 224, 3), np.uint8),
        np.zeros((10, 10), np.uint8),
        np.zeros((10, 10, 4), np.uint8),
        np.zeros((10, 10, 3), np.int64),
        np.full((10, 10, 3), np.nan),
        np.full((10, 10, 3), 255.0),
        np.zeros((1, 1000, 3), np.uint8),
        np.zeros((0, 10, 3), np.uint8),
    ],
    ids=lambda image: f"{image.dtype}{list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__,
)
@pytest.mark.parametrize("encode", [None, "jpeg"])
def test_what_is_no_image_goes_to_the_server_as_it_is(image: Any, encode: Any) -> None:
    obs = {"observation/image": image, "images": "no map"}
    assert prepare(obs, [HWC, CHW], encode=encode) is obs


def test_other_dtypes_are_the_servers_business() -> None:
    obs = {"observation/image": random_image((10, 10, 3))}
    assert prepare(obs, [{**HWC, "dtype": "float32"}]) is obs


def test_without_resizing_nothing_is_resized() -> None:
    obs = {"observation/image": random_image((10, 12, 3))}
    assert prepare(obs, [HWC], resize=False) is obs
    jpeg = prepare(obs, [HWC], resize=False, encode="jpeg")["observation/image"]
    assert simplejpeg.decode_jpeg(jpeg, colorspace="RGB").shape == (10, 12, 3)


def gradient(height: int, width: int) -> np.ndarray[Any, Any]:
    """Something that JPEG is made for; the three channels differ."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) * 255 // (height + width)], -1).astype(np.uint8)


@pytest.mark.parametrize("spec", [HWC, CHW], ids=["HWC", "CHW"])
@pytest.mark.parametrize("quality", [90, 95])
def test_jpeg_is_close_and_in_rgb(spec: dict[str, Any], quality: int) -> None:
    image = gradient(480, 640)
    prepared = prepare({"observation/image": image, "images": {"cam_high": np.moveaxis(image, -1, 0)}}, [spec], encode="jpeg", quality=quality)
    sent = prepared["observation/image"] if spec is HWC else prepared["images"]["cam_high"]
    assert isinstance(sent, bytes) and sent[:3] == b"\xff\xd8\xff" and len(sent) < 20_000
    decoded = simplejpeg.decode_jpeg(sent, colorspace="RGB").astype(int)
    assert np.abs(decoded - resize_with_pad(image, 224, 224)).mean() < 1.5


@pytest.mark.parametrize("embodiment", [Aloha(), Droid(), Libero()], ids=lambda embodiment: type(embodiment).__name__)
def test_every_embodiments_specs(embodiment: Any) -> None:
    specs = [spec.as_metadata() for spec in embodiment.image_specs]
    obs: dict[str, Any] = {}
    for spec in specs:
        at = obs
        for key in spec["path"][:-1]:
            at = at.setdefault(key, {})
        at[spec["path"][-1]] = random_image((60, 80, 3))
    prepared = prepare(obs, specs)
    for spec in specs:
        value: Any = prepared
        for key in spec["path"]:
            value = value[key]
        assert list(value.shape) == spec["target_shape"]
