from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi0.archive import extract_tar, safe_parts
from pi0.errors import CheckpointError
from tests.golden_data import CHECKPOINTS

TarContent = Callable[[tarfile.TarFile], None]


def file(archive: tarfile.TarFile, name: str, content: bytes = b"data") -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def special(name: str, kind: bytes, link: str = "") -> TarContent:
    def add(archive: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type = kind
        info.linkname = link
        archive.addfile(info)

    return add


def files(*names: str) -> TarContent:
    def add(archive: tarfile.TarFile) -> None:
        for name in names:
            file(archive, name)

    return add


def write_tar(path: Path, add: TarContent, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        add(archive)
    return path


def tree(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("wrapper", ["99", ".", "./99", "a name", "checkpoint"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_unpacks_a_checkpoint_without_its_wrapper(tmp_path: Path, wrapper: str, mode: str) -> None:
    golden = CHECKPOINTS / "pi05_orbax"
    tar = write_tar(tmp_path / "c.tar", lambda archive: archive.add(golden, wrapper), mode)
    extract_tar(tar, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(golden)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("params/_METADATA",), {"params/_METADATA"}),
        (("99/99/x",), {"99/x"}),
        (("99/x", "98/x"), {"99/x", "98/x"}),
        (("99/x", "README"), {"99/x", "README"}),
        (("README",), {"README"}),
        (("99/params/x", "99/params/y/z"), {"params/x", "params/y/z"}),
    ],
)
def test_strips_exactly_one_single_wrapper_that_is_not_params(tmp_path: Path, names: tuple[str, ...], expected: set[str]) -> None:
    extract_tar(write_tar(tmp_path / "c.tar", files(*names)), tmp_path / "out")
    assert set(tree(tmp_path / "out")) == expected


def test_takes_no_permissions_or_owners_from_the_archive(tmp_path: Path) -> None:
    def add(archive: tarfile.TarFile) -> None:
        for name, mode, kind in (("d", 0o000, tarfile.DIRTYPE), ("d/f", 0o6777, tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.mode, info.type, info.uid = mode, kind, 12345
            archive.addfile(info)

    extract_tar(write_tar(tmp_path / "c.tar", lambda archive: (add(archive), file(archive, "other"))[0]), tmp_path / "out")
    mode = (tmp_path / "out/d/f").stat().st_mode
    assert mode & 0o7111 == 0
    assert (tmp_path / "out/d/f").stat().st_uid == os.getuid()
    assert (tmp_path / "out/d").stat().st_mode & 0o700 == 0o700


HOSTILE: list[tuple[str, TarContent, str]] = [
    ("absolute", files("/etc/evil"), "member '/etc/evil' points outside"),
    ("parent", files("../evil"), "member '../evil' points outside"),
    ("parent inside", files("99/../../evil"), "member '99/../../evil' points outside"),
    ("parent of the same prefix", files("../out-evil/x"), "points outside"),
    ("backslashes", files("..\\evil"), "points outside"),
    ("symlink", special("99/link", tarfile.SYMTYPE, "/etc/passwd"), "member '99/link' is a symbolic link to '/etc/passwd'"),
    ("relative symlink", special("link", tarfile.SYMTYPE, "params"), "is a symbolic link"),
    ("hard link", special("link", tarfile.LNKTYPE, "/etc/passwd"), "is a hard link to '/etc/passwd'"),
    ("character device", special("tty", tarfile.CHRTYPE), "is a device"),
    ("block device", special("disk", tarfile.BLKTYPE), "is a device"),
    ("fifo", special("pipe", tarfile.FIFOTYPE), "is a FIFO"),
    ("contiguous or unknown", special("odd", b"Z"), "of the unknown type"),
    ("duplicate", files("a", "a"), "member 'a' is there twice"),
    ("duplicate in other words", files("a/b", "./a//b"), "is there twice"),
    (
        "file then directory",
        lambda archive: (file(archive, "a"), special("a", tarfile.DIRTYPE)(archive))[1],
        "once as a file and once as a directory",
    ),
    ("file as a parent", files("a", "a/b"), "once as a file and once as a directory"),
    ("directory then file", lambda archive: (special("a", tarfile.DIRTYPE)(archive), file(archive, "a"))[1], "is there twice"),
    ("the target itself", files("."), "is there twice"),
    ("name too long for the system", files("x" * 300), "cannot be"),
    ("empty", lambda archive: None, "contains no files"),
    ("only directories", special("99", tarfile.DIRTYPE), "contains no files"),
    ("too many members", files(*(f"f{i}" for i in range(60))), "more than 50 members"),
    ("too large", lambda archive: file(archive, "big", bytes(20_001)), "member 'big' takes the archive over the limit of 20.0 kB"),
    ("too large in sum", lambda archive: [file(archive, f"f{i}", bytes(6_000)) for i in range(4)] and None, "member 'f3' takes the archive over"),
]


@pytest.mark.parametrize(("add", "message"), [pytest.param(add, message, id=name) for name, add, message in HOSTILE])
def test_refuses_hostile_archives(tmp_path: Path, add: TarContent, message: str) -> None:
    work = tmp_path / "work"
    work.mkdir()
    tar = write_tar(tmp_path / "c.tar", add)
    with pytest.raises(CheckpointError) as raised:
        extract_tar(tar, work / "out", max_bytes=20_000, max_members=50)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [path.name for path in work.iterdir()] == ["out"], "something was written outside the target"
    assert not any(path.is_symlink() for path in work.rglob("*"))


def test_refuses_a_compression_bomb_by_the_size_it_says(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "bomb.tar.gz", lambda archive: file(archive, "zeros", bytes(5_000_000)), "w:gz")
    assert tar.stat().st_size < 10_000
    with pytest.raises(CheckpointError, match="over the limit"):
        extract_tar(tar, tmp_path / "out", max_bytes=1_000_000)


def test_refuses_sparse_files(tmp_path: Path) -> None:
    """A GNU sparse header lets a few bytes stand for a terabyte."""

    def add(archive: tarfile.TarFile) -> None:
        info = tarfile.TarInfo("hole")
        info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1", "GNU.sparse.size": "1000000"}
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))

    tar = tmp_path / "c.tar"
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive)
    with pytest.raises(CheckpointError, match="a sparse file"):
        extract_tar(tar, tmp_path / "out")


def test_not_a_tar(tmp_path: Path) -> None:
    (tmp_path / "page.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(CheckpointError, match=r"page\.tar is not a readable tar archive"):
        extract_tar(tmp_path / "page.tar", tmp_path / "out")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "c.tar").touch()
    with pytest.raises(CheckpointError, match="not a readable tar archive"):
        extract_tar(tmp_path / "c.tar", tmp_path / "out")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@given(cut=st.floats(0, 0.999))
def test_an_archive_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, mode: str, cut: float) -> None:
    """Also between two members, where tarfile itself sees nothing wrong."""
    tmp_path = tmp_path_factory.mktemp("cut")
    tar = write_tar(tmp_path / "c.tar", lambda archive: [file(archive, f"params/f{i}", os.urandom(700)) for i in range(4)] and None, mode)
    content = tar.read_bytes()
    if mode == "w":
        content = content[: 4 * (512 + 1024)]  # the padding behind the end-of-archive block may be missing
    tar.write_bytes(content[: int(len(content) * cut)])
    with pytest.raises(CheckpointError):
        extract_tar(tar, tmp_path / "out")


def test_garbage_between_members_is_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "c.tar", files("a", "b"))
    content = bytearray(tar.read_bytes())
    content[1024:1536] = b"garbage!" * 64
    tar.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or was cut short"):
        extract_tar(tar, tmp_path / "out")


def test_the_target_must_be_empty(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty"):
        extract_tar(write_tar(tmp_path / "c.tar", files("mine")), tmp_path / "out")
    assert (tmp_path / "out/mine").read_text() == "precious"


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None, str]] = []
    extract_tar(write_tar(tmp_path / "c.tar", files("a", "b")), tmp_path / "out", progress=lambda *call: seen.append(call))
    assert [label for _, _, label in seen] == ["unpacking", "unpacking"]
    assert seen[0][0] < seen[1][0] <= (seen[1][1] or 0)


@given(st.text(st.sampled_from("ab./\\\0")))
def test_safe_parts_never_leave_the_directory(name: str) -> None:
    base = Path("/base/dir")
    try:
        parts = safe_parts(name, "name")
    except CheckpointError:
        return
    joined = os.path.normpath(base.joinpath(*parts))
    assert joined == str(base) or joined.startswith(f"{base}/")
