from __future__ import annotations

import json
import logging
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from hosting.settings_file import FORMAT, SettingsFile, SettingsFileError
from hosting.templates import HISTORY, LiveSettings, PromptSettings
from pi0.errors import ConfigError

ENTRY = {
    "revision": 1,
    "changed_at": "2026-01-31T12:00:00.000Z",
    "source": "start",
    "generation_prompt_format": "Task: {task}. Subtask: ",
    "action_prompt_template": "{task}. Subtask: {subtask}",
    "max_generation_tokens": 20,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "settings.json"


def start(path: Path, **configured: Any) -> LiveSettings:
    """What the service does when it starts."""
    return LiveSettings(PromptSettings(**configured), file=SettingsFile(path), clock=lambda: 0.0)


def left_in(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


class TestRestart:
    def test_values_revision_and_history_go_on(self, path: Path) -> None:
        before = start(path)
        before.update(generation_prompt_format="Tu {task} — ¡ya! {{}}\n", max_generation_tokens=5)
        before.update(action_prompt_template="{subtask}")
        after = start(path)
        assert after.current == before.current
        assert after.current.etag == before.current.etag
        assert after.history == before.history
        assert after.rollback(1).revision == 4
        again = start(path)
        assert again.current.generation_prompt_format == "Task: {task}. Subtask: "
        assert [(entry.settings.revision, entry.source) for entry in again.history] == [
            (1, "start"),
            (2, "update"),
            (3, "update"),
            (4, "rollback to 1"),
        ]

    def test_nothing_is_written_before_the_first_change(self, path: Path, tmp_path: Path) -> None:
        live = start(path)
        live.update(max_generation_tokens=20)
        assert left_in(tmp_path) == []

    def test_it_wins_over_the_configuration_and_says_so(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        start(path).update(max_generation_tokens=5)
        with caplog.at_level(logging.INFO, "hosting.templates"):
            live = start(path, max_generation_tokens=7, action_prompt_template="{subtask}")
        assert (live.current.max_generation_tokens, live.current.action_prompt_template) == (5, "{task}. Subtask: {subtask}")
        remedy = "from the configuration; delete that file to have the configuration's"
        assert caplog.messages == [
            f"prompt settings revision 2 of 1970-01-01T00:00:00.000Z, kept in {path}",
            f"action_prompt_template: '{{task}}. Subtask: {{subtask}}' from {path} wins over '{{subtask}}' {remedy}",
            f"max_generation_tokens: 5 from {path} wins over 7 {remedy}",
        ]

    def test_the_history_stays_bounded(self, path: Path) -> None:
        live = start(path)
        for tokens in range(1, HISTORY + 11):
            live.update(max_generation_tokens=tokens, generation_prompt_format="{task}")
        assert len(json.loads(path.read_text())["revisions"]) == HISTORY
        assert start(path).history == live.history

    def test_a_link_stays_a_link(self, path: Path, tmp_path: Path) -> None:
        link = tmp_path / "link.json"
        link.symlink_to(path)
        start(link).update(max_generation_tokens=5)
        assert link.is_symlink()
        assert start(path).current.max_generation_tokens == 5

    def test_in_the_users_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        start(Path("~/prompts.json")).update(max_generation_tokens=5)
        assert left_in(tmp_path) == ["prompts.json"]


class TestContent:
    def test_people_can_read_it_and_nobody_else(self, path: Path, tmp_path: Path) -> None:
        start(path).update(generation_prompt_format="¿{task}?")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        document = json.loads(path.read_text())
        assert document["format"] == FORMAT
        assert [entry["revision"] for entry in document["revisions"]] == [1, 2]
        assert '"generation_prompt_format": "¿{task}?"' in path.read_text()
        assert left_in(tmp_path) == ["settings.json"]

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ("", "not valid JSON at line 1, column 1: Expecting value"),
            ("{", "not valid JSON at line 1, column 2: Expecting property name enclosed in double quotes"),
            ("[]", 'expected an object with "format" and "revisions", got []'),
            ({"format": "tandem-prompt-settings/2", "revisions": [ENTRY]}, f'format: expected "{FORMAT}", got "tandem-prompt-settings/2"'),
            ({"format": FORMAT, "revisions": []}, "revisions: expected a list with at least one entry, got []"),
            ([5], "revisions[0]: expected an object, got 5"),
            ([{**ENTRY, "prompt": "x"}], f"revisions[0]: prompt: unknown field; known here: {', '.join(ENTRY)}"),
            ([{key: value for key, value in ENTRY.items() if key != "source"}], "revisions[0]: source: missing"),
            ([{**ENTRY, "max_generation_tokens": True}], "revisions[0]: max_generation_tokens: expected an integer, got true"),
            ([{**ENTRY, "revision": 0}], "revisions[0]: revision: expected an integer of at least 1, got 0"),
            ([ENTRY, ENTRY], "revisions[1]: revision: expected more than 1, which is before it, got 1"),
            (
                [{**ENTRY, "changed_at": "yesterday"}],
                'revisions[0]: changed_at: expected an ISO 8601 time such as "2026-01-31T12:00:00.000Z", got "yesterday"',
            ),
            ([{**ENTRY, "source": "\ud800"}], 'revisions[0]: source: expected "start", "update" or "rollback to" and a number, got "\\ud800"'),
            (
                [{**ENTRY, "generation_prompt_format": "{task"}],
                "revisions[0]: generation_prompt_format: has a single '{' at character 1; use {task}, and {{ or }} for a literal brace",
            ),
            (
                [{**ENTRY, "action_prompt_template": "{task}", "max_generation_tokens": 0}],
                "revisions[0]: action_prompt_template: has no {subtask}; put it where that text belongs; "
                "revisions[0]: max_generation_tokens: expected an integer 1…256, got 0",
            ),
            ('{"format": "a", "format": "b"}', "format: given twice in one object; keep one"),
        ],
    )
    def test_what_is_not_ours_is_neither_taken_nor_overwritten(self, path: Path, content: Any, problem: str) -> None:
        if isinstance(content, list):
            content = {"format": FORMAT, "revisions": content}
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        before = path.read_bytes()
        with pytest.raises(ConfigError) as error:
            start(path)
        remedy = "correct it, or move it away to begin with the configuration's values"
        assert str(error.value) == f"admin.settings_file: {path} is no file of prompt settings: {problem}; {remedy}"
        assert path.read_bytes() == before

    def test_cut_anywhere_it_is_refused(self, path: Path) -> None:
        start(path).update(max_generation_tokens=5)
        whole = path.read_bytes()
        for length in range(0, len(whole.rstrip()), 7):
            path.write_bytes(whole[:length])
            with pytest.raises(ConfigError, match=r"^admin\.settings_file: .* is no file of prompt settings: not valid JSON"):
                start(path)

    def test_not_text(self, path: Path) -> None:
        path.write_bytes(b'{"format": "\xff"}')
        with pytest.raises(ConfigError, match=r"^admin\.settings_file: .* is no file of prompt settings: .*utf-8"):
            start(path)


class TestPlace:
    def test_a_directory_in_its_place(self, path: Path) -> None:
        path.mkdir()
        with pytest.raises(ConfigError, match=rf"^admin\.settings_file: {re.escape(str(path))} is a directory or a device; give the path of a file$"):
            start(path)

    def test_no_directory_for_it(self, tmp_path: Path) -> None:
        path = tmp_path / "none" / "settings.json"
        text = (
            f"^admin.settings_file: {re.escape(str(path))}: there is no directory {re.escape(str(path.parent))}; create it, or choose another path$"
        )
        with pytest.raises(ConfigError, match=text):
            start(path)

    def test_a_directory_that_cannot_be_written(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda *args: False)  # file modes mean nothing to root, whom tests may run as
        with pytest.raises(ConfigError, match=r"^admin\.settings_file: .* cannot be written; choose a directory that this user can write$"):
            start(path)

    def test_a_file_that_cannot_be_read(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path.write_text("")

        def denied(self: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", denied)
        with pytest.raises(
            ConfigError, match=r"^admin\.settings_file: .* cannot be read \(Permission denied\); give a file that this user can read$"
        ):
            start(path)


class TestAllOrNothing:
    def changes_nothing(self, live: LiveSettings, path: Path, message: str) -> None:
        current, history = live.current, live.history
        content = path.read_bytes() if path.exists() else None
        for change in (lambda: live.update(max_generation_tokens=99), lambda: live.rollback(1)):
            with pytest.raises(SettingsFileError, match=message):
                change()
        assert live.current is current
        assert live.history is history
        assert (path.read_bytes() if path.exists() else None) == content

    def test_the_directory_goes_away(self, tmp_path: Path) -> None:
        directory = tmp_path / "kept"
        directory.mkdir()
        path = directory / "settings.json"
        live = start(path)
        live.update(max_generation_tokens=5)
        path.unlink()
        directory.rmdir()
        self.changes_nothing(live, path, r"settings\.json cannot be written \(No such file or directory\); nothing is changed$")
        directory.mkdir()
        assert live.update(max_generation_tokens=6).revision == 3
        assert start(path).current == live.current

    @pytest.mark.parametrize("call", ["fsync", "open", "replace"])
    def test_the_disk_is_full(self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        live = start(path)
        live.update(max_generation_tokens=5)

        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(*((Path, "replace") if call == "replace" else (os, call)), full)
            self.changes_nothing(live, path, r"cannot be written \(No space left on device\); nothing is changed$")
        assert left_in(tmp_path) == ["settings.json"]
        assert live.update(max_generation_tokens=6).revision == 3
        assert start(path).current == live.current

    def test_a_file_system_that_cannot_sync_a_directory(self, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        sync = os.fsync

        def files_only(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(22, "Invalid argument")
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", files_only)
        live = start(path)
        assert live.update(max_generation_tokens=5).revision == 2
        assert start(path).current == live.current
        assert f"{path}: the change may not survive a power cut (Invalid argument)" in caplog.messages

    def test_what_someone_else_wrote_is_not_overwritten(self, path: Path) -> None:
        live = start(path)
        live.update(max_generation_tokens=5)
        other = start(path)
        live.update(max_generation_tokens=6)
        self.changes_nothing(other, path, r"has been written by something else since this process read it; nothing is changed\. Restart")
        path.unlink()
        assert other.update(max_generation_tokens=7).revision == 3

    def test_a_process_that_dies_while_it_writes_leaves_the_old_file(self, path: Path, tmp_path: Path) -> None:
        """What a kill leaves behind: the next start reads the old file, the next change writes over what is beside it."""
        live = start(path)
        live.update(max_generation_tokens=5)
        (tmp_path / f".settings.json.{os.getpid()}").write_text("{")
        assert start(path).current == live.current
        live.update(max_generation_tokens=6)
        assert left_in(tmp_path) == ["settings.json"]
