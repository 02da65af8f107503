"""RoboArena: a handshake of six keys, ``endpoint`` in every request, a reset that is confirmed with a text (reference/peers.md §1.10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.e2e.peers import openpi_codec
from tests.e2e.peers.openpi import OpenPIClient


@dataclass
class PolicyServerConfig:
    """Made of the handshake by keyword expansion: another key is a TypeError."""

    image_resolution: tuple[int, int] | None = (224, 224)
    needs_wrist_camera: bool = True
    n_external_cameras: int = 1
    needs_stereo_camera: bool = False
    needs_session_id: bool = False
    action_space: str = "joint_position"


class RoboArenaClient(OpenPIClient):
    """Takes a host and a port, no path; the observation it is given is the map it changes and sends."""

    def __init__(self, host: str = "0.0.0.0", port: int = 8000) -> None:
        super().__init__(host, port)

    def infer(self, obs: dict[str, Any]) -> Any:
        obs["endpoint"] = "infer"
        return super().infer(obs)

    def reset(self, reset_info: dict[str, Any] | None = None) -> Any:  # type: ignore[override]
        self._ws.send(openpi_codec.pack({**(reset_info or {}), "endpoint": "reset"}))
        return self._ws.recv()


def check_policy_server(client: RoboArenaClient, *, seed: int = 0) -> np.ndarray:
    """RoboArena's own check of a server, up to the call that never works; returns the actions."""
    metadata = client.get_server_metadata()
    assert isinstance(metadata, dict)
    config = PolicyServerConfig(**metadata)
    assert config.n_external_cameras in (0, 1, 2)
    assert config.action_space in ("joint_position", "joint_velocity", "cartesian_position", "cartesian_velocity")
    reply = client.infer(observation(config, np.random.default_rng(seed)))
    assert isinstance(reply, dict)
    actions = reply["actions"]
    assert isinstance(actions, np.ndarray)
    assert actions.ndim == 2
    assert actions.shape[-1] == (8 if config.action_space.startswith("joint") else 7)
    return actions


def observation(config: PolicyServerConfig, rng: np.random.Generator) -> dict[str, Any]:
    """What a server of ``config`` is sent; the session id is an array, as in RoboArena's own check."""
    height, width = config.image_resolution or (480, 640)
    sides = ("left", "right") if config.needs_stereo_camera else ("left",)
    names = ["observation/wrist_image"] if config.needs_wrist_camera else []
    names += [f"observation/exterior_image_{index}" for index in range(config.n_external_cameras)]
    obs: dict[str, Any] = {f"{name}_{side}": rng.integers(256, size=(height, width, 3), dtype=np.uint8) for name in names for side in sides}
    if config.needs_session_id:
        obs["session_id"] = np.zeros(1, np.int32)
    joints = rng.random(7, np.float32)
    return {
        **obs,
        "observation/joint_position": joints,
        "observation/cartesian_position": np.zeros(6, np.float32),
        "observation/gripper_position": np.zeros(1, np.float32),
        "prompt": "put the marker into the cup",
    }
