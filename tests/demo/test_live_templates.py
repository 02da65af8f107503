"""Live templates matter: what is edited at the admin port is what the trained pair is told from the next request on."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest

from demo.episodes import lockstep, new_table
from demo.serving import demo_config
from hosting.clients import Client, connect
from hosting.templates import DEFAULT_ACTION_PROMPT_TEMPLATE
from tests.serving import RunningService, service_config, start, stubs


def patch(running: RunningService, **change: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{running.addresses['admin']}/config", json.dumps(change).encode(), {"Content-Type": "application/json"}, method="PATCH"
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        changed: dict[str, Any] = json.load(answer)
    return changed


@pytest.fixture(scope="module")
def running() -> Iterator[RunningService]:
    with start(demo_config(free_ports=True), None) as running:
        yield running


@pytest.fixture
def client(running: RunningService) -> Iterator[Client]:
    with closing(connect(running.addresses["action"])) as client:
        yield client
    patch(running, action_prompt_template=DEFAULT_ACTION_PROMPT_TEMPLATE)


def test_a_template_without_the_subtask_is_refused(running: RunningService, client: Client) -> None:
    obs, info = new_table().reset(seed=1)
    before = client.infer({**obs, "prompt": info["instruction"]})
    with pytest.raises(HTTPError) as refused:
        patch(running, action_prompt_template="{task}. Subtask: whatever")
    assert refused.value.code == 422
    assert json.load(refused.value)["detail"] == "action_prompt_template: has no {subtask}; put it where that text belongs"
    after = client.infer({**obs, "prompt": info["instruction"]})
    assert after["subtask"]["template_revision"] == before["subtask"]["template_revision"], "nothing was changed"


def test_another_wording_changes_the_prompt_of_the_next_request() -> None:
    with start(service_config(), stubs()) as running, closing(connect(running.addresses["action"])) as client:
        asked = [client.infer({"prompt": "tidy up"})]
        assert patch(running, action_prompt_template="now {subtask}, for {task}")["revision"] == 2
        asked.append(client.infer({"prompt": "tidy up"}))
    assert [reply["asked"]["prompt"] for reply in asked] == [
        "tidy up. Subtask: first step of tidy up",
        "now first step of tidy up, for tidy up",
    ]


def test_the_trained_policy_reads_the_template(running: RunningService, client: Client) -> None:
    """Same picture, same noise: other words, other actions; but not far off, as both forms were trained and the subtask is the same."""
    obs, info = new_table().reset(seed=2)
    request = {**obs, "prompt": info["instruction"], "seed": 1}
    chunks = {}
    for template in (DEFAULT_ACTION_PROMPT_TEMPLATE, "{subtask}"):
        revision = patch(running, action_prompt_template=template)["revision"]
        reply = client.infer(request)
        assert reply["subtask"]["template_revision"] == revision
        chunks[template] = reply["actions"]
    default, bare = chunks.values()
    assert not np.array_equal(default, bare) and np.abs(default - bare)[:, :2].mean() < 0.15


@pytest.mark.parametrize("template", [DEFAULT_ACTION_PROMPT_TEMPLATE, "{subtask}"])
def test_both_forms_get_there(running: RunningService, client: Client, template: str) -> None:
    patch(running, action_prompt_template=template)
    episodes = [lockstep(client, seed) for seed in range(500, 506)]
    assert sum(episode.success for episode in episodes) >= 5
