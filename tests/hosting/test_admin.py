from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest

from hosting.admin import create_admin_app
from hosting.templates import LiveSettings, PromptSettings

DEFAULTS = {
    "generation_prompt_format": "Task: {task}. Subtask: ",
    "action_prompt_template": "{task}. Subtask: {subtask}",
    "max_generation_tokens": 20,
    "revision": 1,
}
ALL = "generation_prompt_format, action_prompt_template, max_generation_tokens"
NOT_AN_OBJECT = f'body: expected a JSON object, sent with the header "Content-Type: application/json", that has at least one of {ALL}'


@pytest.fixture
def settings() -> LiveSettings:
    return LiveSettings(PromptSettings())


@pytest.fixture
def ready() -> list[bool]:
    return [True]


@pytest.fixture
def admin(settings: LiveSettings, ready: list[bool]) -> httpx.AsyncClient:
    def status() -> dict[str, Any]:
        slots = dict.fromkeys(("action", "planner"), "ready" if ready[0] else "loading")
        return {"ready": ready[0], "mode": "combined", "slots": slots, "addresses": {"action": "ws://x:1"}, "quic_certificate_sha256": "ab"}

    app = create_admin_app(settings, mode="combined", slots=("action", "planner"), status=status, version="1.2.3")
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://admin")


async def test_health(admin: httpx.AsyncClient, ready: list[bool]) -> None:
    assert (await admin.get("/health")).json() == {"status": "ok", "mode": "combined", "slots": ["action", "planner"]}
    ready[0] = False
    reply = await admin.get("/health")
    assert (reply.status_code, reply.json()["status"]) == (200, "starting")


async def test_ready_says_it_with_its_status_code_too(admin: httpx.AsyncClient, ready: list[bool]) -> None:
    reply = await admin.get("/ready")
    assert (reply.status_code, reply.json()["slots"]) == (200, {"action": "ready", "planner": "ready"})
    ready[0] = False
    reply = await admin.get("/ready")
    assert (reply.status_code, reply.json()["ready"]) == (503, False)


async def test_patch_changes_what_is_given_and_is_in_force_at_once(admin: httpx.AsyncClient, settings: LiveSettings) -> None:
    assert (await admin.get("/config")).json() == DEFAULTS
    reply = await admin.patch("/config", json={"action_prompt_template": "{subtask}"})
    assert (reply.status_code, reply.json()) == (200, {**DEFAULTS, "action_prompt_template": "{subtask}", "revision": 2})
    assert settings.current.action_prompt(task="a", subtask="b") == "b"
    reply = await admin.patch("/config", json={"generation_prompt_format": "Do {task}: ", "max_generation_tokens": 256})
    assert reply.json() == {
        "generation_prompt_format": "Do {task}: ",
        "action_prompt_template": "{subtask}",
        "max_generation_tokens": 256,
        "revision": 3,
    }
    assert (await admin.get("/config")).json() == reply.json()


async def test_the_same_values_again_are_no_new_revision(admin: httpx.AsyncClient) -> None:
    reply = await admin.patch("/config", json={key: value for key, value in DEFAULTS.items() if key != "revision"})
    assert (reply.status_code, reply.json()) == (200, DEFAULTS)


