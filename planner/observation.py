"""A client's prompt and images → what the planner's model reads (reference/model.md §13.2). Host side, numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pi0.cameras import MODEL_CAMERAS, map_cameras
from pi0.errors import ObservationError
from pi0.images import check_image, resize_with_pad_linear
from pi0.param_tree import IMAGE_SIZE

MissingCameras = Literal["mask", "grey"]

_RANGE_TOLERANCE = 0.01
"""How far a float image may leave its range, as interpolation makes it do; the reference's value."""


def prepare_cameras(images: Mapping[str, Any], missing_cameras: MissingCameras) -> list[NDArray[np.float32]]:
    """The images that the model sees, ``[224, 224, 3]`` in [-1, 1] each, in the order of the model's cameras.

    ``"mask"`` leaves absent cameras out (a masked camera takes no position and is seen by no token, so leaving it out is the
    same); ``"grey"`` shows a grey image in their place, as openpi-flash does.

    Raises:
        ObservationError: no image has the name of a known camera, two are the same camera, or an image is not usable.
    """
    if missing_cameras == "grey" and not images:
        mapped: dict[str, Any] = {}
    else:
        # Each image travels with the client's key, so that an error names the key the client sent.
        keyed = map_cameras({key: (key, image) for key, image in images.items()})
        mapped = {camera: prepare_image(image, key) for camera, (key, image) in keyed.items()}
    if missing_cameras == "grey":
        grey = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
        mapped = {camera: mapped.get(camera, grey) for camera in MODEL_CAMERAS}
    return [mapped[camera] for camera in MODEL_CAMERAS if camera in mapped]


def prepare_image(image: object, key: str) -> NDArray[np.float32]:
    """A client's image (HWC or CHW; uint8, or float in [0, 1] or [-1, 1]) → ``[224, 224, 3]`` float32 in [-1, 1].

    A float image without negative values is taken as [0, 1], as the reference does.

    Raises:
        ObservationError: not an image array, NaN, or values outside both ranges.
    """
    array = check_image(image, key)
    if array.dtype == np.uint8:
        scaled = array.astype(np.float32) / np.float32(127.5) - 1
    else:
        low, high = float(array.min()), float(array.max())
        if low < -1 - _RANGE_TOLERANCE or high > 1 + _RANGE_TOLERANCE:
            raise ObservationError(
                f"{key}: float image with values from {low:.4g} to {high:.4g}, expected [0, 1] or [-1, 1]; send uint8 or divide by 255"
            )
        scaled = array.astype(np.float32)
        if low >= -_RANGE_TOLERANCE:
            scaled = 2 * scaled - 1
    resized: NDArray[np.float32] = resize_with_pad_linear(scaled, IMAGE_SIZE, IMAGE_SIZE)
    return resized
