"""DreamZero: RoboArena's protocol with patient pings and a second try over TLS."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
from websockets.sync.client import ClientConnection

from tests.e2e.peers.roboarena import PolicyServerConfig, RoboArenaClient

HEIGHT, WIDTH = 180, 320
FRAMES = 4


class DreamZeroClient(RoboArenaClient):
    """Pings every 60 s and waits 600 s for the answer; what fails over ``ws://``, whatever it is, is tried once over ``wss://``."""

    ping = {"ping_interval": 60, "ping_timeout": 600}  # noqa: RUF012 - as the base class has it

    def _wait_for_server(self) -> tuple[ClientConnection, dict[str, Any]]:
        try:
            return self._connect(self._uri)
        except Exception:  # noqa: BLE001 - as the original does
            self._uri = "wss://" + self._uri.split("//")[1]
            return self._connect(self._uri)


def observation(joints: np.ndarray, *, frames: int, session_id: str) -> dict[str, Any]:
    """Two external cameras and the wrist, (H, W, 3) or (frames, H, W, 3); proprioception as float64."""
    shape = (HEIGHT, WIDTH, 3) if frames == 1 else (frames, HEIGHT, WIDTH, 3)
    cameras = ("exterior_image_0_left", "exterior_image_1_left", "wrist_image_left")
    return {
        **{f"observation/{camera}": np.full(shape, index, np.uint8) for index, camera in enumerate(cameras)},
        "observation/joint_position": joints.astype(np.float64),
        "observation/cartesian_position": np.zeros(6),
        "observation/gripper_position": np.zeros(1),
        "prompt": "stack the blocks",
        "session_id": session_id,
    }


def run_sim_eval(client: DreamZeroClient, joints: np.ndarray, *, episodes: int = 2) -> list[np.ndarray]:
    """DreamZero's ``run_sim_eval``: a new session and a reset per episode, one frame and then four; returns each chunk."""
    config = PolicyServerConfig(**client.get_server_metadata())
    assert tuple(config.image_resolution or ()) == (HEIGHT, WIDTH)
    assert config.n_external_cameras == 2
    chunks = []
    for _ in range(episodes):
        session_id = str(uuid.uuid4())
        for frames in (1, FRAMES):
            result = client.infer(observation(joints, frames=frames, session_id=session_id))
            actions = result["actions"] if isinstance(result, dict) else result
            assert actions.shape[-1] == 8
            chunks.append(np.asarray(actions))
        assert client.reset({"session_id": session_id}) == "reset successful"
    return chunks


def run_ar_check(client: DreamZeroClient, joints: np.ndarray) -> list[np.ndarray]:
    """DreamZero's ``test_client_AR``: the six keys as it wants them and bare arrays; returns each chunk."""
    config = PolicyServerConfig(**client.get_server_metadata())
    assert config.n_external_cameras == 2
    assert config.needs_wrist_camera
    assert config.action_space == "joint_position"
    session_id = str(uuid.uuid4())
    chunks = []
    for frames in (1, FRAMES, FRAMES):
        actions = client.infer(observation(joints, frames=frames, session_id=session_id))
        assert isinstance(actions, np.ndarray), f"Expected numpy array, got {type(actions)}"
        assert actions.ndim == 2
        assert actions.shape[-1] == 8
        chunks.append(actions)
    client.reset({})
    return chunks
