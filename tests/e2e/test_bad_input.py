"""Bad input: malformed requests, configurations, checkpoints and archives, each with the one line that says what is wrong.

``expected`` is the whole message, or a pattern for all of it where a library's words are part of it.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

from action.policy import ActionPolicy
from hosting import cli
from hosting.config import ServiceConfig
from hosting.policy import CheckpointError, ConfigError
from hosting.protocol import msgpack_numpy
from hosting.service import load_action, load_planner
from pi0.archive import extract_tar
from planner import SubtaskGenerator
from tests.e2e import damaged_checkpoints as damage
from tests.e2e.malformed_requests import camera, good, nested, only, tagged, without
from tests.e2e.process import combined_config
from tests.golden_data import CHECKPOINTS, TOKENIZER
from tests.hub_stand_in import Repo, hub_stand_in
from tests.pi0.fetching import leftovers
from tests.pi0.test_archive import TarContent, file, files, special, write_tar
from tests.serving import RunningService, start

Expected = str | re.Pattern[str]


def check(message: str, expected: Expected) -> None:
    assert "\n" not in message and "Traceback" not in message
    if isinstance(expected, str):
        assert message == expected
    else:
        assert expected.fullmatch(message), message


def pack(value: Any) -> bytes:
    return msgpack_numpy.pack(value)


# --- Requests -------------------------------------------------------------------------------------------------------------------

NOT_MSGPACK = re.compile(r"the message is not msgpack as openpi clients send it \([A-Za-z]+(: .+)?\)")
MODES = "expected one of default, subtask_only, action_only"
NO_PROMPT = "prompt: missing, and there is no default; send the task as text, or set action.default_prompt on the server"
TEXT = "expected text (str, 0-d string array or UTF-8 bytes)"
TOO_LONG = "tokens (with everything the prompt format adds), but 200 fit; shorten it, or set on_long_prompt to truncate to have it cut"
STATE = "expected [14] numbers (left arm 6, left gripper, right arm 6, right gripper)"
IMAGE = "expected [height, width, 3] or [3, height, width]"
NO_CAMERA = (
    "no known camera among the images (found: {}); expected at least one of: base_0_rgb, left_wrist_0_rgb, right_wrist_0_rgb, cam_high, "
    "cam_left_wrist, cam_right_wrist, observation/exterior_image_1_left, observation/wrist_image_left, observation/image, "
    "observation/wrist_image, head_camera, left_wrist_camera, right_wrist_camera"
)
BYTES8 = b"\0" * 8
PIXELS = good()["images"]["cam_high"]
DTYPE = "; send arrays of numbers, booleans or text"

# (name, port, frame, expected)
REQUESTS: list[tuple[str, str, bytes | str, Expected]] = [
    ("text frame", "action", "{}", "the request came as a text frame, expected a binary frame with a msgpack map"),
    ("text frame to the planner", "planner", "hello", "the request came as a text frame, expected a binary frame with a msgpack map"),
    ("empty frame", "action", b"", NOT_MSGPACK),
    ("no msgpack", "action", b"\xc1", NOT_MSGPACK),
    ("cut short", "action", pack(good())[:-1], NOT_MSGPACK),
    ("bytes left over", "planner", pack(good()) + b"\0", NOT_MSGPACK),
    ("numbers as keys", "action", b"\x81\x01\x02", NOT_MSGPACK),
    ("text that is not UTF-8", "action", b"\x81\xa6prompt\xa1\xff", NOT_MSGPACK),
    ("nested too deeply", "action", nested(5000), NOT_MSGPACK),
    ("a map said to be huge", "planner", b"\xdf\xff\xff\xff\xff", NOT_MSGPACK),
    ("a session that is half a number", "action", pack(good(session_id=1.5)), "session_id: got 1.5, expected text or a whole number"),
    ("a session without a name", "planner", pack(good(session_id="")), "session_id: has 0 characters, expected 1 to 256"),
    ("several sessions", "action", pack(good(session_ids=["a", "b"])), "session_ids: goes with endpoint reset; an observation has one session_id"),
    ("a deadline in the past", "action", pack(good(deadline_ms=-1)), "deadline_ms: got -1, expected a number of milliseconds above 0"),
    ("a deadline in words", "planner", pack(good(deadline_ms="soon")), "deadline_ms: got 'soon', expected a number of milliseconds above 0"),
    ("replanning perhaps", "action", pack(good(replan="maybe")), "replan: got 'maybe', expected true or false"),
    ("a reset of yes", "planner", pack(good(reset=1)), "reset: got 1, expected true or false"),
    ("a seed below nothing", "action", pack(good(seed=-1)), "seed: got -1, expected a whole number from 0 to 2**63 - 1"),
    ("a list", "action", pack([1, 2]), "the request is a list, expected a map of observation keys to values"),
    ("nothing", "action", pack(None), "the request is a NoneType, expected a map of observation keys to values"),
    ("a bare array", "planner", pack(PIXELS), "the request is a ndarray, expected a map of observation keys to values"),
    ("an object array", "action", tagged(data=BYTES8, dtype="|O", shape=[1]), f"Unsupported dtype: object{DTYPE}"),
    ("a structured array", "action", tagged(data=BYTES8, dtype="f4,i4", shape=[1]), f"Unsupported dtype: [('f0', '<f4'), ('f1', '<i4')]{DTYPE}"),
    ("raw memory", "action", tagged(data=BYTES8, dtype="|V8", shape=[1]), f"Unsupported dtype: |V8{DTYPE}"),
    ("complex numbers", "planner", tagged(data=BYTES8, dtype="<c8", shape=[1]), f"Unsupported dtype: complex64{DTYPE}"),
    ("an unknown dtype", "action", tagged(data=BYTES8, dtype="float99", shape=[2]), "an array has dtype 'float99', which is none of NumPy's"),
    ("no dtype", "action", tagged(data=BYTES8, shape=[2]), "an array has dtype None, expected a string such as '<f4'"),
    (
        "too few data",
        "action",
        tagged(data=b"1234567", dtype="<f4", shape=[2]),
        "an array of shape [2] and dtype <f4 needs 8 bytes of data, got 7 bytes",
    ),
    ("no data", "planner", tagged(dtype="<f4", shape=[2]), "an array of shape [2] and dtype <f4 needs 8 bytes of data, got NoneType"),
    ("a negative size", "action", tagged(data=b"", dtype="<f4", shape=[-1]), "an array has shape [-1], expected a list of at most 32 sizes"),
    ("a shape that is none", "action", tagged(data=BYTES8, dtype="<f4", shape=2), "an array has shape 2, expected a list of at most 32 sizes"),
    (
        "a size beyond any memory",
        "action",
        tagged(data=b"", dtype="|u1", shape=[1 << 62]),
        "an array of shape [4611686018427387904] and dtype |u1 needs 4611686018427387904 bytes of data, got 0 bytes",
    ),
    (
        "elements without bytes",
        "action",
        tagged(data=b"", dtype="|S0", shape=[1 << 40]),
        "an array of shape [1099511627776] has dtype |S0, whose elements hold nothing; send texts of at least one character",
    ),
    (
        "a scalar that is a list",
        "action",
        tagged(tag=b"__npgeneric__", data=[1], dtype="<f4"),
        "a NumPy scalar of dtype float32 cannot be read (TypeError: its data is a list)",
    ),
    ("an unknown mode", "action", pack(good(mode="plan")), f"mode: got 'plan', {MODES}"),
    ("a mode in capitals", "planner", pack(good(mode="DEFAULT")), f"mode: got 'DEFAULT', {MODES}"),
    ("a number as mode", "action", pack(good(mode=1)), f"mode: got int, {MODES}"),
    ("an array as mode", "action", pack(good(mode=np.array("default"))), f"mode: got ndarray, {MODES}"),
    ("an endless mode", "action", pack(good(mode="x" * 9999)), f"mode: got '{'x' * 59}…', {MODES}"),
    (
        "actions of the planner",
        "planner",
        pack(good(mode="action_only")),
        "mode: action_only is not served on this endpoint, which has no action policy",
    ),
    ("no prompt", "action", pack(without("prompt")), NO_PROMPT),
    ("no prompt for the policy alone", "action", pack(only("action_only", without("prompt"))), NO_PROMPT),
    ("no prompt for the planner", "planner", pack(without("prompt")), "prompt: missing, and there is no default; send the task as text"),
    ("an empty map", "action", pack({}), NO_PROMPT),
    ("a null prompt", "action", pack(good(prompt=None)), f"prompt: got NoneType, {TEXT}"),
    ("a number as prompt", "planner", pack(good(prompt=5)), f"prompt: got int, {TEXT}"),
    ("a list as prompt", "planner", pack(good(prompt=["tidy"])), f"prompt: got list, {TEXT}"),
    ("several prompts", "action", pack(good(prompt=np.array(["a", "b"]))), f"prompt: got an array of shape [2] and dtype <U1, {TEXT}"),
    ("bytes that are no text", "action", pack(good(prompt=b"ab\xff")), "prompt: 3 bytes that are not UTF-8 (at byte 2), expected text"),
    ("a long prompt", "action", pack(good(prompt="cup " * 300)), f"prompt: has 307 {TOO_LONG}"),
    ("a long prompt for the planner", "planner", pack(good(prompt="cup " * 300)), f"prompt: has 307 {TOO_LONG}"),
    ("a long prompt for the policy alone", "action", pack(only("action_only", good(prompt="cup " * 300))), f"prompt: has 360 {TOO_LONG}"),
    ("no state", "action", pack(without("state")), f"state: missing, {STATE}; the observation has images, prompt"),
    ("a state of another width", "action", pack(only("action_only", good(state=np.zeros(13)))), f"state: got shape [13], {STATE}"),
    ("a batch of states", "action", pack(only("action_only", good(state=np.zeros((1, 14))))), f"state: got shape [1, 14], {STATE}"),
    ("a single number as state", "action", pack(only("action_only", good(state=1.0))), f"state: got shape [], {STATE}"),
    ("a null state", "action", pack(only("action_only", good(state=None))), f"state: got NoneType, {STATE}"),
    ("text as state", "action", pack(only("action_only", good(state="zeros"))), f"state: got str, {STATE}"),
    ("an array of text as state", "action", pack(only("action_only", good(state=np.array(["a"] * 14)))), f"state: got dtype <U1, {STATE}"),
    ("truth values as state", "action", pack(only("action_only", good(state=np.zeros(14, bool)))), f"state: got dtype bool, {STATE}"),
    ("a ragged state", "action", pack(only("action_only", good(state=[1.0, [2.0]]))), f"state: got a ragged list, {STATE}"),
    (
        "NaN in the state",
        "action",
        pack(only("action_only", good(state=[0.0] * 13 + [np.nan]))),
        "state: the value at index 13 is nan, expected finite numbers",
    ),
    (
        "infinity in the state",
        "action",
        pack(only("action_only", good(state=[np.inf] + [0.0] * 13))),
        "state: the value at index 0 is inf, expected finite numbers",
    ),
    (
        "a state beyond float32",
        "action",
        pack(only("action_only", good(state=[1e60] + [0.0] * 13))),
        re.compile(r"state: the value at index 0 is \S+e\+60 after normalisation, too large for the model"),
    ),
    ("no images", "action", pack(without("images")), NO_CAMERA.format("none")),
    ("no images for the planner", "planner", pack(without("images")), NO_CAMERA.format("none")),
    (
        "no images for the policy alone",
        "action",
        pack(only("action_only", without("images"))),
        "images: missing, expected a map of camera name to image; the observation has prompt, state",
    ),
    ("an array as images", "planner", pack(good(images=PIXELS)), "images: expected a map of camera name to image, got ndarray"),
    ("no image in images", "action", pack(good(images={})), NO_CAMERA.format("none")),
    ("null images only", "planner", pack(good(images={"cam_high": None})), NO_CAMERA.format("none")),
    ("unknown cameras", "planner", pack(good(images={"front": PIXELS, "back": PIXELS})), NO_CAMERA.format("back, front")),
    ("escapes in a camera's name", "planner", pack(good(images={"\x1b[31mred\n": PIXELS})), NO_CAMERA.format(r"\x1b[31mred ")),
    (
        "a camera of another robot",
        "action",
        pack(only("action_only", camera(PIXELS, "cam_left"))),
        "images/cam_left: not a camera of this robot, expected some of cam_high, cam_left_wrist, cam_right_wrist, cam_low",
    ),
    (
        "no main camera",
        "action",
        pack(only("action_only", good(images={"cam_left_wrist": PIXELS}))),
        "images/cam_high: missing, expected a camera image [3, height, width]; images has cam_left_wrist",
    ),
    (
        "a camera twice",
        "planner",
        pack(camera(PIXELS, "base_0_rgb")),
        "base_0_rgb: camera base_0_rgb was already given as cam_high; send one of them",
    ),
    (
        "another robot's observation",
        "action",
        pack(only("action_only", {"observation/wrist_image_left": PIXELS, "observation/joint_position": np.zeros(7), "prompt": "x"})),
        f"state: missing, {STATE}; the observation has observation/joint_position, observation/wrist_image_left, prompt",
    ),
    (
        "a null image",
        "action",
        pack(only("action_only", camera(None))),
        "images/cam_high: expected an image array [height, width, 3], got NoneType",
    ),
    (
        "an encoded image",
        "action",
        pack(only("action_only", camera(b"\xff\xd8jpeg"))),
        "images/cam_high: expected an image array [height, width, 3], got bytes",
    ),
    ("an image as lists", "planner", pack(camera([[[0, 0, 0]]])), "cam_high: expected an image array [height, width, 3], got list"),
    ("a grey image", "planner", pack(camera(np.zeros((224, 224), np.uint8))), f"cam_high: image has shape [224, 224], {IMAGE}"),
    ("an image with alpha", "action", pack(camera(np.zeros((224, 224, 4), np.uint8))), f"cam_high: image has shape [224, 224, 4], {IMAGE}"),
    (
        "a batch of images",
        "action",
        pack(only("action_only", camera(np.zeros((1, 3, 224, 224), np.uint8)))),
        f"images/cam_high: image has shape [1, 3, 224, 224], {IMAGE}",
    ),
    (
        "an image of integers",
        "planner",
        pack(camera(np.zeros((224, 224, 3), np.int32))),
        "cam_high: image has dtype int32, expected uint8 (0 to 255) or float (0 to 1)",
    ),
    (
        "floats up to 255 for the planner",
        "planner",
        pack(camera(np.full((224, 224, 3), 200.0, np.float32))),
        "cam_high: float image with values from 200 to 200, expected [0, 1] or [-1, 1]; send uint8 or divide by 255",
    ),
    (
        "floats up to 255",
        "action",
        pack(only("action_only", camera(np.full((224, 224, 3), 200.0, np.float32)))),
        "images/cam_high: float image with values from 200 to 200, expected [0, 1]; send uint8 or divide by 255",
    ),
    (
        "NaN in an image",
        "action",
        pack(only("action_only", camera(np.full((224, 224, 3), np.nan, np.float32)))),
        "images/cam_high: image holds NaN or infinity",
    ),
    (
        "an image without pixels",
        "planner",
        pack(camera(np.zeros((0, 224, 3), np.uint8))),
        "cam_high: image is 0 × 224 pixels, expected 1 to 8192 on each side",
    ),
    (
        "an image of a giant camera",
        "action",
        pack(only("action_only", camera(np.zeros((9000, 1, 3), np.uint8)))),
        "images/cam_high: image is 9000 × 1 pixels, expected 1 to 8192 on each side",
    ),
]

LONGEST_MESSAGE = 2 << 20


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """Both slots on golden checkpoints; longest message 2 MiB."""
    with start(ServiceConfig(**combined_config(max_message_bytes=LONGEST_MESSAGE)), None) as running:
        yield running


GOOD = {"action": pack(only("action_only", good())), "planner": pack(good())}


@pytest.mark.parametrize(("port", "frame", "expected"), [pytest.param(*row, id=name) for name, *row in REQUESTS])
def test_requests(service: RunningService, port: str, frame: bytes | str, expected: Expected) -> None:
    with connect(service.addresses[port], compression=None, max_size=None) as connection:
        connection.recv()
        connection.send(frame)
        answer = connection.recv(timeout=60)
        assert isinstance(answer, str), "the answer is an error"
        check(answer, expected)
        connection.send(GOOD[port])
        reply = connection.recv(timeout=60)
        assert isinstance(reply, bytes), reply
        assert ("actions" if port == "action" else "subtask") in msgpack_numpy.unpack(reply)


def test_a_message_beyond_the_limit_ends_only_its_own_connection(service: RunningService) -> None:
    url = service.addresses["action"]
    with connect(url, compression=None) as other, connect(url, compression=None) as connection:
        other.recv()
        connection.recv()
        connection.send(bytes(LONGEST_MESSAGE + 1))
        with pytest.raises(ConnectionClosedError) as closed:
            connection.recv(timeout=60)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
        other.send(GOOD["action"])
        assert isinstance(other.recv(timeout=60), bytes)


# --- Configurations -------------------------------------------------------------------------------------------------------------

ACTION = {"model_config_name": "pi05_aloha", "checkpoint_dir": "/ckpt"}
PLANNER = {"checkpoint_dir": "/ckpt"}
FROM_FILE = " (file robot.json)"
PLANNER_FIELDS = (
    "an object with the fields checkpoint_dir, max_generation_tokens, generation_prompt_format, action_prompt_template, tokenizer, dtype, "
    "allowed_tokens, missing_cameras, on_failure, on_long_prompt, refresh, interval_s, max_age_s, on_task_change, timeout_s, "
    "min_confidence, decode, subtasks, cameras, compilation_cache, drafts, done_subtasks, "
    "scheduler or null as JSON"
)


def action_with(**fields: Any) -> dict[str, Any]:
    return {"action": {**ACTION, **fields}}


def planner_with(**fields: Any) -> dict[str, Any]:
    return {"planner": {**PLANNER, **fields}}


# (name, what robot.json holds, environment, arguments, expected)
CONFIGS: list[tuple[str, Any, dict[str, str], list[str], str]] = [
    ("no slot", {}, {}, [], 'no slot is configured; set "action", "planner" or both (see config.example.json)'),
    ("null slots", {"action": None, "planner": None}, {}, [], 'no slot is configured; set "action", "planner" or both (see config.example.json)'),
    ("no such file", {}, {}, ["--config", "gone.json"], "gone.json: no such file (given by --config); correct the path"),
    ("a directory", {}, {}, ["--config", "."], ".: cannot be read: Is a directory (given by --config)"),
    ("no JSON", '{"action": ', {}, [], "robot.json: not valid JSON at line 1, column 12: Expecting value"),
    ("a list", [], {}, [], "robot.json: expected one JSON object, got []; see config.example.json"),
    ("a field twice", '{"host": "a", "host": "b"}', {}, [], "robot.json: host: given twice in one object; keep one"),
    ("NaN", '{"drain_s": NaN}', {}, [], "robot.json: NaN is not a JSON number; write a finite one"),
    ("Latin-1", b'{"host": "\xff"}', {}, [], "robot.json: not UTF-8 text (byte 10); save it as UTF-8"),
    ("nested", '{"a":' * 100_000, {}, [], "robot.json: nested too deeply"),
    ("an unknown section", {"actoin": ACTION}, {}, [], f'actoin: unknown field{FROM_FILE}; did you mean "action"?'),
    ("an unknown field", action_with(checkpiont_dir=1), {}, [], f'action.checkpiont_dir: unknown field{FROM_FILE}; did you mean "checkpoint_dir"?'),
    (
        "a missing field",
        {"action": {"checkpoint_dir": "/x"}},
        {},
        [],
        "action.model_config_name: missing; set it in the configuration file or as OPENPI_ACTION__MODEL_CONFIG_NAME",
    ),
    ("a blank", action_with(checkpoint_dir=" "), {}, [], f"action.checkpoint_dir: is blank; give a value or leave the field out{FROM_FILE}"),
    ("a word for a number", action_with(num_steps="ten"), {}, [], f'action.num_steps: expected an integer 1…1000, got "ten"{FROM_FILE}'),
    ("a fraction", action_with(num_steps=2.5), {}, [], f"action.num_steps: expected an integer 1…1000, got 2.5{FROM_FILE}"),
    (
        "an unknown choice",
        action_with(dtype="float16"),
        {},
        [],
        f'action.dtype: expected one of "float32", "bfloat16" or null, got "float16"{FROM_FILE}',
    ),
    (
        "a port as text",
        {**action_with(), "action_transport": {"websocket_port": "8000"}},
        {},
        [],
        f'action_transport.websocket_port: expected an integer 0…65535, got "8000"{FROM_FILE}',
    ),
    (
        "equal ports",
        {**action_with(), **planner_with(), "planner_transport": {"websocket_port": 8000}},
        {},
        [],
        "planner_transport.websocket_port: 8000 is also action_transport.websocket_port; give one of them another port",
    ),
    (
        "the admin's port",
        {**planner_with(), "admin": {"port": 8002}},
        {},
        [],
        "admin.port: 8002 is also planner_transport.websocket_port; give one of them another port",
    ),
    (
        "no {subtask}",
        planner_with(action_prompt_template="{task}"),
        {},
        [],
        f"planner.action_prompt_template: has no {{subtask}}; put it where that text belongs{FROM_FILE}",
    ),
    (
        "another placeholder",
        planner_with(action_prompt_template="{subtask} {x}"),
        {},
        [],
        "planner.action_prompt_template: has an unknown placeholder '{x}' at character 11; use {task} and {subtask}, and {{ or }} for a literal brace"
        + FROM_FILE,
    ),
    (
        "code in a placeholder",
        planner_with(generation_prompt_format="{task.__class__}"),
        {},
        [],
        "planner.generation_prompt_format: has an unknown placeholder '{task.__class__}' at character 1; use {task}, and {{ or }} for a literal brace"
        + FROM_FILE,
    ),
    (
        "a lone brace",
        planner_with(generation_prompt_format="{task} }"),
        {},
        [],
        f"planner.generation_prompt_format: has a single '}}' at character 8; use {{task}}, and {{{{ or }}}} for a literal brace{FROM_FILE}",
    ),
    (
        "an endless template",
        planner_with(generation_prompt_format="{task}" + "x" * 3000),
        {},
        [],
        f"planner.generation_prompt_format: has 3006 characters, at most 2000 are allowed; shorten it{FROM_FILE}",
    ),
    (
        "more rows than the planner has programs for",
        planner_with(scheduler={"max_batch": 16}),
        {},
        [],
        f"planner.scheduler.max_batch: expected an integer 1…8, got 16{FROM_FILE}",
    ),
    (
        "a scheduler's field in the wrong section",
        planner_with(max_batch=2),
        {},
        [],
        "planner.max_batch: unknown field (file robot.json); known here: " + PLANNER_FIELDS.split("fields ")[1].split(" or null")[0],
    ),
    (
        "a deadline of none",
        action_with(),
        {},
        ["--set", "action.scheduler.deadline_ms=0"],
        "action.scheduler.deadline_ms: expected a number above 0 or null, got 0 (flag)",
    ),
    (
        "NUL in a path",
        action_with(checkpoint_dir="/ck\0pt"),
        {},
        [],
        f'action.checkpoint_dir: "/ck\\u0000pt" has a NUL character; remove it{FROM_FILE}',
    ),
    (
        "an admin port for everybody",
        {**action_with(), "admin": {"host": "::"}},
        {},
        [],
        "admin.api_key: missing, and admin.host :: can be reached from other machines, where anybody could edit prompts; set a key, or leave "
        "admin.host at 127.0.0.1",
    ),
    (
        "too many tokens",
        planner_with(max_generation_tokens=257),
        {},
        [],
        f"planner.max_generation_tokens: expected an integer 1…256, got 257{FROM_FILE}",
    ),
    (
        "a misspelt variable",
        action_with(),
        {"OPENPI_ACTION__DTYP": "float32"},
        [],
        'OPENPI_ACTION__DTYP: names no configuration field, correct or unset it; did you mean "dtype"?',
    ),
    (
        "a word in a variable",
        action_with(),
        {"OPENPI_ADMIN__PORT": "eighty"},
        [],
        'admin.port: expected an integer 0…65535 or null, got "eighty" (environment OPENPI_ADMIN__PORT)',
    ),
    ("text for a section", action_with(), {"OPENPI_PLANNER": "/ckpt"}, [], f'OPENPI_PLANNER: expected {PLANNER_FIELDS}, got "/ckpt"'),
    ("a flag without a value", action_with(), {}, ["--set", "host"], "--set host: expected FIELD=VALUE, e.g. action.dtype=float32"),
    ("a flag without a field", action_with(), {}, ["--set", "=1"], "--set =1: expected FIELD=VALUE, e.g. action.dtype=float32"),
    ("an unknown flag", action_with(), {}, ["--set", "action.dtpe=x"], 'action.dtpe: unknown field (flag); did you mean "dtype"?'),
    ("a wrong flag", action_with(), {}, ["--set", "action.num_steps=0"], "action.num_steps: expected an integer 1…1000, got 0 (flag)"),
    ("text for a section in a flag", action_with(), {}, ["--set", "planner=/ckpt"], f'--set planner: expected {PLANNER_FIELDS}, got "/ckpt"'),
    (
        "contradicting flags",
        action_with(),
        {},
        ["--set", "planner=null", "--set", "planner.dtype=float32"],
        "--set planner.dtype=float32: planner was already set to null; leave one of the two out",
    ),
]


def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    """(exit code, stdout, stderr) of ``main.py`` with ``arguments``, run here."""
    monkeypatch.setattr(sys, "argv", ["tandem", *arguments])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    out, err = capsys.readouterr()
    return exited.value.code, out, err


@pytest.mark.parametrize(("document", "environ", "arguments", "expected"), [pytest.param(*row, id=name) for name, *row in CONFIGS])
@pytest.mark.parametrize("command", [["config", "show"], ["serve"]], ids=" ".join)
def test_configs(
    command: list[str],
    document: Any,
    environ: Mapping[str, str],
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    content = document if isinstance(document, str | bytes) else json.dumps(document)
    Path("robot.json").write_bytes(content.encode() if isinstance(content, str) else content)
    monkeypatch.setenv("INFERENCE_CONFIG_PATH", "robot.json")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    code, out, err = command_line(monkeypatch, capsys, *command, *arguments)
    assert (code, out) == (2, "")
    prefix, message = err[:7], err[7:]
    assert prefix == "error: " and message.endswith("\n")
    check(message[:-1], expected)


# --- Checkpoints ----------------------------------------------------------------------------------------------------------------

Load = Callable[[Path], object]


def action(name: str = "pi05_aloha", **options: Any) -> Load:
    """Loads the action policy; a relative ``tokenizer`` is inside the checkpoint."""
    return lambda directory: ActionPolicy.load(name, directory, **{"device": "cpu", **options, "tokenizer": _tokenizer(options, directory)})


def planner(**options: Any) -> Load:
    return lambda directory: SubtaskGenerator.load(directory, **{**options, "tokenizer": _tokenizer(options, directory)})


def _tokenizer(options: Mapping[str, Any], directory: Path) -> Path:
    return directory / options["tokenizer"] if "tokenizer" in options else TOKENIZER


def served(slot: str, checkpoint_dir: str) -> Load:
    """Loads as the service does."""
    config = ServiceConfig.model_validate({slot: {**(ACTION if slot == "action" else PLANNER), "checkpoint_dir": checkpoint_dir}})
    return lambda directory: (load_action if slot == "action" else load_planner)(config)


def nothing(directory: Path) -> None:
    """The checkpoint is fine."""


WEIGHTS = "<dir>/model.safetensors"
DAMAGED = re.compile(rf"{WEIGHTS} is damaged or not a safetensors file: .+; fetch it again")
MISFIT = "does not fit the model its shapes describe"
TROSSEN = "<dir>/assets/trossen/norm_stats.json"
NO_STATS = f"no norm stats for asset 'trossen': {TROSSEN} does not exist (assets in this checkpoint: {{}}); " + (
    "use the config the checkpoint was trained with, or add the file"
)
NO_ORBAX = (
    "no Orbax checkpoint in <dir>: expected a file params/_METADATA (or _METADATA, when the path is the params directory itself). "
    "Check the path, or fetch the checkpoint again if a download was cut short."
)
NO_TOKENIZER = "tokenizer <dir>/no.model: no such file; give the path of a paligemma_tokenizer.model"
UNREADABLE_TOKENIZER = re.compile(r"<dir>/t\.model cannot be read as a SentencePiece model: .+")

# (name, golden checkpoint, damage, load, expected)
BROKEN: list[tuple[str, str, damage.Damage, Load, Expected]] = [
    ("no directory", "pi05_pytorch", damage.gone, action(), "no such directory <dir>; check the path of the checkpoint"),
    ("a file", "pi05_pytorch", damage.a_file, action(), "no such directory <dir> (it is a file); check the path of the checkpoint"),
    ("an empty directory", "pi05_pytorch", damage.empty, action(), NO_STATS.format("none")),
    (
        "no weights",
        "pi05_pytorch",
        damage.remove("model.safetensors"),
        action(),
        "no checkpoint in <dir>: expected model.safetensors (openpi or LeRobot) or params/_METADATA (JAX), "
        "found assets, config.json, tiny_model.json",
    ),
    ("cut weights", "pi05_pytorch", damage.cut("model.safetensors", 100_000), action(), DAMAGED),
    ("empty weights", "pi05_lerobot", damage.cut("model.safetensors", 0), action(), DAMAGED),
    ("an error page for weights", "pi05_pytorch", damage.write("model.safetensors", "<html>404</html>" * 9), action(), DAMAGED),
    (
        "a missing tensor",
        "pi05_pytorch",
        damage.tensors(lambda t: t.pop("action_out_proj.bias")),
        action(),
        f"{WEIGHTS} {MISFIT}; missing (1): action_out_proj.bias",
    ),
    (
        "a missing tensor that says the size",
        "pi05_pytorch",
        damage.tensors(lambda t: t.pop("action_in_proj.weight")),
        action(),
        f"{WEIGHTS} has no tensor action_in_proj.weight; without it the model's dimensions cannot be told",
    ),
    (
        "an unexpected tensor",
        "pi05_pytorch",
        damage.tensors(lambda t: t.update({"surprise.weight": torch.zeros(2)})),
        action(),
        f"{WEIGHTS} {MISFIT}; unexpected (1): surprise.weight",
    ),
    (
        "a tensor of another shape",
        "pi05_pytorch",
        damage.tensors(lambda t: t.update({"action_out_proj.bias": torch.zeros(7)})),
        action(),
        f"{WEIGHTS} {MISFIT}; wrong shape (1): action_out_proj.bias is (7,), expected (32,)",
    ),
    (
        "quantised weights",
        "pi05_pytorch",
        damage.tensors(lambda t: t.update({"action_out_proj.bias": torch.zeros(32, dtype=torch.int8)})),
        action(),
        f"tensor action_out_proj.bias of {WEIGHTS} is I8, expected one of F16, BF16, F32, F64",
    ),
    (
        "another model",
        "pi05_pytorch",
        damage.tensors(lambda t: (t.clear(), t.update({"lm_head.weight": torch.zeros(2)}))),
        action(),
        f"{WEIGHTS} is not a pi0 or pi0.5 model: neither paligemma_with_expert.gemma_expert.model.norm.weight nor .norm.dense.weight is among its "
        "1 tensors (lm_head.weight, …)",
    ),
    (
        "head counts that do not fit",
        "pi05_pytorch",
        damage.write("tiny_model.json", '{"vlm": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 16}}'),
        action(),
        "<dir>/tiny_model.json: vlm has 3 heads and 1 kv heads of 16, but the weights have 96 query and 16 key features",
    ),
    (
        "a LeRobot type of another model",
        "pi05_lerobot",
        damage.write("config.json", '{"type": "pi0"}'),
        action(),
        "<dir>/config.json says type 'pi0', but the weights beside it are those of a pi05 model; supported types are pi0, pi05",
    ),
    (
        "a pi0 config for a pi0.5 model",
        "pi05_pytorch",
        nothing,
        action("pi0_aloha"),
        "config 'pi0_aloha' is for a pi0 model, but the checkpoint <dir> is a pi05 one; use a pi05 config",
    ),
    (
        "a pi0.5 config for a pi0 model",
        "pi0_orbax",
        nothing,
        action("pi05_aloha"),
        "config 'pi05_aloha' is for a pi05 model, but the checkpoint <dir> is a pi0 one; use a pi0 config",
    ),
    (
        "a misspelt config",
        "pi05_pytorch",
        nothing,
        action("pi05_alhoa"),
        "action.model_config_name: there is no config 'pi05_alhoa'; did you mean 'pi05_aloha'?",
    ),
    (
        "a FAST config",
        "pi05_pytorch",
        nothing,
        action("pi0_fast_droid"),
        "action.model_config_name: 'pi0_fast_droid' is a pi0-FAST config; not supported yet, use a pi0 or pi0.5 config and checkpoint",
    ),
    ("an asset that is not there", "pi05_pytorch", damage.remove("assets/trossen"), action(), NO_STATS.format("droid, physical-intelligence/libero")),
    (
        "norm stats that are no JSON",
        "pi05_pytorch",
        damage.write("assets/trossen/norm_stats.json", "{"),
        action(),
        re.compile(rf"{TROSSEN} is not a norm-stats file \(JSONDecodeError: .+\); expected \{{'norm_stats': .+"),
    ),
    (
        "norm stats without quantiles",
        "pi05_pytorch",
        damage.stats("trossen", lambda stats: stats["state"].update(q01=None)),
        action(),
        f"{TROSSEN}: state: q01 and q99 are required, because this config normalises with quantiles",
    ),
    (
        "norm stats without a state",
        "pi05_pytorch",
        damage.stats("trossen", lambda stats: stats.pop("state")),
        action(),
        "norm stats of asset 'trossen' have no 'state' (found: actions); state and actions are needed",
    ),
    (
        "another robot's norm stats",
        "pi05_pytorch",
        damage.stats("trossen", lambda stats: damage.narrow(stats, 8)),
        action(),
        "norm stats of asset 'trossen' have 8 columns for 'state', expected 14 (aloha) to 32 (the model)",
    ),
    ("no tokenizer", "pi05_pytorch", nothing, action(tokenizer="no.model"), NO_TOKENIZER),
    ("a file that is no tokenizer", "pi05_pytorch", damage.write("t.model", "hello"), action(tokenizer="t.model"), UNREADABLE_TOKENIZER),
    (
        "a tokenizer of another kind",
        "pi05_pytorch",
        damage.other_tokenizer("t.model"),
        action(tokenizer="t.model"),
        "<dir>/t.model has pad, eos, bos ids (-1, 2, 1), expected (0, 1, 2): it is not a PaliGemma tokenizer",
    ),
    (
        "fewer embeddings than tokens",
        "pi05_pytorch",
        damage.tensors(damage.fewer_embeddings),
        action(),
        f"tokenizer {TOKENIZER} has 1024 tokens, but the model embeds 512; give the tokenizer that the checkpoint was trained with",
    ),
    (
        "a device that is none",
        "pi05_pytorch",
        nothing,
        action(device="gpu"),
        "action.device: 'gpu' is not a device of PyTorch; expected cpu, cuda or cuda:<index>",
    ),
    (
        "a missing leaf for the policy",
        "pi05_orbax",
        damage.without_leaf("action_out_proj"),
        action(),
        f"<dir>/params {MISFIT}; missing (2): action_out_proj/bias, action_out_proj/kernel",
    ),
    ("no directory for the planner", "pi05_orbax", damage.gone, planner(), "no such directory <dir>; check the path of the checkpoint"),
    ("a file for the planner", "pi05_orbax", damage.a_file, planner(), "no such directory <dir> (it is a file); check the path of the checkpoint"),
    ("an empty directory for the planner", "pi05_orbax", damage.empty, planner(), NO_ORBAX),
    ("PyTorch weights for the planner", "pi05_pytorch", nothing, planner(), NO_ORBAX),
    ("no metadata", "pi05_orbax", damage.remove("params/_METADATA"), planner(), NO_ORBAX),
    (
        "broken metadata",
        "pi05_orbax",
        damage.write("params/_METADATA", "{"),
        planner(),
        re.compile("<dir>/params/_METADATA is not Orbax tree metadata: .+"),
    ),
    (
        "metadata of nothing",
        "pi05_orbax",
        damage.write("params/_METADATA", '{"tree_metadata": {}}'),
        planner(),
        "<dir>/params/_METADATA lists no parameters",
    ),
    (
        "another tree",
        "pi05_orbax",
        damage.write("params/_METADATA", "{\"tree_metadata\": {\"('opt_state', 'x')\": {}}}"),
        planner(),
        "<dir>/params/_METADATA: leaf opt_state/x is not below the top-level key 'params'; is this the params item of an openpi checkpoint?",
    ),
    (
        "no manifest",
        "pi05_orbax",
        damage.remove("params/manifest.ocdbt"),
        planner(),
        "<dir>/params has _METADATA but no manifest.ocdbt: only Orbax checkpoints in OCDBT storage are supported, or this one is incomplete",
    ),
    (
        "a missing leaf",
        "pi05_orbax",
        damage.without_leaf("'final_norm', 'scale'"),
        planner(),
        f"<dir>/params {MISFIT}; missing (1): PaliGemma/llm/final_norm/scale",
    ),
    (
        "an unexpected leaf",
        "pi05_orbax",
        damage.extra_leaf("PaliGemma/llm/surprise"),
        planner(),
        f"<dir>/params {MISFIT}; unexpected (1): PaliGemma/llm/surprise",
    ),
    (
        "a missing leaf that says the size",
        "pi05_orbax",
        damage.without_leaf("input_embedding"),
        planner(),
        "<dir>/params: leaf PaliGemma/llm/embedder/input_embedding is missing; without it the model's dimensions cannot be told",
    ),
    ("a missing data file", "pi05_orbax", damage.without_data, planner(), re.compile("cannot read leaf [A-Za-z_0-9/]+ of <dir>/params: .+")),
    ("a damaged data file", "pi05_orbax", damage.flipped_data, planner(), re.compile("cannot read leaf [A-Za-z_0-9/]+ of <dir>/params: .+")),
    ("no tokenizer for the planner", "pi05_orbax", nothing, planner(tokenizer="no.model"), NO_TOKENIZER),
    ("no tokenizer for it in that file", "pi05_orbax", damage.write("t.model", "hello"), planner(tokenizer="t.model"), UNREADABLE_TOKENIZER),
    ("an unknown rule", "pi05_orbax", nothing, planner(allowed_tokens="all"), "allowed_tokens: got 'all', expected one of text, printable_ascii"),
    ("a served path", "pi05_orbax", nothing, served("action", "/no/such"), "no such directory /no/such; check the path of the checkpoint"),
    (
        "a served scheme",
        "pi05_orbax",
        nothing,
        served("planner", "ftp://h/x"),
        "ftp://h/x: unknown scheme ftp://; expected a local path, gs://, s3:// or hf://",
    ),
    ("a served bucket", "pi05_orbax", nothing, served("planner", "gs://"), "gs:// names no bucket; expected gs://<bucket>/<path>"),
    (
        "a served repository",
        "pi05_orbax",
        nothing,
        served("action", "hf://org"),
        "hf://org names no repository; expected hf://<organisation>/<name>[@revision][/folder]",
    ),
    (
        "a served escape",
        "pi05_orbax",
        nothing,
        served("action", "gs://b/../../x"),
        "location gs://b/../../x points outside the target directory; refused",
    ),
]


@pytest.mark.parametrize(("golden", "break_it", "load", "expected"), [pytest.param(*row, id=name) for name, *row in BROKEN])
def test_checkpoints(golden: str, break_it: damage.Damage, load: Load, expected: Expected, tmp_path: Path) -> None:
    directory = damage.copy(golden, tmp_path / "checkpoint")
    break_it(directory)
    with pytest.raises((CheckpointError, ConfigError)) as error:
        load(directory)
    check(str(error.value).replace(str(directory), "<dir>"), expected)


# --- Archives -------------------------------------------------------------------------------------------------------------------

ONLY_FILES = "only regular files and directories are accepted"
OUTSIDE = "points outside the target directory; refused"
TWICE = "is there twice, once as a file and once as a directory"


def planner_tree(archive: tarfile.TarFile) -> None:
    archive.add(CHECKPOINTS / "pi05_orbax", "99")


# (name, content, expected)
ARCHIVES: list[tuple[str, TarContent | bytes, Expected]] = [
    ("an absolute path", files("/etc/evil"), f"c.tar: member '/etc/evil' {OUTSIDE}"),
    ("a path upwards", files("99/../../evil"), f"c.tar: member '99/../../evil' {OUTSIDE}"),
    ("a path of another system", files("..\\evil"), f"c.tar: member '..\\\\evil' {OUTSIDE}"),
    ("a symbolic link", special("l", tarfile.SYMTYPE, "/etc/passwd"), f"c.tar: member 'l' is a symbolic link to '/etc/passwd'; {ONLY_FILES}"),
    ("a hard link", special("l", tarfile.LNKTYPE, "99/x"), f"c.tar: member 'l' is a hard link to '99/x'; {ONLY_FILES}"),
    ("a device", special("d", tarfile.CHRTYPE), f"c.tar: member 'd' is a device; {ONLY_FILES}"),
    ("a FIFO", special("p", tarfile.FIFOTYPE), f"c.tar: member 'p' is a FIFO; {ONLY_FILES}"),
    ("a file twice", files("a", "./a"), "c.tar: member './a' is there twice"),
    ("a file as a directory", files("a", "a/b"), f"c.tar: member 'a/b' {TWICE}"),
    ("nothing", lambda archive: None, "c.tar contains no files"),
    ("too many members", files(*map(str, range(51))), "c.tar has more than 50 members; refused"),
    (
        "a file too large",
        lambda archive: file(archive, "b", bytes(20_001)),
        "c.tar: member 'b' takes the archive over the limit of 20.0 kB unpacked; refused",
    ),
    ("no archive", b"<html>404</html>" * 99, re.compile(r"c\.tar is not a readable tar archive \(.+\); it is damaged or was cut short")),
    ("an empty file", b"", re.compile(r"c\.tar is not a readable tar archive \(.+\); it is damaged or was cut short")),
]


@pytest.mark.parametrize(("content", "expected"), [pytest.param(*row, id=name) for name, *row in ARCHIVES])
def test_archives(content: TarContent | bytes, expected: Expected, tmp_path: Path) -> None:
    tar = tmp_path / "c.tar"
    if isinstance(content, bytes):
        tar.write_bytes(content)
    else:
        write_tar(tar, content)
    with pytest.raises(CheckpointError) as error:
        extract_tar(tar, tmp_path / "work" / "out", max_bytes=20_000, max_members=50)
    check(str(error.value), expected)
    assert [path.name for path in tmp_path.iterdir() if path != tar] == ["work"]
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]


# (name, archive on the hub, arguments, expected)
DOWNLOADS: list[tuple[str, bytes | TarContent, list[str], Expected]] = [
    (
        "an error page",
        b"<html>404</html>" * 99,
        [],
        re.compile(r"pi05_subtask\.tar is not a readable tar archive \(.+\); it is damaged or was cut short"),
    ),
    ("no checkpoint", files("99/README"), [], re.compile(r"no Orbax checkpoint in .+: expected a file params/_METADATA .+")),
    ("a link in it", special("99/l", tarfile.SYMTYPE, "/"), [], f"pi05_subtask.tar: member '99/l' is a symbolic link to '/'; {ONLY_FILES}"),
    ("another file", planner_tree, ["--tar-path-in-repo", "a.tar"], re.compile(r"Hebbian-Robotics/pi05_subtask \(revision main\) has no a\.tar.*")),
    (
        "another repository",
        planner_tree,
        ["--hf-repo", "no/such"],
        re.compile(r"no repository no/such on .+; check the id, and set HF_TOKEN if it is private"),
    ),
    ("no repository", planner_tree, ["--hf-repo", "no such"], re.compile("'no such' is not a repository id; expected <organisation>/<name>.*")),
]


@pytest.mark.parametrize(("content", "arguments", "expected"), [pytest.param(*row, id=name) for name, *row in DOWNLOADS])
def test_downloads(
    content: bytes | TarContent,
    arguments: list[str],
    expected: Expected,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As ``prepare-planner-checkpoint`` says it, from a stand-in of the hub."""
    archive = content if isinstance(content, bytes) else write_tar(tmp_path / "source.tar", content).read_bytes()
    (tmp_path / "target").mkdir()
    monkeypatch.setattr("hosting.logs.configure", lambda *arguments: None)
    with hub_stand_in() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.repos["Hebbian-Robotics/pi05_subtask"] = Repo({"jax/pi05_subtask.tar": archive})
        output = str(tmp_path / "target" / "out")
        code, out, err = command_line(monkeypatch, capsys, "prepare-planner-checkpoint", "--output-dir", output, *arguments)
    assert (code, out) == (1, "")
    message = err.splitlines()[-1]
    assert message.startswith("error: ") and err.count("error: ") == 1
    check(message.removeprefix("error: "), expected)
    assert leftovers(tmp_path / "target") == set()


def test_there_are_enough_of_them() -> None:
    tables: list[list[Any]] = [REQUESTS, CONFIGS, BROKEN, ARCHIVES, DOWNLOADS]
    assert sum(map(len, tables)) >= 80
    for table in tables:
        assert len({row[0] for row in table}) == len(table), "each row has a name of its own"
