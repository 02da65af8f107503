import numpy as np
import pytest

from pi0.cameras import CLIENT_CAMERAS, MODEL_CAMERAS, camera_images, map_cameras
from pi0.errors import ObservationError

IMAGE = np.zeros((2, 2, 3), np.uint8)


@pytest.mark.parametrize(
    ("keys", "cameras"),
    [
        (["cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"], set(MODEL_CAMERAS)),
        (["observation/exterior_image_1_left", "observation/wrist_image_left"], {"base_0_rgb", "left_wrist_0_rgb"}),
        (["observation/image", "observation/wrist_image"], {"base_0_rgb", "left_wrist_0_rgb"}),
        (["head_camera", "left_wrist_camera", "right_wrist_camera"], set(MODEL_CAMERAS)),
        (list(MODEL_CAMERAS), set(MODEL_CAMERAS)),
    ],
)
def test_every_embodiment_is_mapped(keys, cameras):
    assert set(map_cameras(dict.fromkeys(keys, IMAGE))) == cameras


def test_every_known_camera_is_one_of_the_model():
    assert set(CLIENT_CAMERAS.values()) == set(MODEL_CAMERAS)


def test_camera_images_finds_both_forms():
    assert camera_images({"images": {"cam_high": IMAGE, "cam_low": None}, "state": 1}).keys() == {"cam_high"}
    flat = {"observation/image": IMAGE, "observation/wrist_image": IMAGE, "observation/state": 0, "prompt": "x", "head_camera": IMAGE}
    assert camera_images(flat).keys() == {"observation/image", "observation/wrist_image", "head_camera"}
    assert camera_images({"prompt": "x"}) == {}


def test_unknown_cameras_are_named():
    with pytest.raises(ObservationError, match=r"no known camera among the images \(found: kitchen, side\)"):
        map_cameras({"side": IMAGE, "kitchen": IMAGE})
    with pytest.raises(ObservationError, match=r"found: c0{59}, .* and 992 more\); expected"):
        map_cameras({f"c{i:0100}": IMAGE for i in range(1000)})
    with pytest.raises(ObservationError, match=r"found: none"):
        map_cameras({})


def test_one_camera_given_twice():
    with pytest.raises(ObservationError, match="observation/image: camera base_0_rgb was already given as cam_high"):
        map_cameras({"cam_high": IMAGE, "observation/image": IMAGE})


def test_images_must_be_a_map():
    with pytest.raises(ObservationError, match="images: expected a map of camera name to image, got list"):
        camera_images({"images": [IMAGE]})
