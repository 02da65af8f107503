"""RoboLab's clients for π0, Cosmos3 and DreamZero."""

from __future__ import annotations

from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed

from tests.e2e.peers import openpi_codec
from tests.e2e.peers.dialing import dial
from tests.e2e.peers.openpi import OpenPIClient


class Pi0Client:
    """One connection for all environments, a chunk of its own for each."""

    def __init__(self, remote_uri: str, *, open_loop_horizon: int = 8) -> None:
        self._client = OpenPIClient(remote_uri)
        self._horizon = open_loop_horizon
        self._chunks: dict[int, np.ndarray] = {}
        self._steps: dict[int, int] = {}

    def infer(self, joints: np.ndarray, instruction: str, *, env_id: int) -> np.ndarray:
        step = self._steps.get(env_id, 0)
        if step in (0, self._horizon):
            step = 0
            request = {
                "observation/exterior_image_1_left": np.zeros((224, 224, 3), np.uint8),
                "observation/wrist_image_left": np.zeros((224, 224, 3), np.uint8),
                "observation/joint_position": joints,
                "observation/gripper_position": np.zeros(1, np.float32),
                "prompt": instruction,
            }
            self._chunks[env_id] = self._client.infer(request)["actions"]
        self._steps[env_id] = step + 1
        return self._chunks[env_id][step]

    def close(self) -> None:
        self._client.close()


class Cosmos3Client:
    """Cameras put together in one ``observation/image``, the actions under ``action``, three tries."""

    def __init__(self, remote_uri: str) -> None:
        self._uri = remote_uri
        self._client = OpenPIClient(remote_uri)

    def infer(self, joints: np.ndarray, instruction: str) -> np.ndarray:
        views = [np.full((180, 320, 3), index, np.uint8) for index in range(3)]
        composite = np.concatenate([np.concatenate(views[:2], axis=1), np.repeat(views[2], 2, axis=1)])
        request = {"observation/image": composite, "observation/joint_position": joints, "prompt": instruction}
        for tries_left in (2, 1, 0):
            try:
                return np.asarray(self._client.infer(request)["action"])
            except ConnectionClosed:
                if not tries_left:
                    raise
                self._client = OpenPIClient(self._uri)
        raise AssertionError("unreachable")

    def close(self) -> None:
        self._client.close()


class DreamZeroClient:
    """Many sessions on one socket, named one by one or all at once when they are reset; ``Authorization: Bearer``."""

    def __init__(self, remote_uri: str, token: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else None
        self._ws = dial(remote_uri, compression=None, max_size=None, open_timeout=300, ping_interval=60, ping_timeout=600, additional_headers=headers)
        self.metadata = openpi_codec.unpack(self._ws.recv(timeout=300))

    def infer(self, joints: np.ndarray, instruction: str, *, session_id: str) -> np.ndarray:
        camera = np.zeros((180, 320, 3), np.uint8)
        response = self._send_recv(
            {
                "observation/exterior_image_0_left": camera,
                "observation/exterior_image_1_left": camera,
                "observation/wrist_image_left": camera,
                "observation/joint_position": joints,
                "observation/cartesian_position": np.zeros(6, np.float32),
                "observation/gripper_position": np.zeros(1, np.float32),
                "prompt": instruction,
                "session_id": session_id,
                "endpoint": "infer",
            }
        )
        if isinstance(response, str):
            raise RuntimeError(f"DreamZero server error:\n{response}")
        chunk: Any = openpi_codec.unpack(response)
        if isinstance(chunk, dict):
            chunk = chunk.get("actions", chunk)
        array = np.asarray(chunk)
        return array.reshape(1, -1) if array.ndim == 1 else array

    def reset(self, session_ids: list[str] | None = None) -> Any:
        """These sessions; None: all."""
        return self._send_recv({"endpoint": "reset", "session_ids": session_ids})

    def close(self) -> None:
        self._ws.close()

    def _send_recv(self, message: dict[str, Any]) -> Any:
        self._ws.send(openpi_codec.pack(message))
        return self._ws.recv(timeout=300)
