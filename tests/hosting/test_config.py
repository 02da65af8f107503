from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hosting.config import (
    ActionConfig,
    ActionTransportConfig,
    PlannerConfig,
    ServiceConfig,
    describe,
    load_config,
    pytorch_compile_mode,
)
from hosting.config_sources import variables
from pi0.errors import ConfigError

ROOT = Path(__file__).parents[2]
ACTION: dict[str, Any] = {"model_config_name": "pi05_droid", "checkpoint_dir": "/ckpt/droid"}
PLANNER: dict[str, Any] = {"checkpoint_dir": "/ckpt/subtask"}
SCHEDULER: dict[str, Any] = {"max_batch": 8, "max_wait_ms": 2.0, "max_queue": 64, "deadline_ms": None}
MIB = 1024 * 1024
LONGEST_SOCKET_PATH = 103 if sys.platform == "darwin" else 107

Write = Callable[[Any], Path]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(directory: Path) -> Write:
    """Writes a document, or text as it is, to ``robot.json`` in the working directory."""

    def write_document(document: Any) -> Path:
        path = Path("robot.json")
        path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
        return path

    return write_document


def problems(path: Path | None = None, environ: dict[str, str] | None = None, overrides: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides, environ or {})
    return str(error.value).splitlines()


class TestValues:
    def test_defaults_are_the_references(self, write: Write) -> None:
        config = load_config(write({"action": ACTION, "planner": PLANNER}), environ={}).config
        assert config.model_dump() == {
            "action": {
                **ACTION,
                "default_prompt": None,
                "tokenizer": None,
                "dtype": None,
                "device": None,
                "num_steps": 10,
                "on_long_prompt": "error",
                "scheduler": SCHEDULER,
            },
            "planner": {
                **PLANNER,
                "max_generation_tokens": 20,
                "generation_prompt_format": "Task: {task}. Subtask: ",
                "action_prompt_template": "{task}. Subtask: {subtask}",
                "tokenizer": None,
                "dtype": None,
                "allowed_tokens": "text",
                "missing_cameras": "mask",
                "on_failure": "use_task",
                "on_long_prompt": "error",
                "refresh": "every_request",
                "interval_s": 1.0,
                "max_age_s": 10.0,
                "on_task_change": "wait",
                "min_confidence": None,
                "decode": "free",
                "subtasks": None,
                "cameras": None,
                "compilation_cache": None,
                "drafts": 2,
                "timeout_s": None,
                "done_subtasks": (),
                "scheduler": {**SCHEDULER, "max_batch": 2},
            },
            "action_transport": {"websocket_port": 8000, "quic_port": 5555, "unix_socket_path": "/tmp/openpi-action.sock"},
            "planner_transport": {"websocket_port": 8002, "quic_port": 5556, "unix_socket_path": "/tmp/openpi-planner.sock"},
            "host": "127.0.0.1",
            "api_key": None,
            "tls": None,
            "quic_certificate_dir": None,
            "unix_socket_mode": "0600",
            "websocket": {
                "ping_interval_s": 20.0,
                "ping_timeout_s": 20.0,
                "idle_timeout_s": None,
                "congestion_control": "bbr",
                "profile": "openpi",
                "reply": None,
            },
            "roboarena": dict.fromkeys(
                ("image_resolution", "needs_wrist_camera", "n_external_cameras", "needs_stereo_camera", "needs_session_id", "action_space")
            ),
            "admin": {"host": "127.0.0.1", "port": 8001, "api_key": None, "settings_file": None, "page": False},
            "sessions": {"ttl_s": 600.0, "max_sessions": 1024},
            "watchdog": {"stuck_after_s": 120.0, "fatal_after_s": 600.0},
            "max_message_bytes": 128 * MIB,
            "drain_s": 30.0,
            "log_format": "plain",
            "log_requests": True,
        }

    @pytest.mark.parametrize(
        ("slots", "mode"),
        [
            ({"action": ACTION}, "action_only"),
            ({"planner": PLANNER}, "planner_only"),
            ({"action": ACTION, "planner": PLANNER}, "combined"),
            ({"action": ACTION, "planner": None}, "action_only"),
        ],
    )
    def test_mode_is_derived(self, write: Write, slots: dict[str, Any], mode: str) -> None:
        config = load_config(write(slots), environ={}).config
        assert config.mode == mode
        assert config.slots == tuple(name for name, slot in slots.items() if slot)

    def test_what_is_set_is_frozen(self, write: Write) -> None:
        config = load_config(write({"action": ACTION}), environ={}).config
        with pytest.raises(ValidationError):
            config.host = "0.0.0.0"

    def test_built_in_python_it_reads_nothing_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENPI_HOST", "10.0.0.1")
        monkeypatch.setenv("HOST", "10.0.0.2")
        assert ServiceConfig(action=ActionConfig(**ACTION)).host == "127.0.0.1"

    @pytest.mark.parametrize(
        "document",
        [
            # the same port for TCP and UDP, or on an endpoint that is not served, is no clash
            {"action": ACTION, "action_transport": {"websocket_port": 8001}, "admin": {"port": None}},
            {"action": ACTION, "admin": {"host": "0.0.0.0", "api_key": "k"}},
            {"action": ACTION, "admin": {"host": "0.0.0.0", "port": None}},
            {"action": ACTION, "admin": {"host": "::1"}, "watchdog": {"stuck_after_s": 5, "fatal_after_s": 5}},
            {"action": ACTION, "action_transport": {"websocket_port": 8002, "quic_port": 5556}},
            {"action": ACTION, "planner": PLANNER, "action_transport": {"websocket_port": 5555}},
            # 0 is any free port
            {
                "action": ACTION,
                "planner": PLANNER,
                "action_transport": {"websocket_port": 0, "quic_port": 0},
                "planner_transport": {"websocket_port": 0, "quic_port": 0},
                "admin": {"port": 0},
            },
            {"planner": {**PLANNER, "action_prompt_template": "{subtask}", "generation_prompt_format": "{{json}} {task}"}},
            {"action": {**ACTION, "num_steps": 1000, "dtype": "bfloat16"}, "drain_s": 0, "max_message_bytes": MIB},
        ],
    )
    def test_accepted(self, write: Write, document: dict[str, Any]) -> None:
        load_config(write(document), environ={})

    @pytest.mark.parametrize(("name", "mode"), [("config.example.json", "action_only"), ("config.example.planner.json", "combined")])
    def test_examples_load(self, name: str, mode: str) -> None:
        assert load_config(ROOT / name, environ={}).config.mode == mode


