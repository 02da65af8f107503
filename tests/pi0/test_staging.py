from __future__ import annotations

import os
from pathlib import Path

import pytest

from pi0 import staging
from pi0.errors import CheckpointError
from pi0.manifest import describe

NAME = "manifest.json"


def fill(directory: Path, text: str) -> None:
    """A directory of ours: one file and the record of it."""
    directory.mkdir(parents=True)
    (directory / "weights").write_text(text)
    describe(directory, {}).save(directory, NAME)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.suffix != ".lock"}


@pytest.fixture(params=["atomic exchange", "two renames"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    return str(request.param)


@pytest.mark.usefixtures("either_way")
class TestPublish:
    def test_the_first_time(self, tmp_path: Path) -> None:
        target = tmp_path / "target"
        fill(staging.content(target), "new")
        staging.publish(target, NAME)
        assert (target / "weights").read_text() == "new"
        assert names(tmp_path) == {"target"}

    def test_replaces_what_is_ours(self, tmp_path: Path) -> None:
        target = tmp_path / "target"
        fill(target, "old")
        fill(staging.content(target), "new")
        staging.publish(target, NAME)
        assert (target / "weights").read_text() == "new"
        assert names(tmp_path) == {"target"}

    @pytest.mark.parametrize("foreign", ["file", "changed", "link", "no record"])
    def test_keeps_what_is_not_only_ours(self, tmp_path: Path, foreign: str) -> None:
        target = tmp_path / "target"
        fill(target, "old")
        match foreign:
            case "file":
                (target / "mine").write_text("precious")
            case "changed":
                (target / "weights").write_text("old, and then some")
            case "link":
                (target / "link").symlink_to("/etc")
            case _:
                (target / NAME).unlink()
        before = sorted(os.listdir(target))
        fill(staging.content(target), "new")
        staging.publish(target, NAME)
        (backup,) = tmp_path.glob("target.bak-*")
        assert sorted(os.listdir(backup)) == before
        assert (target / "weights").read_text() == "new"
        assert names(tmp_path) == {"target", backup.name}

    @pytest.mark.parametrize("failing", range(1, 6))
    def test_dying_at_any_rename_loses_nothing(self, tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """The process is gone from the given rename on; what it left must be the old or the new directory, now or after recovery."""
        target = tmp_path / "target"
        fill(target, "old")
        fill(staging.content(target), "new")
        real, count, dead = Path.rename, 0, False

        def rename(self: Path, to: Path) -> Path:
            nonlocal count, dead
            count += 1
            dead = dead or count == failing
            if dead:
                raise KeyboardInterrupt
            return real(self, to)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", rename)
            try:
                staging.publish(target, NAME)
            except KeyboardInterrupt:
                assert dead
        staging.recover(target, NAME)
        assert (target / "weights").read_text() in ("old", "new")
        assert not list(tmp_path.glob("*.bak-*"))
        staging.tidy(target, NAME)
        assert names(tmp_path) == {"target"}


def test_exchange_is_one_step_on_linux(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("b")
    assert staging.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").is_dir()
    assert (tmp_path / "a").read_text() == "b"


def test_exchange_raises_what_is_not_about_support(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError):
        staging.exchange(tmp_path / "a", tmp_path / "missing")


def test_tidy_leaves_a_directory_alone_that_another_process_works_on(tmp_path: Path) -> None:
    target = tmp_path / "target"
    fill(target, "old")
    with staging.locked(target):
        fill(staging.content(target), "half")
        staging.tidy(target, NAME)
        assert staging.content(target).exists()
    staging.tidy(target, NAME)
    assert names(tmp_path) == {"target"}


def test_targets_that_differ_after_the_last_dot_share_nothing(tmp_path: Path) -> None:
    with staging.locked(tmp_path / "x.v1"), staging.locked(tmp_path / "x.v2"):
        assert staging.partial(tmp_path / "x.v1") != staging.partial(tmp_path / "x.v2")


def test_too_little_space(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"GB free, but 1000000000\.0 GB are needed; free some space"):
        staging.require_space(tmp_path, 10**18)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write beside .*/file/target: .*; choose a directory you may write to"):
        staging.locked(tmp_path / "file/target").__enter__()
