from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from hosting.admin import create_admin_app
from hosting.admin_bodies import MAX_BODY_BYTES
from hosting.settings_file import SettingsFile
from hosting.templates import MAX_TEMPLATE_CHARS, LiveSettings, PromptSettings

DEFAULTS = {
    "generation_prompt_format": "Task: {task}. Subtask: ",
    "action_prompt_template": "{task}. Subtask: {subtask}",
    "max_generation_tokens": 20,
    "revision": 1,
}
KEY = "correct horse"
PROBES = ("/health", "/ready", "/v2/health/live", "/v2/health/ready")
ALL = "generation_prompt_format, action_prompt_template, max_generation_tokens"
NOT_AN_OBJECT = f"body: expected a JSON object with some of {ALL}; got "


class Service:
    """What the app is told of the service, to be changed by tests."""

    def __init__(self) -> None:
        self.slots = {"action": "ready", "planner": "ready"}
        self.sessions = [{"id": f"robot-{i}"} for i in range(3)]
        self.policies: dict[str, Any] = {}

    def status(self) -> dict[str, Any]:
        return {
            "ready": all(state == "ready" for state in self.slots.values()),
            "mode": "combined",
            "slots": self.slots,
            "addresses": {"action": "ws://x:1"},
            "quic_certificate_sha256": "ab",
        }


class Tokenizing:
    """A policy that takes four words, each one token."""

    def preview_prompt(self, prompt: str) -> dict[str, Any]:
        words = prompt.split()
        return {
            "text": f"<{prompt}>",
            "token_ids": [len(word) for word in words],
            "tokens": len(words),
            "max_tokens": 4,
            "not_fitting": " ".join(words[4:]),
        }


Connect = Callable[..., httpx.AsyncClient]


@pytest.fixture
def settings() -> LiveSettings:
    return LiveSettings(PromptSettings())


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def connect(settings: LiveSettings, service: Service) -> Iterator[Connect]:
    def connecting(live: LiveSettings | None = settings, *, headers: Mapping[str, str] | None = None, **changed: Any) -> httpx.AsyncClient:
        arguments: dict[str, Any] = {
            "mode": "combined",
            "slots": ("action", "planner"),
            "status": service.status,
            "version": "1.2.3",
            "metrics": lambda: (b"tandem_sessions 3\n", "text/plain; version=0.0.4; charset=utf-8"),
            "slot_details": lambda: {"action": {"queue": 2}},
            "sessions": lambda limit: (len(service.sessions), service.sessions[:limit]),
            "previews": lambda: service.policies,
            **changed,
        }
        app = create_admin_app(live, **arguments)
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8001", headers=headers)

    return connecting


@pytest.fixture
def admin(connect: Connect) -> httpx.AsyncClient:
    return connect()


async def patch(admin: httpx.AsyncClient, content: str | bytes, content_type: str = "application/json") -> httpx.Response:
    return await admin.patch("/config", content=content, headers={"Content-Type": content_type})


@pytest.mark.parametrize(
    ("states", "health"),
    [
        ({"action": "ready", "planner": "ready"}, "ok"),
        ({"action": "ready", "planner": "loading"}, "starting"),
        ({"action": "warming", "planner": "ready"}, "starting"),
        ({"action": "stuck", "planner": "loading"}, "stuck"),
        ({"action": "draining", "planner": "ready"}, "draining"),
    ],
)
async def test_probes(admin: httpx.AsyncClient, service: Service, states: dict[str, str], health: str) -> None:
    service.slots = states
    code = 200 if health == "ok" else 503
    reply = await admin.get("/health")
    assert (reply.status_code, reply.json()) == (200, {"status": health, "mode": "combined", "slots": ["action", "planner"]})
    reply = await admin.get("/ready")
    assert (reply.status_code, reply.json()["ready"], reply.json()["slots"]) == (code, code == 200, states)
    reply = await admin.get("/v2/health/live")
    assert (reply.status_code, reply.json()) == (200, {"live": True})
    reply = await admin.get("/v2/health/ready")
    assert (reply.status_code, reply.json()) == (code, {"ready": code == 200})


@pytest.mark.parametrize("path", [*PROBES, "/metrics", "/config"])
async def test_head_is_answered_as_get(admin: httpx.AsyncClient, service: Service, path: str) -> None:
    service.slots = {"action": "ready", "planner": "stuck"}
    got, head = await admin.get(path), await admin.head(path)
    assert (head.status_code, head.headers) == (got.status_code, got.headers)