class TestWhichFile:
    def test_given_beats_variable_beats_working_directory(self, directory: Path) -> None:
        for name in ("given.json", "variable.json", "config.json"):
            (directory / name).write_text(json.dumps({"action": ACTION, "host": name}))
        environ = {"INFERENCE_CONFIG_PATH": "variable.json"}
        assert load_config(Path("given.json"), environ=environ).config.host == "given.json"
        assert load_config(environ=environ).config.host == "variable.json"
        loaded = load_config(environ={"INFERENCE_CONFIG_PATH": ""})
        assert (loaded.config.host, loaded.path) == ("config.json", Path("config.json"))

    def test_no_file_is_fine_when_the_environment_sets_a_slot(self) -> None:
        loaded = load_config(environ={"OPENPI_PLANNER__CHECKPOINT_DIR": "/ckpt"})
        assert (loaded.config.mode, loaded.path) == ("planner_only", None)

    def test_nothing_at_all_says_where_it_looked(self) -> None:
        assert problems() == [
            "no configuration: there is no config.json in the working directory, INFERENCE_CONFIG_PATH is not set and no OPENPI_ variable "
            "sets a slot; copy config.example.json to config.json, or give a file with --config"
        ]

    def test_missing_files(self) -> None:
        assert problems(Path("robot.json")) == ["robot.json: no such file (given by --config); correct the path"]
        assert problems(environ={"INFERENCE_CONFIG_PATH": "r.json"}) == ["r.json: no such file (given by INFERENCE_CONFIG_PATH); correct the path"]

    def test_a_directory(self, directory: Path) -> None:
        assert problems(directory) == [f"{directory}: cannot be read: Is a directory (given by --config)"]

    def test_not_utf8(self, directory: Path) -> None:
        (directory / "robot.json").write_bytes(b'{"host": "\xff"}')
        assert problems(Path("robot.json")) == ["robot.json: not UTF-8 text (byte 10); save it as UTF-8"]

    def test_a_byte_order_mark_is_fine(self, directory: Path) -> None:
        (directory / "robot.json").write_text(json.dumps({"action": ACTION}), encoding="utf-8-sig")
        assert load_config(Path("robot.json"), environ={}).config.mode == "action_only"


