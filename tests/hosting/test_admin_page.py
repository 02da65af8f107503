"""The page's routes, and an operator's instruction, over real sockets and with unmodified clients."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import numpy as np
import pytest
import simplejpeg
from PIL import Image
from websockets.sync.client import connect

from hosting import admin_page
from hosting.admin_page import FILES, MAX_UPLOAD_BYTES
from hosting.clients.client import Client
from hosting.clients.errors import InferenceError
from hosting.combined import MAX_TASK_CHARS
from hosting.config import AdminConfig, PlannerConfig
from hosting.policy import OverloadedError
from hosting.protocol import msgpack_numpy
from tests.serving import EchoPlanner, EchoPolicy, RunningService, service_config, start, stubs

KEY = "correct horse"
TEXT = "put the cup away"
IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


class Planner(EchoPlanner):
    """Remembers what it was asked last, and fails as it is told to."""

    def __init__(self) -> None:
        super().__init__(self.asked)
        self.observation: Mapping[str, Any] = {}
        self.error: Exception | None = None

    def asked(self, obs: Mapping[str, Any]) -> None:
        self.observation = obs
        if self.error is not None:
            raise self.error


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner()


@pytest.fixture(scope="module")
def service(planner: Planner) -> Iterator[RunningService]:
    with start(service_config(admin=AdminConfig(port=0, page=True)), stubs(planner=planner)) as running:
        yield running


@pytest.fixture
def admin(service: RunningService) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.http("admin")) as client:
        yield client


@pytest.fixture
def robot(service: RunningService, request: pytest.FixtureRequest) -> Iterator[Client]:
    with Client(service.addresses["action"], session_id=request.node.name[:200]) as client:
        yield client


def key_of(admin: httpx.Client, robot: Client | None, request: pytest.FixtureRequest) -> int:
    name = request.node.name[:200] if robot is not None else None
    sessions = admin.get("/page/state").json()["sessions"]
    key: int = next(session["key"] for session in sessions if session["id"] == name and not session["ended"])
    return key


def instruct(admin: httpx.Client, key: int, text: Any = TEXT) -> httpx.Response:
    return admin.put(f"/page/sessions/{key}/instruction", json={"text": text})


def png(width: int = 20, height: int = 10) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (255, 0, 0)).save(file, "PNG")
    return file.getvalue()


class TestAccess:
    def test_without_admin_page_there_is_nothing_of_it(self) -> None:
        with start(service_config(), stubs()) as service, httpx.Client(base_url=service.http("admin")) as admin:
            for path in (*FILES, "/page/state", "/page/sessions/0/images/x"):
                assert admin.get(path).status_code == 404, path
            with Client(service.addresses["action"]) as robot:
                robot.infer({"prompt": "tidy"})
            assert instruct(admin, 0).status_code == admin.delete("/page/sessions/0/instruction").status_code == 404
            assert admin.post("/page/plan?task=x", content=png(), headers={"Content-Type": "image/png"}).status_code == 404

    def test_its_files_are_whole_and_guarded(self, admin: httpx.Client) -> None:
        for path, (name, content_type) in FILES.items():
            answer = admin.get(path)
            assert answer.status_code == 200 and answer.headers["content-type"] == content_type, path
            assert "default-src 'none'" in answer.headers["content-security-policy"] and answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-cache" and len(answer.content) > 100, name
            known = admin.get(path, headers={"If-None-Match": answer.headers["etag"]})
            assert (known.status_code, known.content) == (304, b"")
            assert admin.head(path).status_code == 200
        shell = admin.get("/").text
        assert "http://" not in shell and "https://" not in shell and " style=" not in shell and " on" + "click" not in shell

    def test_its_routes_are_no_part_of_the_stable_api(self, admin: httpx.Client) -> None:
        assert not [path for path in admin.get("/openapi.json").json()["paths"] if path == "/" or path.startswith("/page")]

    def test_with_a_key_its_files_alone_need_none(self) -> None:
        config = service_config(admin=AdminConfig(port=0, page=True, api_key=KEY))
        with start(config, stubs()) as service, httpx.Client(base_url=service.http("admin")) as admin, Client(service.addresses["action"]) as robot:
            robot.infer({"prompt": "tidy", "images": {"cam_high": IMAGE}})
            assert {path: admin.get(path).status_code for path in FILES} == dict.fromkeys(FILES, 200)
            for path in ("/page/state", "/page/sessions/0/images/cam_high", "/page/", "/page/page.js/"):
                assert admin.get(path).status_code == 401, path
            assert instruct(admin, 0).status_code == admin.delete("/page/sessions/0/instruction").status_code == 401
            assert admin.post("/page/plan?task=x", content=png(), headers={"Content-Type": "image/png"}).status_code == 401
            admin.headers["X-API-Key"] = KEY
            assert admin.get("/page/state").json()["sessions"][0]["prompt"] == "tidy"
            assert admin.get("/page/sessions/0/images/cam_high").status_code == 200
            assert instruct(admin, 0).status_code == 200

    @pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://elsewhere.example"}])
    def test_no_page_of_another_site_can_tell_a_robot_anything(
        self, admin: httpx.Client, robot: Client, request: pytest.FixtureRequest, headers: dict[str, str]
    ) -> None:
        robot.infer({"prompt": "tidy"})
        path = f"/page/sessions/{key_of(admin, robot, request)}/instruction"
        assert admin.put(path, json={"text": TEXT}, headers=headers).status_code == 403
        assert admin.post("/page/plan?task=x", content=png(), headers={"Content-Type": "image/png", **headers}).status_code == 403
        assert "instruction" not in robot.infer({"prompt": "tidy"})

    def test_names_that_are_rebound_get_nothing(self, admin: httpx.Client) -> None:
        for path in ("/", "/page/state"):
            assert admin.get(path, headers={"Host": "elsewhere.example"}).status_code == 421


class TestState:
    def test_what_came_of_a_session(self, admin: httpx.Client, robot: Client, request: pytest.FixtureRequest) -> None:
        robot.infer({"prompt": "tidy", "state": np.arange(14.0), "images": {"cam_high": IMAGE}})
        key = key_of(admin, robot, request)
        answer = admin.get(f"/page/state?session={key}")
        assert answer.headers["cache-control"] == "no-store"
        state = answer.json()
        assert (state["mode"], state["ready"], state["settings"]["revision"]) == ("combined", True, 1)
        assert state["slots"]["action"]["state"] == "ready" and state["latency"]["request"]["n"] >= 1
        session = state["session"]
        assert [camera["name"] for camera in session["cameras"]] == ["cam_high"]
        assert session["states"][0][1] == list(range(14)) and np.shape(session["chunks"][0][1]) == (10, 14)
        (entry,) = session["subtasks"]
        assert (entry["text"], entry["task"], entry["waited"], entry["template_revision"]) == ("first step of tidy", "tidy", True, 1)
        newer = admin.get(f"/page/state?session={key}&since={session['version']}").json()["session"]
        assert newer["subtasks"] == newer["states"] == newer["chunks"] == []

    def test_one_that_is_not_there(self, admin: httpx.Client) -> None:
        assert admin.get("/page/state?session=123456").json()["session"] is None
        assert admin.get("/page/state?session=x").status_code == 422

    def test_pictures_raw_and_jpeg(self, admin: httpx.Client, robot: Client, request: pytest.FixtureRequest) -> None:
        jpeg = simplejpeg.encode_jpeg(np.full((8, 16, 3), 90, np.uint8))
        robot.infer({"prompt": "tidy", "observation/image": IMAGE, "observation/wrist_image": jpeg})
        key = key_of(admin, robot, request)
        for name, shape in (("observation/image", (4, 6, 3)), ("observation/wrist_image", (8, 16, 3))):
            answer = admin.get(f"/page/sessions/{key}/images/{name.replace('/', '%2F')}?v=1")
            assert answer.headers["content-type"] == "image/jpeg" and answer.headers["cache-control"] == "no-store"
            assert simplejpeg.decode_jpeg(answer.content).shape == shape
        missing = admin.get(f"/page/sessions/{key}/images/{'n' * 300}")
        assert missing.status_code == 404 and len(missing.json()["detail"]) < 300

    def test_a_picture_is_encoded_once(
        self, admin: httpx.Client, robot: Client, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoded: list[Any] = []
        to_jpeg = admin_page.page_images.to_jpeg
        monkeypatch.setattr(admin_page.page_images, "to_jpeg", lambda image: [encoded.append(image), to_jpeg(image)][1])
        robot.infer({"prompt": "tidy", "images": {"cam_high": IMAGE}})
        path = f"/page/sessions/{key_of(admin, robot, request)}/images/cam_high"
        first = admin.get(path).content
        assert admin.get(path).content == first and len(encoded) == 1
        robot.infer({"prompt": "tidy", "images": {"cam_high": IMAGE[::-1]}})
        assert admin.get(path).content != first and len(encoded) == 2

    def test_a_refused_request_says_why(self, admin: httpx.Client, robot: Client) -> None:
        with pytest.raises(InferenceError):
            robot.infer({"prompt": "tidy", "mode": "nonsense"})
        refusals = [session["refusal"] for session in admin.get("/page/state").json()["sessions"]]
        assert "mode: got 'nonsense'" in next(refusal["text"] for refusal in refusals if refusal)


class TestInstruction:
    def test_in_the_place_of_the_prompt_until_it_is_withdrawn(
        self, admin: httpx.Client, robot: Client, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert "instruction" not in robot.infer({"prompt": "tidy"})
        key = key_of(admin, robot, request)
        with caplog.at_level(logging.INFO):
            assert instruct(admin, key).json() == {"key": key, "instruction": TEXT}
        assert TEXT in caplog.text
        reply = robot.infer({"prompt": "tidy"})
        assert reply["instruction"] == TEXT and reply["subtask"]["text"] == f"first step of {TEXT}"
        assert reply["asked"] == {"prompt": f"{TEXT}. Subtask: first step of {TEXT}"}
        session = next(session for session in admin.get("/page/state").json()["sessions"] if session["key"] == key)
        assert (session["prompt"], session["instruction"], session["applied"]) == ("tidy", TEXT, TEXT)
        assert [entry["instruction"] for entry in admin.get("/sessions").json()["sessions"] if entry["key"] == key] == [TEXT]
        assert admin.delete(f"/page/sessions/{key}/instruction").json() == {"key": key, "instruction": None}
        assert admin.delete(f"/page/sessions/{key}/instruction").status_code == 200
        reply = robot.infer({"prompt": "tidy"})
        assert "instruction" not in reply and reply["asked"] == {"prompt": "tidy. Subtask: first step of tidy"}

    @pytest.mark.parametrize("mode", ["subtask_only", "action_only"])
    def test_in_every_mode_and_for_a_robot_without_a_prompt(
        self, admin: httpx.Client, robot: Client, request: pytest.FixtureRequest, mode: str
    ) -> None:
        robot.infer({"prompt": "tidy"})
        assert instruct(admin, key_of(admin, robot, request)).status_code == 200
        reply = robot.infer({"mode": mode})
        assert reply["instruction"] == TEXT
        assert reply["subtask"]["text"] == f"first step of {TEXT}" if mode == "subtask_only" else reply["asked"] == {"prompt": TEXT}

    def test_on_the_planners_endpoint_too(self, admin: httpx.Client, service: RunningService, robot: Client, request: pytest.FixtureRequest) -> None:
        robot.infer({"prompt": "tidy"})
        instruct(admin, key_of(admin, robot, request))
        with Client(service.addresses["planner"], session_id=request.node.name[:200]) as same:
            reply = same.infer({"prompt": "tidy"})
        assert reply["instruction"] == TEXT and reply["subtask"]["text"] == f"first step of {TEXT}"

    @pytest.mark.parametrize("how", ["reset()", "reset: true"])
    def test_a_new_episode_follows_the_robots_own_prompt(self, admin: httpx.Client, robot: Client, request: pytest.FixtureRequest, how: str) -> None:
        robot.infer({"prompt": "tidy"})
        instruct(admin, key_of(admin, robot, request))
        assert robot.infer({"prompt": "tidy"})["instruction"] == TEXT
        if how == "reset()":
            robot.reset()
        reply = robot.infer({"prompt": "tidy", "reset": how == "reset: true"})
        assert "instruction" not in reply and reply["asked"] == {"prompt": "tidy. Subtask: first step of tidy"}

    def test_for_a_connection_without_a_session_id_and_no_other(
        self, admin: httpx.Client, service: RunningService, request: pytest.FixtureRequest
    ) -> None:
        with Client(service.addresses["action"]) as anonymous, Client(service.addresses["action"]) as other:
            anonymous.infer({"prompt": "tidy"})
            instruct(admin, key_of(admin, None, request))
            assert anonymous.infer({"prompt": "tidy"})["instruction"] == TEXT
            assert "instruction" not in other.infer({"prompt": "tidy"})

    def test_rows_of_a_batch_each_have_their_sessions_own(self, admin: httpx.Client, service: RunningService, request: pytest.FixtureRequest) -> None:
        rows = [{"prompt": "tidy", "session_id": request.node.name}, {"prompt": "sort", "session_id": "another"}, {"prompt": "wipe"}]
        with connect(service.addresses["action"]) as fleet:
            fleet.recv()

            def infer() -> dict[str, Any]:
                fleet.send(msgpack_numpy.pack({"batch": rows}))
                return msgpack_numpy.unpack(fleet.recv())

            assert "instruction" not in infer()
            sessions = admin.get("/page/state").json()["sessions"]
            instruct(admin, next(session["key"] for session in sessions if session["id"] == request.node.name))
            reply = infer()
        assert list(reply["instruction"]) == [TEXT, None, None]
        assert [asked["prompt"].partition(".")[0] for asked in reply["asked"]] == [TEXT, "sort", "wipe"]

    @pytest.mark.parametrize(
        ("body", "status", "told"),
        [
            ({"text": " \n"}, 422, "text: is blank; write what the robot is to do, or DELETE the instruction"),
            ({"text": "x" * (MAX_TASK_CHARS + 1)}, 422, f"text: has {MAX_TASK_CHARS + 1} characters, expected at most {MAX_TASK_CHARS}; shorten it"),
            ({"text": "a\ud800"}, 422, "text: has half a character (a lone surrogate) at character 2; remove it"),
            ({"text": 3}, 422, "text: expected "),
            ({}, 422, "text: missing; send it in the body"),
            ({"text": "a", "for": "b"}, 422, "for: unknown field"),
        ],
    )
    def test_what_is_no_instruction(
        self, admin: httpx.Client, robot: Client, request: pytest.FixtureRequest, body: dict[str, Any], status: int, told: str
    ) -> None:
        robot.infer({"prompt": "tidy"})
        answer = admin.put(
            f"/page/sessions/{key_of(admin, robot, request)}/instruction", content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == status and answer.json()["detail"].startswith(told)
        assert "instruction" not in robot.infer({"prompt": "tidy"})

    def test_for_nobody(self, admin: httpx.Client) -> None:
        for answer in (instruct(admin, 123456), admin.delete("/page/sessions/123456/instruction")):
            assert answer.status_code == 404 and answer.json()["detail"] == "session 123456: is not remembered, or no longer; choose one that is"


class TestPlan:
    def ask(self, admin: httpx.Client, body: bytes | None = None, *, content_type: str = "image/png", **query: str) -> httpx.Response:
        headers = {"Content-Type": content_type} if content_type else {}
        return admin.post("/page/plan", params={"task": "tidy", **query}, content=png() if body is None else body, headers=headers)

    def test_a_picture_and_a_task(self, admin: httpx.Client, planner: Planner) -> None:
        sessions = len(admin.get("/page/state").json()["sessions"])
        answer = self.ask(admin, camera="left_wrist_0_rgb").json()
        assert answer["text"] == "first step of tidy" and answer["planner_ms"] == 1.0 and (answer["width"], answer["height"]) == (20, 10)
        assert planner.observation["left_wrist_0_rgb"].shape == (10, 20, 3) and planner.observation["left_wrist_0_rgb"][0, 0].tolist() == [255, 0, 0]
        assert len(admin.get("/page/state").json()["sessions"]) == sessions  # it is no robot

    def test_under_the_settings_in_force(self, admin: httpx.Client, monkeypatch: pytest.MonkeyPatch, planner: Planner) -> None:
        formats: list[Any] = []
        infer = planner.infer
        monkeypatch.setattr(planner, "infer", lambda obs, **settings: [formats.append(settings), infer(obs, **settings)][1])
        try:
            admin.patch("/config", json={"generation_prompt_format": "What next for {task}?", "max_generation_tokens": 7})
            self.ask(admin)
        finally:
            admin.post("/config/rollback/1")
        assert formats == [{"generation_prompt_format": "What next for {task}?", "max_generation_tokens": 7}]

    @pytest.mark.parametrize(
        ("body", "content_type", "query", "status", "told"),
        [
            (b"", "image/png", {}, 422, "body: is empty; send a JPEG or PNG file"),
            (b"\x89PNG\r\n\x1a\n", "image/png", {}, 422, "image: cannot be read as JPEG or PNG ("),
            (bytes(MAX_UPLOAD_BYTES + 1), "image/png", {}, 413, "body: has more than 16 MiB; send a smaller picture"),
            (None, "image/gif", {}, 415, 'body: send a picture as image/jpeg or image/png, got "image/gif"'),
            (None, "", {}, 415, "body: send a picture as image/jpeg or image/png, got none"),
            (None, "image/png", {"task": "  "}, 422, "task: is blank"),
            (None, "image/png", {"task": ""}, 422, "task: "),
            (None, "image/png", {"task": "x" * (MAX_TASK_CHARS + 1)}, 422, "task: "),
            (None, "image/png", {"camera": "eye"}, 422, 'camera: got "eye", expected one of base_0_rgb, '),
        ],
    )
    def test_what_is_refused(self, admin: httpx.Client, body: bytes | None, content_type: str, query: dict[str, str], status: int, told: str) -> None:
        answer = self.ask(admin, body, content_type=content_type, **query)
        assert (answer.status_code, answer.json()["detail"][: len(told)]) == (status, told)

    def test_a_planner_that_fails_or_is_busy(self, admin: httpx.Client, planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(planner, "error", OverloadedError("the planner is overloaded"))
        assert (self.ask(admin).status_code, self.ask(admin).json()["detail"]) == (503, "the planner is overloaded")
        monkeypatch.setattr(planner, "error", KeyError("secret"))
        answer = self.ask(admin)
        assert answer.status_code == 500 and answer.json()["detail"].startswith("internal error ") and "secret" not in answer.text

    def test_without_a_planner_there_is_nobody_to_ask(self) -> None:
        config = service_config("action", admin=AdminConfig(port=0, page=True))
        with start(config, stubs()) as service, httpx.Client(base_url=service.http("admin")) as admin:
            answer = self.ask(admin)
            assert (answer.status_code, answer.json()["detail"]) == (404, "no planner is configured; there is nothing to try out")
            assert admin.get("/page/state").json()["settings"] is None


def test_under_async_the_new_instruction_has_a_subtask_of_its_own() -> None:
    config = service_config(
        admin=AdminConfig(port=0, page=True),
        planner=PlannerConfig(checkpoint_dir="unused", refresh="async", interval_s=600.0, max_age_s=None),
    )
    with start(config, stubs()) as service, httpx.Client(base_url=service.http("admin")) as admin, Client(service.addresses["action"]) as robot:
        assert [robot.infer({"prompt": "tidy"})["subtask"]["waited"] for _ in range(2)] == [True, False]
        instruct(admin, admin.get("/page/state").json()["sessions"][0]["key"])
        reply = robot.infer({"prompt": "tidy"})
        assert reply["instruction"] == TEXT and reply["subtask"]["text"] == f"first step of {TEXT}" and reply["subtask"]["waited"]


def test_an_action_policy_alone_follows_it_too() -> None:
    policy = EchoPolicy()
    policy.default_prompt = "the default"
    with (
        start(service_config("action", admin=AdminConfig(port=0, page=True)), stubs(policy)) as service,
        httpx.Client(base_url=service.http("admin")) as admin,
        Client(service.addresses["action"]) as robot,
    ):
        robot.infer({})
        instruct(admin, admin.get("/page/state").json()["sessions"][0]["key"])
        reply = robot.infer({})
        assert reply["asked"] == {"prompt": TEXT} and reply["instruction"] == TEXT
