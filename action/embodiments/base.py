"""What an embodiment is: how one robot's observation becomes the model's input, and the model's actions the robot's.

Everything here and in the modules beside it is NumPy on the host. Arrays that come off the wire are read-only views of the
received bytes, so nothing is ever written into an observation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pi0.errors import ObservationError
from pi0.images import parse_image

Array = NDArray[np.float64]
Observation = Mapping[str, Any]

_LISTED_KEYS = 12
_SHOWN_CHARS = 60
"""Bounds on what an error message repeats of a stranger's observation."""


@dataclass(frozen=True)
class ImageSpec:
    """One camera as the server metadata advertises it: clients may resize and transpose to this before they send.

    Attributes:
        path: keys from the observation down to the image.
        shape: ``(height, width, 3)`` or ``(3, height, width)``.
    """

    path: tuple[str, ...]
    shape: tuple[int, int, int]
    dtype: Literal["uint8"] = "uint8"

    def as_metadata(self) -> dict[str, Any]:
        """The map of reference/wire.md §5.1."""
        return {"path": list(self.path), "target_shape": list(self.shape), "dtype": self.dtype}


@dataclass(frozen=True)
class PolicyInputs:
    """A robot's observation in the model's terms, before normalisation, resizing and padding.

    Attributes:
        images: model camera → uint8 ``[h, w, 3]`` of any size. A model camera that is not here is black and masked.
        state: ``[state_dim]``, in the space that the checkpoint's norm stats describe.
    """

    images: Mapping[str, NDArray[np.uint8]]
    state: Array


class Embodiment(Protocol):
    """One kind of robot. Instances are immutable and shared by all requests."""

    @property
    def name(self) -> str:
        """How users call it (``aloha``)."""

    @property
    def state_dim(self) -> int:
        """Width of the state it gives."""

    @property
    def action_dim(self) -> int:
        """Width of the actions it returns."""

    @property
    def image_specs(self) -> tuple[ImageSpec, ...]:
        """The cameras it takes."""

    def inputs(self, observation: Observation) -> PolicyInputs:
        """The model's view of ``observation``; keys that the embodiment does not know are left alone.

        Raises:
            ObservationError: a key is missing, or has the wrong shape, dtype or value.
        """

    def outputs(self, actions: Array) -> Array:
        """Model actions ``[H, A]``, unnormalised and absolute → robot actions ``[H, action_dim]``."""

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        """An observation with everything a full client sends, drawn from ``rng``; for warm-up and trial calls."""


def require(observation: Observation, key: str, expected: str) -> Any:
    """``observation[key]``.

    Raises:
        ObservationError: it is not there; names the keys that are.
    """
    if key not in observation:
        raise ObservationError(f"{key}: missing, expected {expected}; the observation has {listing(observation)}")
    return observation[key]


def vector(value: object, key: str, dim: int, meaning: str) -> Array:
    """``value`` as float64 ``[dim]``; a list of numbers will do, and a bare number where ``dim`` is 1.

    Raises:
        ObservationError: wrong shape, not numbers, or NaN or infinity.
    """
    expected = f"[{dim}] numbers ({meaning})"
    try:
        array = np.asarray(value)
    except ValueError as error:  # a ragged list
        raise ObservationError(f"{key}: got a ragged {type(value).__name__}, expected {expected}") from error
    if array.dtype.kind not in "fiu":
        what = f"dtype {array.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ObservationError(f"{key}: got {what}, expected {expected}")
    if dim == 1 and array.ndim == 0:
        array = array[np.newaxis]
    if array.shape != (dim,):
        raise ObservationError(f"{key}: got shape {list(array.shape)}, expected {expected}")
    finite = np.isfinite(array)
    if not finite.all():
        index = int(np.argmin(finite))
        raise ObservationError(f"{key}: the value at index {index} is {array[index]}, expected finite numbers")
    return array.astype(np.float64)


def flat_images(observation: Observation, cameras: Mapping[str, str]) -> dict[str, NDArray[np.uint8]]:
    """The images under the flat keys of ``cameras`` (client key → model camera), all of which are required."""
    return {camera: parse_image(require(observation, key, "a camera image [height, width, 3]"), key) for key, camera in cameras.items()}


def random_image(rng: np.random.Generator, spec: ImageSpec) -> NDArray[np.uint8]:
    """Noise in the form that ``spec`` asks for."""
    return rng.integers(0, 256, spec.shape, np.uint8)


def shown(key: object) -> str:
    """A stranger's key as an error message may repeat it: one line, bounded."""
    text = repr(key)[1:-1] if isinstance(key, str) else repr(key)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"


def listing(mapping: Mapping[Any, Any]) -> str:
    """The keys of a stranger's map as an error message may repeat them: sorted, one line, bounded."""
    names = sorted(map(shown, mapping))
    more = f" and {len(names) - _LISTED_KEYS} more" if len(names) > _LISTED_KEYS else ""
    return (", ".join(names[:_LISTED_KEYS]) or "no keys") + more
