"""Pictures → image tokens, each picture once: they do not depend on what is asked about it.

The planner's own endpoint, the action endpoint, retries, replays and several tasks over one frame ask about the same pictures. What the tower made
of the latest ones is kept on the device.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from pi0.param_tree import IMAGE_SIZE, VisionDims
from planner import siglip

KEPT: Final = 32
"""Pictures that are remembered, with 0.6 MB each on the host, and 1 MB on the device at full size in bfloat16."""

AT_ONCE: Final = (8, 4, 2, 1)
"""How many pictures a program of an accelerator encodes; three take the one for two and the one for one. On a CPU several at once are hardly faster
than one after the other (by a tenth), so it has the program for one, and no other to compile."""

_SAMPLE_STEP = 997
"""Two pictures are compared in full only if every so many of their values are equal."""

Image = NDArray[np.float32]


class ImageEncoder:
    """The compiled tower, and what it made of the latest pictures. For one thread at a time.

    Attributes:
        encoded, reused: how many pictures the tower ran for, and how many were known.
    """

    def __init__(self, params: siglip.SiglipParams, dims: VisionDims, width: int, dtype: Any) -> None:
        self._params = params
        self._dims = dims
        self._dtype = jnp.dtype(dtype)
        self._at_once = AT_ONCE if jax.default_backend() != "cpu" else AT_ONCE[-1:]
        self._programs: dict[int, Any] = {}
        self._known: OrderedDict[bytes, tuple[Image, jax.Array]] = OrderedDict()
        self.encoded = self.reused = 0
        self.blank = jnp.zeros((dims.tokens, width), self._dtype)
        """What stands in the slot of a camera that is not there; masked, so nothing sees it."""

    def programs_for(self, images: int) -> list[Callable[[], None]]:
        """What compiles the programs that up to ``images`` pictures at once need and that are not there yet."""
        return [functools.partial(self._compile, count) for count in self._at_once if count <= images and count not in self._programs]

    def __call__(self, images: Sequence[Image]) -> list[jax.Array]:
        """Tokens ``[T, W]`` of each picture ``[224, 224, 3]`` in [-1, 1]; pictures that are equal, now or lately, are encoded once."""
        found: dict[int, jax.Array] = {}
        missing: dict[bytes, Image] = {}
        places: dict[bytes, list[int]] = {}
        for place, image in enumerate(images):
            key = image.flat[::_SAMPLE_STEP].tobytes()
            known = self._known.get(key)
            if known is not None and np.array_equal(known[0], image):
                self._known.move_to_end(key)
                found[place] = known[1]
                self.reused += 1
                continue
            while key in missing and not np.array_equal(missing[key], image):
                key += b"another picture with the same sample"
            self.reused += key in missing
            missing.setdefault(key, image.copy())  # the caller may use its array again
            places.setdefault(key, []).append(place)
        self.encoded += len(missing)
        for key, tokens in zip(missing, self._encode(list(missing.values())), strict=True):
            self._known[key] = missing[key], tokens
            self._known.move_to_end(key)
            found |= dict.fromkeys(places[key], tokens)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return [found[place] for place in range(len(images))]

    def _encode(self, images: Sequence[Image]) -> list[jax.Array]:
        tokens: list[jax.Array] = []
        while left := images[len(tokens) :]:
            count = next(count for count in self._at_once if count <= len(left))
            if count not in self._programs:
                self._compile(count)
            tokens += self._programs[count](self._params, images=np.stack(left[:count]))
        return tokens

    def _compile(self, count: int) -> None:
        def encode(params: siglip.SiglipParams, images: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(siglip.encode_images(params, self._dims, images, self._dtype))

        images = jax.ShapeDtypeStruct((count, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
        with jax.default_matmul_precision("highest"):
            self._programs[count] = jax.jit(encode).lower(self._params, images=images).compile()
