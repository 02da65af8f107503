"""sim-evals' DROID client: asks every eight steps and plays the rows between."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.e2e.peers.openpi import OpenPIClient

OPEN_LOOP_HORIZON = 8


class DroidJointPosClient:
    """One action of eight numbers per step, the gripper to 0 or 1."""

    def __init__(self, host: str, port: int) -> None:
        self.client = OpenPIClient(host, port)
        self._completed = 0
        self._chunk: np.ndarray | None = None

    def reset(self) -> None:
        self._completed, self._chunk = 0, None

    def infer(self, joints: np.ndarray, instruction: str) -> np.ndarray:
        if self._chunk is None or self._completed >= OPEN_LOOP_HORIZON:
            self._completed = 0
            request: dict[str, Any] = {
                "observation/exterior_image_1_left": np.zeros((224, 224, 3), np.uint8),
                "observation/wrist_image_left": np.ones((224, 224, 3), np.uint8),
                "observation/joint_position": joints,
                "observation/gripper_position": np.zeros(1, np.float32),
                "prompt": instruction,
            }
            self._chunk = self.client.infer(request)["actions"]
        assert self._chunk is not None
        action = self._chunk[self._completed]
        self._completed += 1
        return np.concatenate([action[:-1], np.ones(1) if action[-1].item() > 0.5 else np.zeros(1)])

    def close(self) -> None:
        self.client.close()
