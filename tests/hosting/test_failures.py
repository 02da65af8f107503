"""What a client is told when its request fails."""

from __future__ import annotations

import logging
import re

import pytest

from hosting.failures import Failure, client_text, failure
from hosting.policy import DrainingError, ObservationError, OverloadedError, PlannerError, PromptTooLongError, SupersededError


@pytest.mark.parametrize("error", [ObservationError("state: missing"), OverloadedError("busy"), DrainingError("bye")])
def test_the_clients_own_error_goes_back_word_for_word(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert client_text(error, slot="action") == str(error)
    assert [(record.levelno, record.getMessage(), record.exc_info) for record in caplog.records] == [
        (logging.INFO, f"action: refused: {error}", None)
    ]


def test_it_is_always_one_line_and_bounded() -> None:
    assert client_text(ObservationError("a\nb\r\n\tc   d"), slot="action") == "a b c d"
    assert client_text(ObservationError("\x1b[31mred\u202e größer × \x00"), slot="action") == "\\x1b[31mred\\u202e größer × \\x00"
    text = client_text(ObservationError("x" * 5000), slot="action")
    assert len(text) == 2000 and text.endswith("x...")
    assert client_text(ObservationError("x" * 2000), slot="action") == "x" * 2000


@pytest.mark.parametrize("error", [PlannerError("secret"), ZeroDivisionError("secret"), KeyError("secret")])
def test_the_servers_error_is_an_id_under_which_the_log_has_it(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    text = client_text(error, slot="planner")
    found = re.fullmatch(r"internal error ([0-9a-f]{8}): the planner failed on this request; the server's log has the details under this id", text)
    assert found
    (record,) = caplog.records
    assert record.getMessage() == f"planner: a request failed, error id {found[1]}" and record.exc_info and record.exc_info[1] is error
    assert client_text(error, slot="planner") != text, "each failure has its own id"


def test_a_refusal_is_left_to_the_requests_own_line_and_has_a_code(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert failure(PromptTooLongError("prompt: too long"), slot="action") == Failure("prompt_too_long", "prompt: too long")
        assert failure(SupersededError("superseded: by\na newer one"), slot="action") == Failure("superseded", "superseded: by a newer one")
        assert caplog.records == []
        assert failure(ZeroDivisionError("secret"), slot="action").code == "internal" and len(caplog.records) == 1