async def test_a_change_is_logged(admin: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hosting.templates"):
        await admin.patch("/config", json={"max_generation_tokens": 5})
    assert caplog.messages == ["prompt settings revision 2: max_generation_tokens changed from 20 to 5"]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, f"body: names no setting; send at least one of {ALL}"),
        ([], NOT_AN_OBJECT),
        ("text", NOT_AN_OBJECT),
        (None, NOT_AN_OBJECT),
        ({"prompt": "x"}, f"prompt: unknown field; known here: {ALL}"),
        ({"revision": 5}, f"revision: unknown field; known here: {ALL}"),
        ({"action_prompt_templat": "{subtask}"}, 'action_prompt_templat: unknown field; did you mean "action_prompt_template"?'),
        ({"generation_prompt_format": "x"}, "generation_prompt_format: has no {task}; put it where that text belongs"),
        ({"generation_prompt_format": ""}, "generation_prompt_format: is blank; write a text with {task}"),
        ({"generation_prompt_format": None}, "generation_prompt_format: expected a string, got null"),
        ({"generation_prompt_format": 5}, "generation_prompt_format: expected a string, got 5"),
        ({"generation_prompt_format": "{task}\ud800"}, "generation_prompt_format: has half a character (a lone surrogate) at character 7; remove it"),
        (
            {"generation_prompt_format": "{task} {x}"},
            "generation_prompt_format: has an unknown placeholder '{x}' at character 8; use {task}, and {{ or }} for a literal brace",
        ),
        ({"action_prompt_template": "{task}"}, "action_prompt_template: has no {subtask}; put it where that text belongs"),
        ({"max_generation_tokens": 0}, "max_generation_tokens: expected an integer 1…256, got 0"),
        ({"max_generation_tokens": 257}, "max_generation_tokens: expected an integer 1…256, got 257"),
        ({"max_generation_tokens": "20"}, 'max_generation_tokens: expected an integer 1…256, got "20"'),
        ({"max_generation_tokens": True}, "max_generation_tokens: expected an integer 1…256, got true"),
        ({"max_generation_tokens": 2.5}, "max_generation_tokens: expected an integer 1…256, got 2.5"),
        (
            {"action_prompt_template": "{", "max_generation_tokens": 0},
            "action_prompt_template: has a single '{' at character 1; use {task} and {subtask}, and {{ or }} for a literal brace\n"
            "max_generation_tokens: expected an integer 1…256, got 0",
        ),
    ],
)
async def test_refused_with_the_reason(admin: httpx.AsyncClient, settings: LiveSettings, body: Any, detail: str) -> None:
    before = settings.current
    # One good value beside the bad one: it must not be applied either.
    if isinstance(body, dict) and body and "generation_prompt_format" not in body:
        body = {"generation_prompt_format": "Good {task}", **body}
    reply = await admin.patch("/config", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()) == (422, {"detail": detail})
    assert settings.current is before


@pytest.mark.parametrize(
    ("content", "content_type", "detail"),
    [
        ('{"max_generation_tokens": }', "application/json", "body: not valid JSON at character 26: Expecting value"),
        ('{"max_generation_tokens": 5}', "application/x-www-form-urlencoded", NOT_AN_OBJECT),  # curl -d without a header
        ("", "application/json", NOT_AN_OBJECT),
    ],
)
async def test_refused_body(admin: httpx.AsyncClient, settings: LiveSettings, content: str, content_type: str, detail: str) -> None:
    before = settings.current
    reply = await admin.patch("/config", content=content, headers={"Content-Type": content_type})
    assert (reply.status_code, reply.json()) == (422, {"detail": detail})
    assert settings.current is before


async def test_concurrent_patches_all_count(admin: httpx.AsyncClient) -> None:
    """Each reply is one revision, whole: the two values that were sent together are never mixed with another's."""
    replies = await asyncio.gather(
        *(admin.patch("/config", json={"generation_prompt_format": f"{i} {{task}}", "max_generation_tokens": 100 + i}) for i in range(40))
    )
    assert sorted(reply.json()["revision"] for reply in replies) == list(range(2, 42))
    for reply in replies:
        assert reply.json()["generation_prompt_format"] == f"{reply.json()['max_generation_tokens'] - 100} {{task}}"


async def test_openapi_describes_it(admin: httpx.AsyncClient) -> None:
    assert (await admin.get("/docs")).status_code == 200
    schema = (await admin.get("/openapi.json")).json()
    assert (schema["info"]["title"], schema["info"]["version"]) == ("Tandem admin", "1.2.3")
    assert set(schema["paths"]) == {"/health", "/ready", "/config"}
    change = schema["components"]["schemas"]["PromptConfigChange"]
    assert set(change["properties"]) == {"generation_prompt_format", "action_prompt_template", "max_generation_tokens"}
    assert "required" not in change
    for field in change["properties"].values():
        assert field["description"]
        assert field["examples"]
        assert "default" not in field
    assert schema["paths"]["/config"]["patch"]["responses"]["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/Refusal")
