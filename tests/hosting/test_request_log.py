"""One line per request."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from hosting.calls import Served
from hosting.logs import JSONFormatter
from hosting.request_log import log_request

ACTION = Served("action", queue_s=0.0002, infer_s=0.0183, batch=4)
PLANNER = Served("planner", queue_s=0.0001, infer_s=0.3104, batch=2)


def logged(caplog: pytest.LogCaptureFixture, **changes: Any) -> logging.LogRecord:
    arguments: dict[str, Any] = {
        **{"slot": "action", "mode": "default", "session": "robot-1", "transport": "websocket"},
        **{"served": [ACTION], "total_s": 0.0191, "outcome": "ok"},
    }
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="hosting.requests"):
        log_request(**arguments | changes)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("hosting.requests", logging.INFO)
    return record


def plain(caplog: pytest.LogCaptureFixture, **changes: Any) -> str:
    return logged(caplog, **changes).getMessage()


def fields(caplog: pytest.LogCaptureFixture, **changes: Any) -> dict[str, Any]:
    """What the JSON line says beside what every JSON line says."""
    line = JSONFormatter().format(logged(caplog, **changes))
    assert line.isascii() and line.isprintable()
    said: dict[str, Any] = json.loads(line)
    return {key: value for key, value in said.items() if key not in ("time", "level", "logger", "message")}


def test_served(caplog: pytest.LogCaptureFixture) -> None:
    assert plain(caplog) == "action default session=robot-1 queue=0.2 ms infer=18.3 ms batch=4 total=19.1 ms ok"
    assert fields(caplog) == {
        **{"slot": "action", "mode": "default", "session": "robot-1", "transport": "websocket"},
        **{"queue_ms": 0.2, "infer_ms": 18.3, "batch": 4, "total_ms": 19.1, "outcome": "ok"},
    }


def test_the_planners_share_of_an_action_request(caplog: pytest.LogCaptureFixture) -> None:
    assert plain(caplog, served=[PLANNER, ACTION], total_s=0.3298) == (
        "action default session=robot-1 planner_queue=0.1 ms planner_infer=310.4 ms planner_batch=2 "
        "queue=0.2 ms infer=18.3 ms batch=4 total=329.8 ms ok"
    )
    said = fields(caplog, served=[PLANNER, ACTION])
    assert (said["planner_queue_ms"], said["planner_infer_ms"], said["planner_batch"]) == (0.1, 310.4, 2)
    assert (said["queue_ms"], said["infer_ms"], said["batch"]) == (0.2, 18.3, 4)


def test_the_planners_own_request(caplog: pytest.LogCaptureFixture) -> None:
    line = plain(caplog, slot="planner", mode="subtask_only", served=[PLANNER], total_s=0.311)
    assert line == "planner subtask_only session=robot-1 queue=0.1 ms infer=310.4 ms batch=2 total=311.0 ms ok"


def test_rows_of_a_batched_request_give_the_longest(caplog: pytest.LogCaptureFixture) -> None:
    line = plain(caplog, served=[Served("action", 0.001, 0.02, 2), Served("action", 0.03, 0.01, 1)], total_s=0.05)
    assert line == "action default session=robot-1 queue=30.0 ms infer=20.0 ms batch=2 total=50.0 ms ok"


def test_refused(caplog: pytest.LogCaptureFixture) -> None:
    refused: dict[str, Any] = {"session": None, "served": [], "total_s": 0.0004, "outcome": "observation", "detail": "state: missing"}
    assert plain(caplog, **refused) == "action default session=- total=0.4 ms refused: observation: state: missing"
    assert fields(caplog, **refused) == {
        **{"slot": "action", "mode": "default", "session": None, "transport": "websocket"},
        **{"total_ms": 0.4, "outcome": "observation", "detail": "state: missing"},
    }


def test_failed_and_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    assert plain(caplog, outcome="internal", detail="internal error 1a2b3c4d").endswith("total=19.1 ms failed: internal: internal error 1a2b3c4d")
    assert plain(caplog, outcome="cancelled", served=[]) == "action default session=robot-1 total=19.1 ms cancelled"


@pytest.mark.parametrize(("request_id", "text"), [(7, "7"), ("a-7", "a-7"), (0, "0"), (float("nan"), "nan")])
def test_the_clients_own_name_for_it(caplog: pytest.LogCaptureFixture, request_id: Any, text: str) -> None:
    assert plain(caplog, request_id=request_id).endswith(f" total=19.1 ms request_id={text} ok")
    assert fields(caplog, request_id=request_id)["request_id"] == text


HOSTILE = [
    *("a\nINFO forged", "\x1b[2Jgone", "x infer=0.0 ms ok", "\u202egnp", "line\u2028end", "\x9b31m"),
    *("", "'", 'a"b', "\ud800", "größer", "\r\n\t\x00"),
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_strangers_words_stay_one_word_of_one_line(caplog: pytest.LogCaptureFixture, text: str) -> None:
    line = plain(caplog, session=text, request_id=text, mode=text, outcome="observation", detail=f"{text}: unknown key")
    assert line.isprintable() and len(line.splitlines()) == 1
    line.encode()
    assert line.startswith(f"action {text!r} session={text!r} queue=0.2 ms") and f" request_id={text!r} refused: observation: " in line
    said = fields(caplog, session=text, request_id=text, mode=text)
    assert (said["session"], said["request_id"], said["mode"]) == (text, text, text)


def test_long_names_are_cut_in_the_line_for_people_only(caplog: pytest.LogCaptureFixture) -> None:
    name = "r" * 256
    assert f"session='{'r' * 80}…' " in plain(caplog, session=name)
    assert fields(caplog, session=name)["session"] == name


def test_a_mode_of_any_length_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    line = JSONFormatter().format(logged(caplog, mode="m" * 1_000_000))
    assert json.loads(line)["mode"] == "m" * 80 + "…" and len(line) < 1000


def test_nothing_is_made_up_where_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    class Untouchable:
        def __iter__(self) -> Any:
            raise AssertionError("the line was put together")

    with caplog.at_level(logging.WARNING, logger="hosting.requests"):
        log_request(slot="action", mode="default", session=None, transport="unix", served=Untouchable(), total_s=0.1, outcome="ok")  # type: ignore[arg-type]
    assert caplog.records == []
