from __future__ import annotations

import io
import logging
import sys

import pytest

from pi0.progress import LoggedProgress, readable_size, show_progress


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (4_264_023, "4.3 MB"), (12.44e9, "12.4 GB"), (3e12, "3000.0 GB")]
)
def test_readable_size(size: float, text: str) -> None:
    assert readable_size(size) == text


def test_a_log_has_one_line_for_every_tenth(caplog: pytest.LogCaptureFixture) -> None:
    progress = LoggedProgress()
    with caplog.at_level(logging.INFO):
        for done in range(0, 1001):
            progress(done, 1000, "weights")
    assert caplog.messages == [f"weights: {percent} % of 1.0 kB" for percent in range(0, 101, 10)]


def test_without_a_total_it_says_how_much_came(caplog: pytest.LogCaptureFixture) -> None:
    progress = LoggedProgress()
    with caplog.at_level(logging.INFO):
        for done in (0, 10, 1 << 30, (1 << 30) + 1):
            progress(done, None, "weights")
    assert caplog.messages == ["weights: 0 bytes", "weights: 1.1 GB"]


def test_off_a_terminal_it_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with show_progress() as progress:
        assert isinstance(progress, LoggedProgress)
    assert sys.stderr.getvalue() == ""


def test_on_a_terminal_it_draws_a_bar_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with show_progress() as progress:
        progress(0, 100, "first")
        progress(100, 100, "first")
        progress(50, 100, "second")
    assert "first" in terminal.getvalue()
    assert "second" in terminal.getvalue()
    assert "100/100 bytes" in terminal.getvalue()
