from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pi0.errors import CheckpointError
from pi0.manifest import FileRecord, describe, load_manifest

NAME = "manifest.json"


def made(directory: Path) -> Path:
    (directory / "a/b").mkdir(parents=True)
    (directory / "a/b/c").write_bytes(b"content")
    (directory / "empty").touch()
    describe(directory, {"from": "here"}).save(directory, NAME)
    return directory


def test_survives_the_file(tmp_path: Path) -> None:
    manifest = load_manifest(made(tmp_path), NAME)
    assert manifest is not None
    assert manifest.source == {"from": "here"}
    empty = hashlib.sha256().hexdigest()
    assert manifest.files == {"a/b/c": FileRecord(7, hashlib.sha256(b"content").hexdigest()), "empty": FileRecord(0, empty)}
    assert manifest.total_bytes == 7
    assert manifest.problems(tmp_path) == []
    assert manifest.covers(tmp_path, NAME)


def test_names_what_is_missing_or_of_another_size(tmp_path: Path) -> None:
    manifest = load_manifest(made(tmp_path), NAME)
    assert manifest is not None
    (tmp_path / "empty").unlink()
    (tmp_path / "a/b/c").write_bytes(b"longer content")
    assert manifest.problems(tmp_path) == ["a/b/c has 14 bytes, expected 7", "empty is missing"]
    assert not manifest.covers(tmp_path, NAME)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"format": "another/1"}', '{"format": "tandem-manifest/1"}', '{"format": "tandem-manifest/1", "files": 3}']
)
def test_a_file_of_somebody_else_is_no_record(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    assert load_manifest(tmp_path, NAME) is None


def test_no_record(tmp_path: Path) -> None:
    assert load_manifest(tmp_path, NAME) is None
    assert load_manifest(tmp_path / "missing", NAME) is None


def test_links_are_not_described(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="link is neither a file nor a directory"):
        describe(tmp_path, {})
