"""The unmodified openpi-client against ``main.py serve`` on golden checkpoints: both ports, all modes, error then success."""

import json
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.e2e.process import ROOT, combined_config, serve
from tests.serving import service_config, start, stubs

CLIENT_PYTHON = ROOT / ".venv-openpi-client" / "bin" / "python"
DRIVER = Path(__file__).with_name("openpi_client_driver.py")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(combined_config(), tmp_path_factory.mktemp("serve")) as running:
        yield running
        running.signal()
        assert running.wait() == 0


def drive(url: str, *calls: dict, api_key: str | None = None) -> dict:
    assert CLIENT_PYTHON.exists(), "the unmodified openpi-client is missing; `make .venv-openpi-client/.ok` installs it"
    command = [str(CLIENT_PYTHON), str(DRIVER), url, json.dumps(calls), *([] if api_key is None else [api_key])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["numpy"].startswith("1."), "openpi-client's own numpy"
    return result


def test_action_port_in_every_mode_and_after_an_error(server):
    result = drive(
        server.addresses["action"],
        {"prompt": "pick up the cup"},
        {"prompt": "pick up the cup", "mode": "subtask_only"},
        {"prompt": "pick up the cup", "mode": "action_only"},
        {"prompt": "pick up the cup", "mode": "dream"},
        {"prompt": "pick up the cup", "drop": ["state"]},
        {"drop": ["images"], "prompt": "x"},
        {"prompt": "pick up the cup", "mode": "default"},
    )
    metadata = result["metadata"]
    assert metadata["reset_pose"] == [0, -1.5, 1.5, 0, 0, 0]
    assert metadata["action_horizon"] == 50 and metadata["server_name"] == "tandem"
    assert {"path": ["images", "cam_high"], "target_shape": [3, 224, 224], "dtype": "uint8"} in metadata["image_specs"]
    default, subtask, action, wrong_mode, no_state, no_images, again = result["replies"]
    chunk = {"dtype": "float64", "shape": [50, 14], "finite": True}
    assert default["actions"] == again["actions"] == action["actions"] == chunk
    assert set(default) == {"actions", "subtask", "policy_timing", "server_timing"}
    assert set(action) == {"actions", "policy_timing", "server_timing"}
    assert set(subtask) == {"subtask", "server_timing"}
    assert isinstance(default["subtask"]["text"], str) and default["subtask"]["ms"] > 0
    assert default["policy_timing"]["infer_ms"] > 0 and set(again["server_timing"]) == {"infer_ms", "prev_total_ms"}
    assert "mode: got 'dream', expected one of default, subtask_only, action_only" in wrong_mode["error"]
    assert "state" in no_state["error"] and "images" in no_images["error"]
    assert not any("Traceback" in reply["error"] for reply in (wrong_mode, no_state, no_images))


def test_planner_port(server):
    result = drive(
        server.addresses["planner"],
        {"prompt": "pick up the cup"},
        {"prompt": "x", "drop": ["images"]},
        {"prompt": "pick up the cup", "mode": "subtask_only"},
    )
    good, bad, also = result["replies"]
    assert set(good) == set(also) == {"subtask", "server_timing"}
    assert good["subtask"]["text"] == also["subtask"]["text"]
    assert "no known camera among the images" in bad["error"]
    assert result["metadata"]["image_specs"], "a combined service tells planner clients which images the policy takes"


EXTRAS = {"seed": 7, "sampling_params": {"seed": 7}, "session_id": "robot-1", "reset": True, "request_id": "r-1", "obs_index": 3, "endpoint": "infer"}


def test_action_chunk_broker_steps_through_every_field(server):
    """With everything on that adds to a reply: whatever is an array in it is indexed by the step."""
    steps = drive(server.addresses["action"], {"prompt": "pick up the cup", "broker": 50, "extras": EXTRAS})["replies"][0]
    assert len(steps) == 50 and all(step["actions"]["shape"] == [14] for step in steps)
    assert set(steps[0]) == {"actions", "subtask", "policy_timing", "server_timing", "request_id", "obs_index"}
    assert all({**step, "actions": None} == {**steps[0], "actions": None} for step in steps)


def test_a_whole_url_with_a_path_and_a_query(server):
    url = server.addresses["action"]
    at_path = drive(f"{url}/robots/7", {"prompt": "pick up the cup"})
    assert at_path["metadata"]["server_name"] == "tandem" and at_path["replies"][0]["actions"]["shape"] == [50, 14]
    quiet = drive(f"{url}/robots/7?profile=empty&response_key=action", {"prompt": "pick up the cup", "broker": 2})
    assert quiet["metadata"] == {} and [step["action"]["shape"] for step in quiet["replies"][0]] == [[14], [14]]
    named = drive(f"{url}/?reply=arrays", {"prompt": "pick up the cup"}, {"prompt": 7})
    assert named["replies"][0] == {"actions": {"dtype": "float32", "shape": [50, 14], "finite": True}}
    assert "prompt: got int" in named["replies"][1]["error"]


def test_api_key():
    with start(service_config("action", api_key="correct horse"), stubs()) as service:
        url = service.addresses["action"]
        welcome = drive(url, {"prompt": "x"}, api_key="correct horse")
        assert welcome["replies"][0]["actions"]["shape"] == [10, 14]
        for key in ("wrong", None):
            refused = drive(url, api_key=key)
            assert refused["refused"] == 401 and refused["body"].startswith("unauthorized: send the server's API key")


def test_curl_edits_the_template_of_the_next_request(server):
    admin = server.addresses["admin"]
    before = httpx.get(f"{admin}/config").json()["action_prompt_template"]
    changed = httpx.patch(f"{admin}/config", json={"action_prompt_template": "{task} " * 150 + "{subtask}"})
    assert changed.status_code == 200
    try:
        error = drive(server.addresses["action"], {"prompt": "pick up the cup"})["replies"][0]["error"]
        assert "200 fit" in error, "the long template reached the action policy's prompt"
    finally:
        assert httpx.patch(f"{admin}/config", json={"action_prompt_template": before}).status_code == 200
    assert "actions" in drive(server.addresses["action"], {"prompt": "pick up the cup"})["replies"][0]