class TestMalformedFile:
    """Every mistake is one readable line that names the field, what came, what was expected, or the fix."""

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "robot.json: not valid JSON at line 1, column 1: Expecting value"),
            ('{\n  "action": }', "robot.json: not valid JSON at line 2, column 13: Expecting value"),
            ("[]", "robot.json: expected one JSON object, got []; see config.example.json"),
            ("null", "robot.json: expected one JSON object, got null; see config.example.json"),
            ('{"host": "a", "host": "b"}', "robot.json: host: given twice in one object; keep one"),
            ('{"drain_s": NaN}', "robot.json: NaN is not a JSON number; write a finite one"),
            ("[" * 100_000, "robot.json: nested too deeply"),
        ],
    )
    def test_not_a_json_object(self, write: Write, text: str, problem: str) -> None:
        assert problems(write(text)) == [problem]

    @pytest.mark.parametrize(
        ("document", "problem"),
        [
            ({}, 'no slot is configured; set "action", "planner" or both (see config.example.json)'),
            ({"action": None}, 'no slot is configured; set "action", "planner" or both (see config.example.json)'),
            (
                {"action": {"checkpoint_dir": "a"}},
                "action.model_config_name: missing; set it in the configuration file or as OPENPI_ACTION__MODEL_CONFIG_NAME",
            ),
            ({"planner": {}}, "planner.checkpoint_dir: missing; set it in the configuration file or as OPENPI_PLANNER__CHECKPOINT_DIR"),
            (
                {"planner": {**PLANNER, "done_subtasks": "all done"}},
                'planner.done_subtasks: expected a list of strings (["…", "…"]), got "all done" (file robot.json)',
            ),
            ({"planner": {**PLANNER, "done_subtasks": ["a", 3]}}, "planner.done_subtasks[1]: expected a string, got 3 (file robot.json)"),
            (
                {"planner": {**PLANNER, "done_subtasks": ["a", " ."]}},
                "planner.done_subtasks: [1] is blank (' .'); write what the planner says when nothing is left to do, or leave it out "
                "(file robot.json)",
            ),
            (
                {"planner": {**PLANNER, "done_subtasks": ["All done.", "all done"]}},
                "planner.done_subtasks: 'All done.' and 'all done' are the same, as case, outer spaces and a final full stop do not count; "
                "keep one of them (file robot.json)",
            ),
            (
                {"planner": {**PLANNER, "done_subtasks": ["a\0b"]}},
                'planner.done_subtasks: "a\\u0000b" has a NUL character; remove it (file robot.json)',
            ),
            ({"action": ACTION, "planer": PLANNER}, 'planer: unknown field (file robot.json); did you mean "planner"?'),
            (
                {"action": ACTION, "port": 8000},
                "port: unknown field (file robot.json); known here: action, planner, action_transport, planner_transport, host, api_key, tls, "
                "quic_certificate_dir, unix_socket_mode, websocket, roboarena, admin, sessions, watchdog, max_message_bytes, drain_s, "
                "log_format, log_requests",
            ),
            (
                {"action": {**ACTION, "checkpoint": "a"}},
                'action.checkpoint: unknown field (file robot.json); did you mean "checkpoint_dir"?',
            ),
            (
                {"action": ACTION, "admin": {"api": 1}},
                'admin.api: unknown field (file robot.json); did you mean "api_key"?',
            ),
            # names that pydantic-settings would take for itself
            (
                {"action": ACTION, "_env_file": "a"},
                "_env_file: unknown field (file robot.json); known here: action, planner, action_transport, planner_transport, host, api_key, tls, "
                "quic_certificate_dir, unix_socket_mode, websocket, roboarena, admin, sessions, watchdog, max_message_bytes, drain_s, "
                "log_format, log_requests",
            ),
            (
                {"action": "pi05_droid"},
                "action: expected an object with the fields model_config_name, checkpoint_dir, default_prompt, tokenizer, dtype, device, num_steps, "
                'on_long_prompt, scheduler or null, got "pi05_droid" (file robot.json)',
            ),
            ({"action": {**ACTION, "checkpoint_dir": 5}}, "action.checkpoint_dir: expected a string, got 5 (file robot.json)"),
            (
                {"action": {**ACTION, "default_prompt": ["a"]}},
                'action.default_prompt: expected a string or null, got ["a"] (file robot.json)',
            ),
            (
                {"action": {**ACTION, "default_prompt": " "}},
                "action.default_prompt: is blank; give a value or leave the field out (file robot.json)",
            ),
            (
                {"action": {**ACTION, "dtype": "float16"}},
                'action.dtype: expected one of "float32", "bfloat16" or null, got "float16" (file robot.json)',
            ),
            ({"action": {**ACTION, "num_steps": 0}}, "action.num_steps: expected an integer 1…1000, got 0 (file robot.json)"),
            ({"action": {**ACTION, "num_steps": True}}, "action.num_steps: expected an integer 1…1000, got true (file robot.json)"),
            ({"action": {**ACTION, "num_steps": "10"}}, 'action.num_steps: expected an integer 1…1000, got "10" (file robot.json)'),
            (
                {"action": {**ACTION, "on_long_prompt": "cut"}},
                'action.on_long_prompt: expected one of "error", "truncate", got "cut" (file robot.json)',
            ),
            (
                {"planner": {**PLANNER, "max_generation_tokens": 257}},
                "planner.max_generation_tokens: expected an integer 1…256, got 257 (file robot.json)",
            ),
            (
                {"planner": {**PLANNER, "generation_prompt_format": "Task: "}},
                "planner.generation_prompt_format: has no {task}; put it where that text belongs (file robot.json)",
            ),
            (
                {"planner": {**PLANNER, "generation_prompt_format": "{task} {robot}"}},
                "planner.generation_prompt_format: has an unknown placeholder '{robot}' at character 8; use {task}, and {{ or }} for a literal brace "
                "(file robot.json)",
            ),
            (
                {"planner": {**PLANNER, "action_prompt_template": "{task}"}},
                "planner.action_prompt_template: has no {subtask}; put it where that text belongs (file robot.json)",
            ),
            (
                {"planner": {**PLANNER, "action_prompt_template": "{subtask!r}"}},
                "planner.action_prompt_template: has an unknown placeholder '{subtask!r}' at character 1; use {task} and {subtask}, and {{ or }} for "
                "a literal brace (file robot.json)",
            ),
            (
                {"planner": {**PLANNER, "allowed_tokens": "all"}},
                'planner.allowed_tokens: expected one of "text", "printable_ascii", got "all" (file robot.json)',
            ),
            (
                {"planner": {**PLANNER, "missing_cameras": "gray"}},
                'planner.missing_cameras: expected one of "mask", "grey", got "gray" (file robot.json)',
            ),
            (
                {"planner": {**PLANNER, "on_failure": None}},
                'planner.on_failure: expected one of "use_task", "fail", got null (file robot.json)',
            ),
            (
                {"action": ACTION, "action_transport": {"websocket_port": 65536}},
                "action_transport.websocket_port: expected an integer 0…65535, got 65536 (file robot.json)",
            ),
            (
                {"action": ACTION, "action_transport": {"unix_socket_path": "/" + "x" * 300}},
                f"action_transport.unix_socket_path: is longer than the {LONGEST_SOCKET_PATH} bytes that a Unix socket's path may have; "
                "choose a shorter one (file robot.json)",
            ),
            (
                {"action": ACTION, "action_transport": {"unix_socket_path": "/tmp/\ud800"}},
                'action_transport.unix_socket_path: "/tmp/\\ud800" is not valid Unicode; remove the bytes or escapes that do not belong there '
                "(file robot.json)",
            ),
            (
                {"action": ACTION, "admin": {"settings_file": "a\0b"}},
                'admin.settings_file: "a\\u0000b" has a NUL character; remove it (file robot.json)',
            ),
            (
                {"action": ACTION, "action_transport": None},
                "action_transport: expected an object with the fields websocket_port, quic_port, unix_socket_path, got null (file robot.json)",
            ),
            ({"action": ACTION, "api_key": 12345}, "api_key: expected a string or null, got a int, which is secret and not shown (file robot.json)"),
            ({"action": ACTION, "api_key": ""}, "api_key: is blank; give a value or leave the field out (file robot.json)"),
            *(
                (
                    {"action": ACTION, "api_key": key},
                    "api_key: has something that an HTTP header cannot carry; take printable ASCII characters, no space or line break at either end "
                    "(file robot.json)",
                )
                for key in ("sesame\n", " sesame", "sésame", "sesame\ud800", "ses\tame")
            ),
            (
                {"action": ACTION, "websocket": {"profile": "roboarena"}},
                'roboarena.action_space: missing, and with websocket.profile "roboarena" no client could be served; '
                "set it to one of joint_position, joint_velocity, cartesian_position, cartesian_velocity",
            ),
            ({"action": ACTION, "host": ""}, "host: is blank; give a value or leave the field out (file robot.json)"),
            (
                {"action": ACTION, "max_message_bytes": 1000},
                "max_message_bytes: expected an integer 1048576…4294967295, got 1000 (file robot.json)",
            ),
            ({"action": ACTION, "drain_s": -1}, "drain_s: expected a number of at least 0, got -1 (file robot.json)"),
            ({"action": ACTION, "drain_s": "30"}, 'drain_s: expected a number of at least 0, got "30" (file robot.json)'),
            (
                {"action": ACTION, "admin": {"host": "0.0.0.0"}},
                "admin.api_key: missing, and admin.host 0.0.0.0 can be reached from other machines, where anybody could edit prompts; "
                "set a key, or leave admin.host at 127.0.0.1",
            ),
            (
                {"action": ACTION, "watchdog": {"stuck_after_s": None, "fatal_after_s": 5}},
                "watchdog.fatal_after_s: got 5, expected null or at least watchdog.stuck_after_s, which is null",
            ),
            ({"action": ACTION, "log_format": "xml"}, 'log_format: expected one of "plain", "json", got "xml" (file robot.json)'),
            (
                {"action": ACTION, "planner": PLANNER, "planner_transport": {"websocket_port": 8000}},
                "planner_transport.websocket_port: 8000 is also action_transport.websocket_port; give one of them another port",
            ),
            (
                {"action": ACTION, "admin": {"port": None, "page": True}},
                "admin.page: true, but admin.port is null, so there is no port for it; set one, or leave the page out",
            ),
            (
                {"planner": PLANNER, "admin": {"port": 8002}},
                "admin.port: 8002 is also planner_transport.websocket_port; give one of them another port",
            ),
            (
                {"action": ACTION, "planner": PLANNER, "action_transport": {"quic_port": 5556}},
                "planner_transport.quic_port: 5556 is also action_transport.quic_port; give one of them another port",
            ),
            (
                {"action": ACTION, "planner": PLANNER, "action_transport": {"unix_socket_path": "/tmp/./openpi-planner.sock"}},
                "planner_transport.unix_socket_path: /tmp/openpi-planner.sock is also action_transport.unix_socket_path; "
                "give one of them another path",
            ),
        ],
    )
    def test_wrong_value(self, write: Write, document: Any, problem: str) -> None:
        assert problems(write(document)) == [problem]

    def test_every_problem_has_its_line(self, write: Write) -> None:
        document = {"action": {"num_steps": 0}, "planner": {**PLANNER, "dtype": "f"}, "hots": "a", "admin": {"port": -1}}
        assert problems(write(document), {"OPENPI_PLANNER__MISSING_CAMERA": "mask", "OPENPI_DRAIN_S": "soon"}) == [
            'OPENPI_PLANNER__MISSING_CAMERA: names no configuration field, correct or unset it; did you mean "missing_cameras"?',
            "action.model_config_name: missing; set it in the configuration file or as OPENPI_ACTION__MODEL_CONFIG_NAME",
            "action.checkpoint_dir: missing; set it in the configuration file or as OPENPI_ACTION__CHECKPOINT_DIR",
            "action.num_steps: expected an integer 1…1000, got 0 (file robot.json)",
            'planner.dtype: expected one of "float32", "bfloat16" or null, got "f" (file robot.json)',
            "admin.port: expected an integer 0…65535 or null, got -1 (file robot.json)",
            'drain_s: expected a number of at least 0, got "soon" (environment OPENPI_DRAIN_S)',
            'hots: unknown field (file robot.json); did you mean "host"?',
        ]

    def test_a_long_value_is_cut_and_a_message_always_prints(self, write: Write) -> None:
        (line,) = problems(write({"action": ACTION, "admin": {"port": "x" * 500}}))
        assert line == f'admin.port: expected an integer 0…65535 or null, got "{"x" * 58}… (file robot.json)'
        (line,) = problems(write({"action": {**ACTION, "token\ud800izer": 1}}))
        assert line == 'action.token\\ud800izer: unknown field (file robot.json); did you mean "tokenizer"?'


