"""Observations and messages to make malformed requests of."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np

Obs = dict[str, Any]


def good(**changes: Any) -> Obs:
    """An ALOHA observation that is fine but for ``changes``."""
    images = {camera: np.full((3, 224, 224), i, np.uint8) for i, camera in enumerate(("cam_high", "cam_left_wrist", "cam_right_wrist"))}
    return {"state": np.full(14, 0.5), "images": images, "prompt": "pick up the cup", **changes}


def without(key: str) -> Obs:
    """A good observation that lacks ``key``."""
    return {name: value for name, value in good().items() if name != key}


def camera(image: Any, name: str = "cam_high") -> Obs:
    """A good observation with another image in one place."""
    return good(images={**good()["images"], name: image})


def only(mode: str, obs: Obs) -> Obs:
    """``obs`` as a request of ``mode``."""
    return {**obs, "mode": mode}


def tagged(tag: bytes = b"__ndarray__", **fields: Any) -> bytes:
    """A message whose ``state`` is an array (or scalar) in the wire's dialect with these ``data``, ``dtype`` and ``shape``."""
    return bytes(msgpack.packb({"state": {tag: True, **{key.encode(): value for key, value in fields.items()}}}))


def nested(depth: int) -> bytes:
    """A list in a list in a list …"""
    return b"\x91" * depth + b"\xc0"
