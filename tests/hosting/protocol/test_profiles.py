"""Which dialect an address speaks, and how its handshakes look."""

from __future__ import annotations

import pytest

from hosting.policy import RequestError
from hosting.protocol.profiles import OPENPI, ROBOARENA_KEYS, Profile, choose_profile

DROID = [
    {"path": ["observation/exterior_image_1_left"], "target_shape": [224, 224, 3], "dtype": "uint8"},
    {"path": ["observation/wrist_image_left"], "target_shape": [224, 224, 3], "dtype": "uint8"},
]
METADATA = {"action_horizon": 10, "image_specs": DROID, "roboarena": {"action_space": "joint_velocity"}}
VLLM = Profile("vllm", reply="array", errors="map", acks_reset_with="map")


@pytest.mark.parametrize(
    ("path", "query", "profile"),
    [
        ("/", "", OPENPI),
        ("/any/thing", "token=x&x", OPENPI),
        ("/v1/realtime/robot/openpi", "", VLLM),
        ("/openpi/policy", "", VLLM),
        ("/openpi/policy", "profile=openpi", OPENPI),
        ("/", "profile=vllm", VLLM),
        ("/", "profile=roboarena", Profile("roboarena")),
        ("/", "profile=empty", Profile("empty")),
        ("/", "response_key=action", Profile("openpi", response_key="action")),
        ("/", "reply=arrays&errors=map", Profile("openpi", reply="arrays", errors="map")),
        ("/openpi/policy", "reply=map&errors=text", Profile("vllm", reply="map", errors="text", acks_reset_with="map")),
    ],
)
def test_path_and_query_choose(path: str, query: str, profile: Profile) -> None:
    assert choose_profile(path, query) == profile


def test_the_default_is_for_addresses_that_do_not_choose() -> None:
    assert choose_profile("/", "", default="roboarena").name == "roboarena"
    assert choose_profile("/openpi/policy", "", default="roboarena").name == "vllm"
    assert choose_profile("/", "profile=empty", default="roboarena").name == "empty"


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("profile=x", "profile: got 'x', expected one of openpi, roboarena, empty, vllm"),
        ("profile=", "profile: got '', expected one of openpi, roboarena, empty, vllm"),
        ("reply=list", "reply: got 'list', expected one of map, array, arrays"),
        ("errors=json", "errors: got 'json', expected text or map"),
        ("response_key=", "response_key: has 0 characters, expected 1 to 64"),
        ("profle=roboarena", "'profle': is no parameter of this address; did you mean profile?"),
        ("profile=empty&profile=vllm", "profile: is given twice in the address; give it once"),
    ],
)
def test_what_there_is_not_is_refused(query: str, problem: str) -> None:
    with pytest.raises(RequestError) as error:
        choose_profile("/", query)
    assert str(error.value) == problem


def test_handshakes() -> None:
    six = {
        "image_resolution": [224, 224],
        "needs_wrist_camera": True,
        "n_external_cameras": 1,
        "needs_stereo_camera": False,
        "needs_session_id": False,
        "action_space": "joint_velocity",
    }
    assert choose_profile("/", "").hello(METADATA) == {"action_horizon": 10, "image_specs": DROID}
    assert choose_profile("/", "profile=empty").hello(METADATA) == {}
    roboarena = choose_profile("/", "profile=roboarena").hello(METADATA)
    assert roboarena == six and tuple(roboarena) == ROBOARENA_KEYS
    assert choose_profile("/openpi/policy", "").hello(METADATA) == {"action_horizon": 10, "image_specs": DROID, **six}


def test_roboarena_asks_for_what_it_cannot_know() -> None:
    with pytest.raises(RequestError) as error:
        choose_profile("/", "profile=roboarena").hello({**METADATA, "roboarena": {}})
    assert str(error.value) == "profile roboarena: the server does not know action_space; set roboarena.action_space in its configuration"


def test_the_configuration_wins_over_what_the_cameras_say() -> None:
    metadata = {**METADATA, "roboarena": {"image_resolution": [180, 320], "n_external_cameras": 2, "action_space": "joint_position"}}
    hello = choose_profile("/", "profile=roboarena").hello(metadata)
    assert (hello["image_resolution"], hello["n_external_cameras"], hello["action_space"]) == ([180, 320], 2, "joint_position")


def test_resolution_of_cameras_with_channels_first() -> None:
    specs = [{"path": ["images", "cam_high"], "target_shape": [3, 180, 320], "dtype": "uint8"}]
    assert choose_profile("/openpi/policy", "").hello({"image_specs": specs})["image_resolution"] == [180, 320]


def test_the_configured_reply_shape_is_for_addresses_that_do_not_choose() -> None:
    assert choose_profile("/", "", default="roboarena", reply="array") == Profile("roboarena", reply="array")
    assert choose_profile("/", "reply=map", reply="array") == OPENPI
    assert choose_profile("/openpi/policy", "", reply="map") == VLLM


def test_others_parameters_mean_nothing_however_often_they_come() -> None:
    assert choose_profile("/", "token=a&token=b&profile=empty").name == "empty"