async def test_metrics_are_passed_on_as_they_are(admin: httpx.AsyncClient, connect: Connect) -> None:
    reply = await admin.get("/metrics")
    assert (reply.content, reply.headers["content-type"]) == (b"tandem_sessions 3\n", "text/plain; version=0.0.4; charset=utf-8")
    assert (await connect(metrics=None).get("/metrics")).status_code == 404


async def test_slots(admin: httpx.AsyncClient) -> None:
    assert (await admin.get("/slots")).json() == {"action": {"queue": 2}}


async def test_sessions_are_counted_all_and_listed_in_part(admin: httpx.AsyncClient, service: Service) -> None:
    assert (await admin.get("/sessions", params={"limit": 2})).json() == {"count": 3, "limit": 2, "sessions": [{"id": "robot-0"}, {"id": "robot-1"}]}
    service.sessions *= 100
    reply = (await admin.get("/sessions")).json()
    assert (reply["count"], reply["limit"], len(reply["sessions"])) == (300, 100, 100)
    reply = await admin.get("/sessions", params={"limit": "many"})
    assert (reply.status_code, reply.json()["detail"]) == (
        422,
        'limit: input should be a valid integer, unable to parse string as an integer, got "many"',
    )


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
        ([], NOT_AN_OBJECT + "[]"),
        ("text", NOT_AN_OBJECT + '"text"'),
        (None, NOT_AN_OBJECT + "null"),
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
    reply = await patch(admin, json.dumps(body))
    assert (reply.status_code, reply.json()) == (422, {"detail": detail})
    assert settings.current is before


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        ('{"max_generation_tokens": }', "body: not valid JSON at character 26: Expecting value"),
        ("", NOT_AN_OBJECT + "nothing"),
        ('{"max_generation_tokens": 5, "max_generation_tokens": 6}', "max_generation_tokens: given twice in one object; keep one"),
        ('{"max_generation_tokens": NaN}', "NaN is not a JSON number; write a finite one"),
        ('{"max_generation_tokens": ' + "9" * 5000 + "}", "99999999999999999999… has 5000 digits; write a smaller number"),
        ("[" * 50_000, "nested too deeply"),
        (b'{"generation_prompt_format": "\xff{task}"}', "body: not UTF-8 text (byte 30); send it as UTF-8"),
    ],
)
async def test_refused_body(admin: httpx.AsyncClient, settings: LiveSettings, content: str | bytes, detail: str) -> None:
    before = settings.current
    reply = await patch(admin, content)
    assert (reply.status_code, reply.json()) == (422, {"detail": detail})
    assert settings.current is before


async def test_of_many_problems_the_first_are_told(admin: httpx.AsyncClient) -> None:
    reply = await patch(admin, json.dumps({f"field {i}": i for i in range(1000)}))
    lines = reply.json()["detail"].splitlines()
    assert (reply.status_code, len(lines), lines[-1]) == (422, 21, "and 980 more problems")
    assert lines[0].startswith("field 0: unknown field; ")


async def test_the_longest_templates_fit_however_they_are_spelt(admin: httpx.AsyncClient) -> None:
    filler = "\U0001f916" * (MAX_TEMPLATE_CHARS - len("{subtask}"))
    longest = {"generation_prompt_format": filler + "{task}", "action_prompt_template": filler + "{subtask}"}
    reply = await patch(admin, json.dumps(longest, ensure_ascii=True))
    assert (reply.status_code, reply.json()) == (200, {**DEFAULTS, **longest, "revision": 2})


