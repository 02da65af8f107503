"""IsaacLab-Arena: openpi-client with keepalive settings of its own, one environment after the other over one connection."""

from __future__ import annotations

from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK

from tests.e2e.peers.openpi import OpenPIClient

MAX_RECONNECT_ATTEMPTS = 3


class ArenaClient(OpenPIClient):
    def __init__(self, host: str, port: int, *, ping_interval: float | None = 20.0, ping_timeout: float | None = 20.0) -> None:
        self.ping = {"ping_interval": ping_interval, "ping_timeout": ping_timeout}  # type: ignore[misc]
        super().__init__(host, port)


class RemoteChunkReplayPolicy:
    """Plays ``open_loop_horizon`` rows of each environment's chunk; a closed connection is made again, and every chunk forgotten."""

    def __init__(self, host: str, port: int, *, open_loop_horizon: int, action_dim: int, **ping: float | None) -> None:
        self._address, self._ping = (host, port), ping
        self._horizon, self._action_dim = open_loop_horizon, action_dim
        self.client = ArenaClient(*self._address, **self._ping)
        self._chunks: dict[int, list[np.ndarray]] = {}

    def get_action(self, joints: np.ndarray, instruction: str) -> np.ndarray:
        """Joints of N environments → actions [N, A]."""
        actions = []
        for env_id, row in enumerate(joints):
            if not self._chunks.get(env_id):
                self._chunks[env_id] = list(self._fetch(row, instruction))
            actions.append(self._chunks[env_id].pop(0))
        return np.stack(actions)

    def close(self) -> None:
        self.client.close()

    def _fetch(self, joints: np.ndarray, instruction: str) -> np.ndarray:
        request = {
            "observation/exterior_image_1_left": np.zeros((224, 224, 3), np.uint8),
            "observation/wrist_image_left": np.zeros((224, 224, 3), np.uint8),
            "observation/joint_position": joints,
            "observation/gripper_position": np.zeros(1, np.float32),
            "prompt": instruction,
        }
        chunk = np.asarray(self._call(request)["actions"])
        assert chunk.ndim == 2
        assert chunk.shape[1] == self._action_dim
        assert chunk.shape[0] >= self._horizon
        return chunk[: self._horizon].astype(np.float32, copy=True)

    def _call(self, request: dict[str, Any]) -> Any:
        for attempt in range(MAX_RECONNECT_ATTEMPTS):
            try:
                return self.client.infer(request)
            except (ConnectionClosedError, ConnectionClosedOK, OSError):
                if attempt + 1 == MAX_RECONNECT_ATTEMPTS:
                    raise
                self.client = ArenaClient(*self._address, **self._ping)
                self._chunks = {}
        raise AssertionError("unreachable")
