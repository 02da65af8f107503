"""Runs in the venv of the unmodified ``openpi-client`` (numpy < 2): carries out calls, prints what came as JSON.

usage: python openpi_client_driver.py URL CALLS_JSON [API_KEY] — a call is an observation spec
``{"prompt": …, "mode": …, "drop": [keys], "extras": {…}, "broker": steps}``. The URL goes in ``host`` and ``port`` stays None.
"""

import json
import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import InvalidStatus


def observation(spec):
    rng = np.random.default_rng(spec.get("seed", 0))
    cameras = ("cam_high", "cam_left_wrist", "cam_right_wrist")
    obs = {"state": np.ones(14), "images": {camera: rng.integers(256, size=(3, 224, 224), dtype=np.uint8) for camera in cameras}}
    obs.update({key: spec[key] for key in ("prompt", "mode") if key in spec}, **spec.get("extras", {}))
    for key in spec.get("drop", []):
        del obs[key]
    return obs


def describe(value):
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "shape": list(value.shape), "finite": bool(np.isfinite(value).all())}
    if isinstance(value, dict):
        return {key: describe(item) for key, item in value.items()}
    return value


def main():
    url, calls, *api_key = sys.argv[1:]
    try:
        policy = WebsocketClientPolicy(url, None, *api_key)
    except InvalidStatus as error:
        print(json.dumps({"numpy": np.__version__, "refused": error.response.status_code, "body": error.response.body.decode()}))
        return
    results = {"numpy": np.__version__, "metadata": describe(policy.get_server_metadata()), "replies": []}
    for spec in json.loads(calls):
        if "broker" in spec:
            broker = ActionChunkBroker(policy, action_horizon=spec["broker"])
            results["replies"].append([describe(broker.infer(observation(spec))) for _ in range(spec["broker"])])
            continue
        try:
            results["replies"].append(describe(policy.infer(observation(spec))))
        except RuntimeError as error:
            results["replies"].append({"error": str(error)})
    print(json.dumps(results))


main()
