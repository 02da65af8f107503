"""The dialects of openpi's WebSocket that clients speak, chosen by path and query before the first frame (reference/peers.md §1.12).

============================  ===================  =========  =======  ==============================
path or ``?profile=``         handshake            reply      errors   answer to ``endpoint: reset``
============================  ===================  =========  =======  ==============================
``openpi`` (any other path)   metadata             map        text     text ``reset successful``
``roboarena``                 exactly six keys     map        text     text
``empty``                     the empty map        map        text     text
``vllm``; the paths below     metadata, six keys   bare array map      map
============================  ===================  =========  =======  ==============================

``?reply=map|array|arrays``, ``?errors=text|map`` and ``?response_key=action`` change one column. Other parameters mean nothing, but
one that looks like a misspelling of these is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl

from pi0.errors import RequestError

logger = logging.getLogger(__name__)

ProfileName = Literal["openpi", "roboarena", "empty", "vllm"]
ReplyShape = Literal["map", "array", "arrays"]
ErrorForm = Literal["text", "map"]

VLLM_PATHS = frozenset({"/v1/realtime/robot/openpi", "/openpi/policy"})

ROBOARENA_KEYS = ("image_resolution", "needs_wrist_camera", "n_external_cameras", "needs_stereo_camera", "needs_session_id", "action_space")

_PARAMETERS = ("profile", "reply", "errors", "response_key")
_MAX_KEY_CHARS = 64


@dataclass(frozen=True, slots=True)
class Profile:
    """What one kind of client expects.

    Attributes:
        reply: ``map`` (``actions``, timings, …), ``array`` (the bare float32 actions), ``arrays`` (a map of float32 arrays only).
        errors: text frames, or maps ``{"type": "error", "code", "message"}``.
        response_key: what ``actions`` is called in a map.
        acks_reset_with: as ``errors``.
    """

    name: ProfileName
    reply: ReplyShape = "map"
    errors: ErrorForm = "text"
    acks_reset_with: ErrorForm = "text"
    response_key: str = "actions"

    def hello(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The handshake's map.

        Raises:
            RequestError: the profile needs to know something of the robot that the configuration does not say.
        """
        own = {key: value for key, value in metadata.items() if key != "roboarena"}
        match self.name:
            case "openpi":
                return own
            case "empty":
                return {}
            case "vllm":
                return {**own, **_roboarena(metadata)}
            case "roboarena":
                six = _roboarena(metadata)
                if missing := [key for key in ROBOARENA_KEYS if key not in six]:
                    raise RequestError(
                        f"profile roboarena: the server does not know {', '.join(missing)}; set roboarena.{missing[0]} in its configuration"
                    )
                return {key: six[key] for key in ROBOARENA_KEYS}


OPENPI = Profile("openpi")
_PROFILES: dict[ProfileName, Profile] = {
    "openpi": OPENPI,
    "roboarena": Profile("roboarena"),
    "empty": Profile("empty"),
    "vllm": Profile("vllm", reply="array", errors="map", acks_reset_with="map"),
}


def choose_profile(path: str, query: str, *, default: ProfileName = "openpi", reply: ReplyShape | None = None) -> Profile:
    """The profile of a connection to ``path?query``.

    Args:
        default: what a path without one of its own gets.
        reply: the shape of such a path's replies, unless the query asks for another; None: the profile's.

    Raises:
        RequestError: the query asks for something that there is not; names the parameter.
    """
    options: dict[str, str] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key in options and key in _PARAMETERS:
            raise RequestError(f"{key}: is given twice in the address; give it once")
        options[key] = value
    name = options.pop("profile", "vllm" if path in VLLM_PATHS else default)
    if name not in get_args(ProfileName):
        raise RequestError(f"profile: got {name[:_MAX_KEY_CHARS]!r}, expected one of {', '.join(get_args(ProfileName))}")
    profile = _PROFILES[name]  # type: ignore[index]
    if reply is not None and path not in VLLM_PATHS:
        profile = replace(profile, reply=reply)
    for key, value in options.items():
        match key, value:
            case "reply", "map" | "array" | "arrays":
                profile = replace(profile, reply=value)
            case "reply", _:
                raise RequestError(f"reply: got {value[:_MAX_KEY_CHARS]!r}, expected one of {', '.join(get_args(ReplyShape))}")
            case "errors", "text" | "map":
                profile = replace(profile, errors=value)
            case "errors", _:
                raise RequestError(f"errors: got {value[:_MAX_KEY_CHARS]!r}, expected text or map")
            case "response_key", _ if 0 < len(value) <= _MAX_KEY_CHARS:
                profile = replace(profile, response_key=value)
            case "response_key", _:
                raise RequestError(f"response_key: has {len(value)} characters, expected 1 to {_MAX_KEY_CHARS}")
            case _ if close := get_close_matches(key[:_MAX_KEY_CHARS], _PARAMETERS, n=1, cutoff=0.75):
                raise RequestError(f"{key[:_MAX_KEY_CHARS]!r}: is no parameter of this address; did you mean {close[0]}?")
            case _:
                # Stock clients may connect to any address, and proxies add parameters of their own.
                logger.info("the address of a client has a parameter %r, which means nothing here", key[:_MAX_KEY_CHARS])
    return profile


def roboarena_facts(image_specs: list[Mapping[str, Any]]) -> dict[str, Any]:
    """What the camera list says of RoboArena's six handshake keys; ``action_space`` is not among it."""
    paths = ["/".join(map(str, spec["path"])) for spec in image_specs]
    facts: dict[str, Any] = {"needs_stereo_camera": False, "needs_session_id": False}
    if image_specs:
        shape = [int(size) for size in image_specs[0]["target_shape"]]
        wrists = sum("wrist" in path for path in paths)
        facts["image_resolution"] = shape[:2] if shape[2] == 3 else shape[1:]
        facts["needs_wrist_camera"] = wrists > 0
        facts["n_external_cameras"] = len(paths) - wrists
    return facts


def _roboarena(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {**roboarena_facts(metadata.get("image_specs", [])), **metadata.get("roboarena", {})}
