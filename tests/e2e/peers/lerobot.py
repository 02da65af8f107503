"""LeRobot's remote policy (``policy.type=vllm``, pull request 3725): a connection per call, named arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from websockets.sync.client import connect

from tests.e2e.peers import openpi_codec


class VllmPolicy:
    """Offers compression, takes 64 MiB, and wants a map of nothing but arrays; the path is one of its settings (``ws_path``)."""

    def __init__(self, address: str, *, ws_path: str = "/v1/realtime/robot/openpi", action_keys: tuple[str, ...] = ("actions",)) -> None:
        self._options: dict[str, Any] = {"uri": address + ws_path, "open_timeout": 30.0, "max_size": 64 << 20}
        self._action_keys = action_keys

    def handshake(self) -> dict[str, Any]:
        with connect(**self._options) as connection:
            return openpi_codec.unpack(connection.recv())

    def infer(self, state: np.ndarray, task: str, *, session_id: str, seed: int | None = None) -> dict[str, np.ndarray]:
        """State as named lists of numbers, images as a list, and what the server does not know."""
        names = ("x", "y", "z", "roll", "pitch", "yaw")
        observation: dict[str, Any] = {
            "session_id": session_id,
            "embodiment": "libero_sim",
            "modality_config": {"state": {name: {"start": index, "end": index + 1} for index, name in enumerate(names)}},
            "prompt": task,
            "state": {**{name: [float(state[index])] for index, name in enumerate(names)}, "gripper": [float(x) for x in state[6:8]]},
            "images": [np.zeros((180, 320, 3), np.uint8), np.ones((180, 320, 3), np.uint8)],
        }
        if seed is not None:
            observation["seed"] = seed
        with connect(**self._options) as connection:
            openpi_codec.unpack(connection.recv())
            connection.send(openpi_codec.pack(observation))
            actions = openpi_codec.unpack(connection.recv())
        if not isinstance(actions, dict):
            raise RuntimeError(f"vLLM OpenPI server must return a dict of ndarrays; got {type(actions).__name__}")
        if actions.get("type") == "error":
            raise RuntimeError(f"vLLM server error: {actions.get('message', actions)}")
        named = {key: np.asarray(value, dtype=np.float32) for key, value in actions.items()}
        if missing := [key for key in self._action_keys if key not in named]:
            raise RuntimeError(f"Server response missing action key(s) {missing}; got {sorted(named)}")
        return named