class TestEnvironment:
    def test_nested_names_types_and_case(self) -> None:
        config = load_config(
            environ={
                "OPENPI_ACTION__MODEL_CONFIG_NAME": "pi0_aloha_sim",
                "OPENPI_ACTION__CHECKPOINT_DIR": "/ckpt",
                "OPENPI_ACTION__DEFAULT_PROMPT": "123",  # a string field keeps text that looks like JSON
                "OPENPI_ACTION__NUM_STEPS": "5",
                "openpi_action_transport__Websocket_Port": "9000",
                "OPENPI_ADMIN__PORT": " 9001 ",
                "OPENPI_DRAIN_S": "2.5",
                "OPENPI_LOG_FORMAT": "json",
                "OPENPI_HOST": "0.0.0.0",
            }
        ).config
        assert config.action == ActionConfig(model_config_name="pi0_aloha_sim", checkpoint_dir="/ckpt", default_prompt="123", num_steps=5)
        assert config.action_transport == ActionTransportConfig(websocket_port=9000)
        assert (config.admin.port, config.drain_s, config.log_format, config.host) == (9001, 2.5, "json", "0.0.0.0")

    def test_a_section_as_json_and_a_field_of_it_on_top(self) -> None:
        loaded = load_config(environ={"OPENPI_PLANNER__DTYPE": "float32", "OPENPI_PLANNER": '{"checkpoint_dir": "/a", "dtype": "bfloat16"}'})
        assert loaded.config.planner == PlannerConfig(checkpoint_dir="/a", dtype="float32")
        assert loaded.origins["planner.checkpoint_dir"] == "environment OPENPI_PLANNER"
        assert loaded.origins["planner.dtype"] == "environment OPENPI_PLANNER__DTYPE"

    def test_a_list_is_json(self, write: Write) -> None:
        environ = {"OPENPI_PLANNER__DONE_SUBTASKS": '["all done", "nothing left"]'}
        loaded = load_config(write({"planner": {**PLANNER, "done_subtasks": ["c"]}}), environ=environ)
        assert loaded.config.planner == PlannerConfig(**PLANNER, done_subtasks=("all done", "nothing left"))
        assert ("planner.done_subtasks", ("all done", "nothing left"), "environment OPENPI_PLANNER__DONE_SUBTASKS") in describe(loaded)

    def test_null_unsets(self, write: Write) -> None:
        file = write({"action": {**ACTION, "default_prompt": "a"}, "planner": PLANNER})
        loaded = load_config(file, environ={"OPENPI_PLANNER": "null", "OPENPI_ACTION__DEFAULT_PROMPT": "null"})
        assert loaded.config.mode == "action_only"
        assert loaded.config.action == ActionConfig(**ACTION)
        assert loaded.origins["planner"] == "environment OPENPI_PLANNER"

    @pytest.mark.parametrize(
        ("environ", "problem"),
        [
            (
                {"OPENPI_ACTION__CHECKPIONT_DIR": "a"},
                'OPENPI_ACTION__CHECKPIONT_DIR: names no configuration field, correct or unset it; did you mean "checkpoint_dir"?',
            ),
            (
                {"OPENPI_PLANER__DTYPE": "a"},
                "OPENPI_PLANER__DTYPE: names no configuration field, correct or unset it; did you mean OPENPI_PLANNER__DTYPE?",
            ),
            (
                {"OPENPI_ACTION_DEFAULT_PROMPT": "a"},
                "OPENPI_ACTION_DEFAULT_PROMPT: names no configuration field, correct or unset it; did you mean OPENPI_ACTION__DEFAULT_PROMPT?",
            ),
            ({"OPENPI_HOST__X": "a"}, "OPENPI_HOST__X: names no configuration field, correct or unset it; did you mean OPENPI_HOST?"),
            (
                {"OPENPI_ADMIN": "8001"},
                'OPENPI_ADMIN: expected an object with the fields host, port, api_key, settings_file, page as JSON, got "8001"',
            ),
            (
                {"OPENPI_ADMIN": '{"port": }'},
                'OPENPI_ADMIN: expected an object with the fields host, port, api_key, settings_file, page as JSON, got "{\\"port\\": }"',
            ),
            ({"OPENPI_ADMIN": '{"port": 1, "port": 2}'}, "OPENPI_ADMIN: port: given twice in one object; keep one"),
            ({"OPENPI_DRAIN_S": "inf"}, 'drain_s: expected a number of at least 0, got "inf" (environment OPENPI_DRAIN_S)'),
            ({"OPENPI_DRAIN_S": "NaN"}, "OPENPI_DRAIN_S: NaN is not a JSON number; write a finite one"),
            ({"OPENPI_ADMIN__PORT": ""}, 'admin.port: expected an integer 0…65535 or null, got "" (environment OPENPI_ADMIN__PORT)'),
            ({"OPENPI_DRAIN_S": "null"}, "drain_s: expected a number of at least 0, got null (environment OPENPI_DRAIN_S)"),
            ({"OPENPI_HOST": ""}, "host: is blank; give a value or leave the field out (environment OPENPI_HOST)"),
            (
                {"OPENPI_PLANNER__CHECKPOINT_DIR": "/a", "OPENPI_PLANNER__DONE_SUBTASKS": "all done"},
                'planner.done_subtasks: expected a list of strings (["…", "…"]), got "all done" (environment OPENPI_PLANNER__DONE_SUBTASKS)',
            ),
            ({"OPENPI_HOST": "a", "openpi_host": "b"}, "openpi_host: is set twice, also as OPENPI_HOST; unset one of them"),
        ],
    )
    def test_mistakes(self, write: Write, environ: dict[str, str], problem: str) -> None:
        assert problems(write({"action": ACTION}), environ) == [problem]

    def test_names_that_platforms_set_only_warn(self, write: Write, caplog: pytest.LogCaptureFixture) -> None:
        """Kubernetes sets these for services called ``openpi`` and ``openpi-action``; they must not stop the server."""
        platform = ["OPENPI_ACTION_PORT", "OPENPI_ACTION_SERVICE_HOST", "OPENPI_HTTP_BASE_MODEL", "OPENPI_PORT", "OPENPI_SERVICE_PORT"]
        with caplog.at_level(logging.WARNING, "hosting.config_sources"):
            load_config(write({"action": ACTION}), environ=dict.fromkeys(platform, "tcp://10.0.0.1:80"))
        assert [message.split()[2] for message in caplog.messages] == platform

    def test_variables_that_are_no_fields_are_quiet(self, write: Write, caplog: pytest.LogCaptureFixture) -> None:
        names = ["OPENPI_DATA_HOME", "OPENPI_OPEN_LOOP_HORIZON", "OPENPI_FLASH_TRANSPORT_BINARY", "PATH"]
        load_config(write({"action": ACTION}), environ={**dict.fromkeys(names, "x"), "OPENPI_PYTORCH_COMPILE_MODE": "eager"})
        assert caplog.messages == []

    @pytest.mark.parametrize("text", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
    def test_compile_mode(self, text: str) -> None:
        assert pytorch_compile_mode({"OPENPI_PYTORCH_COMPILE_MODE": text}) == text

    def test_compile_mode_eager_unset_and_wrong(self) -> None:
        assert pytorch_compile_mode({"OPENPI_PYTORCH_COMPILE_MODE": "eager"}) is None
        assert pytorch_compile_mode({"OPENPI_PYTORCH_COMPILE_MODE": "none"}) is None
        assert pytorch_compile_mode({}) == pytorch_compile_mode({"OPENPI_PYTORCH_COMPILE_MODE": ""}) == "unset"
        with pytest.raises(ConfigError) as error:
            pytorch_compile_mode({"OPENPI_PYTORCH_COMPILE_MODE": "fast"})
        assert str(error.value) == (
            "OPENPI_PYTORCH_COMPILE_MODE: expected one of default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs, eager, none; got 'fast'"
        )


def test_a_wrong_compile_mode_is_found_with_the_configuration(write: Write) -> None:
    path = write({"planner": {"checkpoint_dir": "/ckpt"}})
    (line,) = problems(path, {"OPENPI_PYTORCH_COMPILE_MODE": "fast"})
    assert line.startswith("OPENPI_PYTORCH_COMPILE_MODE: expected one of default,")


class TestPrecedence:
    FIELDS = st.sampled_from(["host", "action.default_prompt", "action_transport.websocket_port"])
    SOURCES = st.sets(st.sampled_from(["flag", "environment", "file"]))

    @given(field=FIELDS, sources=SOURCES)
    def test_strongest_source_wins_and_is_named(self, tmp_path_factory: pytest.TempPathFactory, field: str, sources: set[str]) -> None:
        is_port = field.endswith("port")
        value: dict[str, Any] = {"flag": 1, "environment": 2, "file": 3} if is_port else {"flag": "a", "environment": "b", "file": "c"}
        default = 8000 if is_port else "127.0.0.1" if field == "host" else None
        section, _, name = field.rpartition(".")
        document: dict[str, Any] = {"action": dict(ACTION)}
        if "file" in sources:
            (document.setdefault(section, {}) if section else document)[name] = value["file"]
        path = tmp_path_factory.mktemp("precedence") / "robot.json"
        path.write_text(json.dumps(document))
        variable = "OPENPI_" + field.replace(".", "__").upper()
        overrides = {section: {name: value["flag"]}} if section else {name: value["flag"]}

        loaded = load_config(
            path,
            overrides if "flag" in sources else {},
            {variable: str(value["environment"])} if "environment" in sources else {},
        )

        winner = next((source for source in ("flag", "environment", "file") if source in sources), None)
        names = {"flag": "flag", "environment": f"environment {variable}", "file": f"file {path}", None: "default"}
        found = {row[0]: row[1:] for row in describe(loaded)}
        assert found[field] == (value[winner] if winner else default, names[winner])
        # and its neighbours are what they were
        assert found["action.checkpoint_dir"] == ("/ckpt/droid", f"file {path}")
        assert found["action_transport.quic_port"] == (5555, "default")

    def test_a_flag_removes_a_slot(self, write: Write) -> None:
        loaded = load_config(write({"action": ACTION, "planner": PLANNER}), {"planner": None}, {})
        assert loaded.config.mode == "action_only"
        assert loaded.origins["planner"] == "flag"

    def test_a_slot_left_null_in_the_file_is_set_elsewhere(self, write: Write) -> None:
        loaded = load_config(write({"action": ACTION, "planner": None}), {}, {"OPENPI_PLANNER__CHECKPOINT_DIR": "/ckpt"})
        assert loaded.config.mode == "combined"

    def test_an_empty_section_changes_nothing(self, write: Write) -> None:
        loaded = load_config(write({"action": ACTION}), {"action": {}, "admin": {}}, {})
        assert loaded.config.action == ActionConfig(**ACTION)


class TestDescribe:
    def test_every_field_in_order_with_its_origin(self, write: Write) -> None:
        rows = describe(load_config(write({"action": ACTION}), {"host": "::1"}, {"OPENPI_ADMIN__PORT": "9"}))
        assert rows[0] == ("action.model_config_name", "pi05_droid", "file robot.json")
        assert ("planner", None, "default") in rows
        assert ("host", "::1", "flag") in rows
        assert ("admin.port", 9, "environment OPENPI_ADMIN__PORT") in rows
        assert rows[-1] == ("log_requests", True, "default")

    def test_secrets_are_not_shown(self, write: Write) -> None:
        loaded = load_config(write({"action": ACTION, "api_key": "sesame"}))
        assert ("api_key", "***", "file robot.json") in describe(loaded)
        assert "sesame" not in repr(loaded.config) and loaded.config.api_key == "sesame"
        assert ("api_key", None, "default") in describe(load_config(write({"action": ACTION})))

    def test_the_documentation_names_every_variable(self) -> None:
        page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
        assert [name for name in variables(ServiceConfig) if f"`{name}`" not in page] == []
