"""The two example clients of vllm-omni's OpenPI endpoint."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.e2e.peers import openpi_codec
from tests.e2e.peers.dialing import dial
from tests.e2e.peers.dreamzero import observation

HORIZON, WIDTH = 24, 8
PATH = "/v1/realtime/robot/openpi"
REQUIRED = ("image_resolution", "n_external_cameras", "needs_wrist_camera", "needs_stereo_camera", "needs_session_id", "action_space")


class ExampleClient:
    """``openpi_client.py``: bare arrays, errors as maps, a reset confirmed by text or by a map."""

    def __init__(self, *, host: str = "127.0.0.1", port: int = 8000, path: str = PATH) -> None:
        self._ws = dial(f"ws://{host}:{port}{path}", compression=None, max_size=None, ping_interval=300, ping_timeout=3600)
        self.metadata = openpi_codec.unpack(self._ws.recv())
        if not isinstance(self.metadata, dict):
            raise TypeError(f"Expected dict metadata from server, got {type(self.metadata)!r}")

    def infer(self, obs: dict[str, Any]) -> np.ndarray:
        self._ws.send(openpi_codec.pack({**obs, "endpoint": "infer"}))
        response = self._ws.recv()
        if isinstance(response, str):
            raise RuntimeError(f"Inference failed: {response}")
        decoded = openpi_codec.unpack(response)
        if isinstance(decoded, dict) and decoded.get("type") == "error":
            raise RuntimeError(f"Inference failed: {decoded.get('message', decoded)}")
        return np.asarray(decoded, dtype=np.float32)

    def reset(self) -> str:
        self._ws.send(openpi_codec.pack({"endpoint": "reset"}))
        response = self._ws.recv()
        if isinstance(response, str):
            return response
        decoded = openpi_codec.unpack(response)
        if not isinstance(decoded, dict) or decoded.get("status") != "reset successful":
            raise RuntimeError(f"Unexpected reset response: {decoded!r}")
        return str(decoded["status"])

    def close(self) -> None:
        self._ws.close()


class DroidSimEvalClient(ExampleClient):
    """``droid_sim_eval_client.py``: takes only a text for a confirmed reset, which vllm-omni itself does not send."""

    def reset(self) -> str:
        self._ws.send(openpi_codec.pack({"endpoint": "reset"}))
        response = self._ws.recv()
        if response != "reset successful":
            raise RuntimeError(f"Unexpected reset response: {response!r}")
        return response


def run_policy_session(client: ExampleClient, joints: np.ndarray, *, session_id: str) -> list[np.ndarray]:
    """The example's session with its checks: one frame, four frames, a reset, one frame; returns the three chunks."""
    missing = [key for key in REQUIRED if key not in client.metadata]
    assert not missing, f"Missing DreamZero metadata keys: {missing}"
    resolution = client.metadata["image_resolution"]
    assert isinstance(resolution, list | tuple)
    assert tuple(map(int, resolution)) == (180, 320)
    assert int(client.metadata["n_external_cameras"]) == 2
    assert bool(client.metadata["needs_wrist_camera"])
    assert str(client.metadata["action_space"]) == "joint_position"
    actions = [client.infer(observation(joints, frames=frames, session_id=session_id)) for frames in (1, 4)]
    assert client.reset() == "reset successful"
    actions.append(client.infer(observation(joints, frames=1, session_id=session_id)))
    for chunk in actions:
        assert chunk.shape == (HORIZON, WIDTH)
        assert np.isfinite(chunk).all()
    return actions
