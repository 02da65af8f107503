"""Our clients under numpy 1, which robots with an older stack still have, against a server under numpy 2."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hosting.config import ActionTransportConfig
from tests.e2e.process import ROOT, environment
from tests.serving import service_config, start, stubs

PYTHON = ROOT / ".venv-hud" / "bin" / "python"
DRIVER = Path(__file__).with_name("numpy1_driver.py")


class Seer:
    """Says what its camera looked like; its actions are the state."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {
            "action_horizon": 2,
            "image_specs": [{"path": ["images", "cam_high"], "target_shape": [3, 224, 224], "dtype": "uint8"}],
        }

    def infer(self, obs: Any, *, seed: int | None = None) -> dict[str, Any]:
        image = obs["images"]["cam_high"]
        saw = {"shape": list(image.shape), "dtype": str(image.dtype), "corner": int(image[2, 112, 5]), "step": float(obs["step"]), "seed": seed}
        return {"actions": np.tile(obs["state"], (2, 1)), "saw": saw}


@pytest.mark.skipif(not PYTHON.exists(), reason="no environment with numpy 1 was made; `make .venv-hud/.ok` does that, as CI does")
def test_every_transport_under_numpy_1() -> None:
    with tempfile.TemporaryDirectory(prefix="tandem") as directory:
        transport = ActionTransportConfig(websocket_port=0, quic_port=0, unix_socket_path=f"{directory}/a.sock")
        with start(service_config("action", action_transport=transport, quic_certificate_dir=directory), stubs(Seer())) as service:
            names = {"websocket": "action", "quic": "action quic", "unix": "action unix"}
            addresses = {name: service.addresses[key] for name, key in names.items()}
            pin = service.service.status()["quic_certificate_sha256"]
            command = [str(PYTHON), str(DRIVER), json.dumps(addresses), pin]
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment(PYTHONPATH=os.fspath(ROOT)), cwd=directory, timeout=100, check=False
            )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results.pop("numpy").startswith("1.")
    assert results.pop("async") == [[0, 1, 2]] * 2
    assert len(results) == 6
    for name, (dtype, actions, saw, batch) in results.items():
        assert (dtype, actions, batch) == ("float32", [[0, 1, 2]] * 2, [2, 2, 3]), name
        assert (saw["shape"], saw["dtype"], saw["step"], saw["seed"]) == ([3, 224, 224], "uint8", 1.5, 3), name
        assert abs(saw["corner"] - 90) <= (6 if name.endswith("jpeg") else 0), name
