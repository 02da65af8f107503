"""Log lines for people and for machines."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import pytest

from hosting import logs


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Puts the process's logging back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    # basicConfig(force=True) closes what it finds; pytest's own handlers must live on.
    root.handlers[:] = []
    yield
    root.handlers[:], root.level = handlers, level


def test_plain(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("plain")
    logging.getLogger("tandem.x").info("ready %d", 1)
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"\d\d:\d\d:\d\d INFO    tandem\.x: ready 1\n", err)


def test_json_is_one_object_per_line_also_with_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json")
    logging.getLogger("tandem.x").warning("größer %s", "als\nzwei")
    try:
        raise ZeroDivisionError("here")
    except ZeroDivisionError:
        logging.getLogger("tandem.y").exception("failed")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", first.pop("time"))
    assert first == {"level": "WARNING", "logger": "tandem.x", "message": "größer als\nzwei"}
    assert second["message"] == "failed" and second["level"] == "ERROR"
    assert second["traceback"].startswith("Traceback") and second["traceback"].endswith("ZeroDivisionError: here")


def test_level_and_the_chatter_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("plain", level=logging.INFO)
    logging.getLogger("tandem.x").debug("no")
    logging.getLogger("uvicorn.error").info("no")
    logging.getLogger("uvicorn.error").error("uvicorn says")
    assert capsys.readouterr().err.endswith("uvicorn says\n")
    logs.configure("plain", level=logging.ERROR)
    logging.getLogger("uvicorn.error").warning("no")
    assert capsys.readouterr().err == ""


def test_json_has_a_records_fields_beside_its_message(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json")
    logging.getLogger("tandem.x").info("served", extra={"fields": {"slot": "action", "queue_ms": 0.2, "session": None}})
    entry = json.loads(capsys.readouterr().err)
    del entry["time"]
    assert entry == {"level": "INFO", "logger": "tandem.x", "message": "served", "slot": "action", "queue_ms": 0.2, "session": None}


@pytest.mark.parametrize("text", ["\x1b[31m", "\x9b31m", "a\u2028b", "\u202eb", "\ud800", "größer"])
def test_json_lines_hold_nothing_that_a_terminal_obeys(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json")
    logging.getLogger("tandem.x").info("%s", text)
    line = capsys.readouterr().err.removesuffix("\n")
    assert line.isascii() and line.isprintable()
    assert json.loads(line)["message"] == text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("state: missing", "state: missing"),
        ("a\nb\r\n\tc   d\u2028e", "a b c d e"),
        ("\x1b[31mred\u202e größer × \x00", "\\x1b[31mred\\u202e größer × \\x00"),
        ("\ud800 \x9b", "\\ud800 \\x9b"),
        ("", ""),
    ],
)
def test_one_line(text: str, line: str) -> None:
    assert logs.one_line(text) == line