async def test_a_long_body_is_not_read_to_its_end(admin: httpx.AsyncClient, settings: LiveSettings) -> None:
    sent = 0

    async def long() -> Any:
        nonlocal sent
        for _ in range(8):
            sent += MAX_BODY_BYTES // 2
            yield b" " * (MAX_BODY_BYTES // 2)

    reply = await admin.patch("/config", content=long(), headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()) == (413, {"detail": f"body: has more than {MAX_BODY_BYTES} bytes; shorten it"})
    assert sent <= 2 * MAX_BODY_BYTES
    assert settings.current.revision == 1


async def test_a_body_that_does_not_come_is_not_waited_for(admin: httpx.AsyncClient, settings: LiveSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stalled() -> Any:
        yield b'{"max_generation_tokens": '
        await asyncio.Event().wait()

    monkeypatch.setattr("hosting.admin_bodies.BODY_TIMEOUT_S", 0.0)
    reply = await admin.patch("/config", content=stalled(), headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()) == (408, {"detail": "body: has not come within 0 s; send it again"})
    assert reply.headers["connection"] == "close"
    assert settings.current.revision == 1


async def test_concurrent_patches_all_count(admin: httpx.AsyncClient) -> None:
    """Each reply is one revision, whole: the two values that were sent together are never mixed with another's."""
    replies = await asyncio.gather(
        *(admin.patch("/config", json={"generation_prompt_format": f"{i} {{task}}", "max_generation_tokens": 100 + i}) for i in range(40))
    )
    assert sorted(reply.json()["revision"] for reply in replies) == list(range(2, 42))
    for reply in replies:
        assert reply.json()["generation_prompt_format"] == f"{reply.json()['max_generation_tokens'] - 100} {{task}}"


class TestETag:
    async def test_it_names_the_settings(self, admin: httpx.AsyncClient, settings: LiveSettings) -> None:
        reply = await admin.get("/config")
        tag = reply.headers["etag"]
        assert re.fullmatch('"1-[0-9a-f]{8}"', tag)
        changed = await admin.patch("/config", json={"max_generation_tokens": 5}, headers={"If-Match": tag})
        assert changed.status_code == 200
        assert re.fullmatch('"2-[0-9a-f]{8}"', changed.headers["etag"])
        assert (await admin.get("/config")).headers["etag"] == changed.headers["etag"] == settings.current.etag

    @pytest.mark.parametrize("form", ["{}", "W/{}", '"9-00000000", {}', "*"])
    async def test_what_is_known_is_not_sent_again(self, admin: httpx.AsyncClient, settings: LiveSettings, form: str) -> None:
        reply = await admin.get("/config", headers={"If-None-Match": form.format(settings.current.etag)})
        assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", settings.current.etag)

    async def test_what_is_not_known_is_sent(self, admin: httpx.AsyncClient) -> None:
        assert (await admin.get("/config", headers={"If-None-Match": '"1-00000000"'})).json() == DEFAULTS

    @pytest.mark.parametrize("form", ["{}", '"9-00000000", {}', "*"])
    async def test_a_change_for_what_is_in_force(self, admin: httpx.AsyncClient, settings: LiveSettings, form: str) -> None:
        headers = {"If-Match": form.format(settings.current.etag)}
        assert (await admin.patch("/config", json={"max_generation_tokens": 5}, headers=headers)).json()["revision"] == 2

    @pytest.mark.parametrize("form", ['"1-00000000"', "W/{}", "unquoted", ""])
    async def test_a_change_for_anything_else_is_refused(self, admin: httpx.AsyncClient, settings: LiveSettings, form: str) -> None:
        before = settings.current
        sent = form.format(before.etag)
        headers = {"If-Match": sent}
        for reply in (
            await admin.patch("/config", json={"max_generation_tokens": 5}, headers=headers),
            await admin.post("/config/rollback/1", headers=headers),
        ):
            text = f"If-Match: got {sent or 'nothing'}; revision 1 with the ETag {before.etag} is in force; read it again, then repeat the change"
            assert (reply.status_code, reply.json(), reply.headers["etag"]) == (412, {"detail": text}, before.etag)
        assert settings.current is before

    async def test_of_editors_who_read_the_same_one_wins(self, admin: httpx.AsyncClient, settings: LiveSettings) -> None:
        headers = {"If-Match": settings.current.etag}
        replies = await asyncio.gather(*(admin.patch("/config", json={"max_generation_tokens": 30 + i}, headers=headers) for i in range(20)))
        won = [reply for reply in replies if reply.status_code == 200]
        assert [reply.status_code for reply in replies if reply not in won] == [412] * 19
        assert settings.current.max_generation_tokens == won[0].json()["max_generation_tokens"]
        assert settings.current.revision == 2


class TestHistory:
    async def test_newest_first(self, connect: Connect) -> None:
        seconds = iter([0.0, 86_400.5])
        admin = connect(LiveSettings(PromptSettings(), clock=lambda: next(seconds)))
        await admin.patch("/config", json={"max_generation_tokens": 5})
        assert (await admin.get("/config/history")).json() == {
            "revisions": [
                {**DEFAULTS, "max_generation_tokens": 5, "revision": 2, "changed_at": "1970-01-02T00:00:00.500Z", "source": "update"},
                {**DEFAULTS, "changed_at": "1970-01-01T00:00:00.000Z", "source": "start"},
            ]
        }

    async def test_rollback_is_a_new_revision(self, admin: httpx.AsyncClient, settings: LiveSettings) -> None:
        await admin.patch("/config", json={"max_generation_tokens": 5})
        reply = await admin.post("/config/rollback/1", headers={"If-Match": settings.current.etag})
        assert (reply.status_code, reply.json()) == (200, {**DEFAULTS, "revision": 3})
        assert reply.headers["etag"] == settings.current.etag
        assert (await admin.get("/config/history")).json()["revisions"][0]["source"] == "rollback to 1"

    @pytest.mark.parametrize(
        ("revision", "code", "detail"),
        [
            ("7", 404, "revision: 7 is not in the history, which has the last 100; take one of 1, 2"),
            ("first", 422, 'revision: input should be a valid integer, unable to parse string as an integer, got "first"'),
        ],
    )
    async def test_no_such_revision(self, admin: httpx.AsyncClient, settings: LiveSettings, revision: str, code: int, detail: str) -> None:
        await admin.patch("/config", json={"max_generation_tokens": 5})
        reply = await admin.post(f"/config/rollback/{revision}")
        assert (reply.status_code, reply.json()) == (code, {"detail": detail})
        assert settings.current.revision == 2


class TestPreview:
    async def test_both_prompts_and_their_tokens(self, admin: httpx.AsyncClient, service: Service, settings: LiveSettings) -> None:
        before = settings.current
        service.policies = {"planner": Tokenizing(), "action": Tokenizing()}
        reply = await admin.post("/config/preview", json={"task": "Tidy_the table!", "subtask": "pick up the {cup}"})
        assert (reply.status_code, reply.json()) == (
            200,
            {
                "revision": 1,
                # The planner reads a task in lower case and without its last punctuation mark; the action policy's is left as it is.
                "planner": {
                    "prompt": "Task: tidy the table. Subtask: ",
                    "text": "<Task: tidy the table. Subtask: >",
                    "token_ids": [5, 4, 3, 6, 8],
                    "tokens": 5,
                    "max_tokens": 4,
                    "not_fitting": "Subtask:",
                    "reason": None,
                },
                "action": {
                    "prompt": "Tidy_the table!. Subtask: pick up the {cup}",
                    "text": "<Tidy_the table!. Subtask: pick up the {cup}>",
                    "token_ids": [8, 7, 8, 4, 2, 3, 5],
                    "tokens": 7,
                    "max_tokens": 4,
                    "not_fitting": "up the {cup}",
                    "reason": None,
                },
            },
        )
        assert settings.current is before

    async def test_settings_to_try_are_not_set(self, admin: httpx.AsyncClient, settings: LiveSettings) -> None:
        before = settings.current
        body = {
            "task": "a",
            "subtask": "b",
            "generation_prompt_format": "Do {task}",
            "action_prompt_template": "{subtask}!",
            "max_generation_tokens": 7,
        }
        reply = (await admin.post("/config/preview", json=body)).json()
        assert (reply["planner"]["prompt"], reply["action"]["prompt"]) == ("Do a", "b!")
        assert settings.current is before

    async def test_without_tokens_it_says_why(self, admin: httpx.AsyncClient, service: Service) -> None:
        service.slots = {"action": "ready", "planner": "loading"}
        reply = (await admin.post("/config/preview", json={"task": "a", "subtask": "b"})).json()
        assert reply["planner"]["prompt"] == "Task: a. Subtask: "
        assert (reply["planner"]["tokens"], reply["planner"]["reason"]) == (None, "the planner slot is loading; ask again when it is ready")
        assert (reply["action"]["tokens"], reply["action"]["reason"]) == (None, "the policy of the action slot does not tell its tokens")
        reply = (await admin.post("/config/preview", json={"task": "a"})).json()
        assert reply["action"]["prompt"] is None
        assert reply["action"]["reason"] == "no subtask was given; send an example to see what the action policy would get"

    async def test_without_an_action_slot(self, connect: Connect) -> None:
        reply = await connect(slots=("planner",)).post("/config/preview", json={"task": "a", "subtask": "b"})
        assert (reply.json()["planner"]["prompt"], reply.json()["action"]) == ("Task: a. Subtask: ", None)

    @pytest.mark.parametrize(
        ("body", "detail"),
        [
            ({}, "task: missing; send it in the body"),
            ({"task": None}, "task: expected a string, got null"),
            ({"task": "\ud800"}, "task: has half a character (a lone surrogate); remove it"),
            ({"task": "a", "subtask": " "}, "subtask: is blank; give a value or leave the field out"),
            ({"task": "a", "sub_task": "b"}, 'sub_task: unknown field; did you mean "subtask"?'),
            ({"task": "a", "action_prompt_template": "{task}"}, "action_prompt_template: has no {subtask}; put it where that text belongs"),
        ],
    )
    async def test_refused(self, admin: httpx.AsyncClient, body: Any, detail: str) -> None:
        reply = await admin.post("/config/preview", content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert (reply.status_code, reply.json()) == (422, {"detail": detail})


async def test_a_change_that_cannot_be_kept_is_not_made(connect: Connect, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "kept"
    directory.mkdir()
    live = LiveSettings(PromptSettings(), file=SettingsFile(directory / "settings.json"))
    before = live.current
    directory.rmdir()
    reply = await connect(live).patch("/config", json={"max_generation_tokens": 5})
    text = f"admin.settings_file: {directory}/settings.json cannot be written (No such file or directory); nothing is changed"
    assert (reply.status_code, reply.json()) == (500, {"detail": text})
    assert live.current is before
    assert "prompt settings were not changed" in caplog.text


@pytest.mark.parametrize(("method", "path"), [("GET", "/config"), ("PATCH", "/config"), ("GET", "/config/history"), ("POST", "/config/preview")])
async def test_without_a_planner_there_is_nothing_to_edit(connect: Connect, method: str, path: str) -> None:
    admin = connect(None, mode="action_only", slots=("action",))
    reply = await admin.request(method, path, json={"max_generation_tokens": 5} if method != "GET" else None)
    assert (reply.status_code, reply.json()) == (404, {"detail": "no planner is configured; there is nothing to edit"})
    assert (await admin.get("/health")).json()["slots"] == ["action"]
    assert not any(path.startswith("/config") for path in (await admin.get("/openapi.json")).json()["paths"])


class TestKey:
    @pytest.mark.parametrize("path", ["/config", "/metrics", "/slots", "/sessions", "/docs", "/openapi.json", "/nowhere", "/health/"])
    @pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}, {"X-API-Key": ""}])
    async def test_refused_without_it(self, connect: Connect, path: str, headers: dict[str, str]) -> None:
        reply = await connect(api_key=KEY, headers=headers).get(path)
        text = "unauthorized: send the server's API key as 'Authorization: Api-Key KEY' or 'Authorization: Bearer KEY'"
        assert (reply.status_code, reply.json(), reply.headers["www-authenticate"]) == (401, {"detail": text}, "Api-Key, Bearer")

    async def test_a_refused_change_is_none(self, connect: Connect, settings: LiveSettings) -> None:
        assert (await connect(api_key=KEY).patch("/config", json={"max_generation_tokens": 5})).status_code == 401
        assert settings.current.revision == 1

    @pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {KEY}"}, {"Authorization": f"api-key {KEY}"}, {"X-API-Key": KEY}])
    async def test_served_with_it(self, connect: Connect, headers: dict[str, str]) -> None:
        admin = connect(api_key=KEY, headers=headers)
        assert (await admin.patch("/config", json={"max_generation_tokens": 5})).json()["revision"] == 2
        assert (await admin.get("/docs")).status_code == 200

    @pytest.mark.parametrize("path", PROBES)
    async def test_supervisors_need_none(self, connect: Connect, path: str) -> None:
        assert (await connect(api_key=KEY).get(path)).status_code == 200

    async def test_openapi_says_so(self, connect: Connect) -> None:
        paths = (await connect(api_key=KEY, headers={"X-API-Key": KEY}).get("/openapi.json")).json()["paths"]
        secured = {path for path, methods in paths.items() for method in methods.values() if "security" in method and "401" in method["responses"]}
        assert secured == set(paths) - set(PROBES)


class TestPagesOfOthers:
    """A browser on this machine shows pages of strangers, which can send requests to its loopback addresses."""

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8001", "127.0.0.1", "127.1.2.3:8001", "[::1]:8001"])
    async def test_names_of_this_machine(self, connect: Connect, host: str) -> None:
        assert (await connect().get("/config", headers={"Host": host})).status_code == 200

    @pytest.mark.parametrize(
        "host",
        ["evil.example", "evil.example:8001", "127.0.0.1.evil.example", "localhost.evil.example", "[::2]", "10.0.0.1", "robot.lan:8001", "", "a b:c"],
    )
    @pytest.mark.parametrize("path", ["/config", "/health", "/docs"])
    async def test_a_rebound_name_is_not_answered(self, connect: Connect, host: str, path: str) -> None:
        reply = await connect().get(path, headers={"Host": host})
        assert reply.status_code == 421
        assert reply.json()["detail"].startswith("Host: this port answers to localhost and loopback addresses, got ")

    async def test_with_a_key_any_name_will_do(self, connect: Connect) -> None:
        assert (await connect(api_key=KEY, headers={"X-API-Key": KEY}).get("/config", headers={"Host": "robot.example"})).status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://[", "Host": "localhost"},
            {"Origin": "http://127.0.0.1:3000"},  # another program on this machine
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:8001"},
        ],
    )
    @pytest.mark.parametrize(("method", "path"), [("PATCH", "/config"), ("POST", "/config/rollback/1"), ("POST", "/config/preview")])
    async def test_they_can_change_nothing(
        self, admin: httpx.AsyncClient, settings: LiveSettings, headers: dict[str, str], method: str, path: str
    ) -> None:
        settings.update(max_generation_tokens=9)
        body = {"max_generation_tokens": 5, **({"task": "a"} if path.endswith("preview") else {})}
        reply = await admin.request(method, path, json=body, headers=headers)
        assert (reply.status_code, reply.json()["detail"].partition(":")[0]) == (403, "Origin")
        assert settings.current.max_generation_tokens == 9

    @pytest.mark.parametrize("headers", [{"Origin": "http://127.0.0.1:8001"}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}])
    async def test_our_own_page_can(self, admin: httpx.AsyncClient, headers: dict[str, str]) -> None:
        assert (await admin.patch("/config", json={"max_generation_tokens": 5}, headers=headers)).status_code == 200
        assert (await admin.post("/config/rollback/1", headers=headers)).status_code == 200

    @pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
    @pytest.mark.parametrize(("method", "path"), [("PATCH", "/config"), ("POST", "/config/preview")])
    async def test_what_needs_no_preflight_is_refused(
        self, admin: httpx.AsyncClient, settings: LiveSettings, method: str, path: str, content_type: str
    ) -> None:
        reply = await admin.request(method, path, content='{"max_generation_tokens": 5, "task": "a"}', headers={"Content-Type": content_type})
        got = json.dumps(content_type) if content_type else "none"
        text = f'body: send JSON with the header "Content-Type: application/json", got {got}'
        assert (reply.status_code, reply.json()) == (415, {"detail": text})
        assert settings.current.revision == 1

    async def test_a_preflight_gets_no_permission(self, admin: httpx.AsyncClient) -> None:
        headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "content-type"}
        reply = await admin.options("/config", headers=headers)
        assert reply.status_code == 405
        assert not [name for name in reply.headers if name.startswith("access-control-")]
        assert not [name for name in (await admin.get("/config", headers=headers)).headers if name.startswith("access-control-")]


async def test_openapi_describes_it(admin: httpx.AsyncClient) -> None:
    assert (await admin.get("/docs")).status_code == 200
    schema = (await admin.get("/openapi.json")).json()
    assert (schema["info"]["title"], schema["info"]["version"]) == ("Tandem admin", "1.2.3")
    assert set(schema["paths"]) == {
        *PROBES,
        "/metrics",
        "/slots",
        "/sessions",
        "/config",
        "/config/history",
        "/config/rollback/{revision}",
        "/config/preview",
    }
    change = schema["components"]["schemas"]["PromptConfigChange"]
    assert set(change["properties"]) == {"generation_prompt_format", "action_prompt_template", "max_generation_tokens"}
    assert "required" not in change
    for field in change["properties"].values():
        assert field["description"]
        assert field["examples"]
        assert "default" not in field
    assert schema["paths"]["/config"]["patch"]["responses"]["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/Refusal")
    assert set(schema["paths"]["/config"]["patch"]["responses"]) == {"200", "403", "408", "412", "413", "415", "422", "500"}
    for path, methods in schema["paths"].items():
        for method in methods.values():
            assert method["summary"], path
            assert path == "/metrics" or method["responses"]["200"]["content"]["application/json"]["schema"], path
