"""Extracts a checkpoint archive that may be hostile: regular files and directories only, all inside the target, within bounds."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import IO

from pi0.errors import CheckpointError
from pi0.progress import Progress, no_progress, readable_size

MAX_BYTES = 64 * 10**9
"""Most bytes that an archive may unpack to by default: several times the largest model of the family."""

MAX_MEMBERS = 100_000
"""Most members that an archive may have by default; an Orbax tree has hundreds of files."""

_BLOCK = 1 << 20


def extract_tar(
    tar_path: Path, target: Path, *, max_bytes: int = MAX_BYTES, max_members: int = MAX_MEMBERS, progress: Progress = no_progress
) -> None:
    """Unpacks ``tar_path`` (plain or compressed with gzip, bzip2 or xz) into ``target``, which must be missing or empty.

    When everything lies in one directory not called ``params``, that wrapper is left out. Owners, times and permissions of
    the archive are not taken over. Memory use does not depend on the members' sizes.

    Raises:
        CheckpointError: the archive is damaged, empty or unsafe (names the member), or exceeds a bound. ``target`` is then incomplete.
    """
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty; an archive is unpacked into a new directory only")
    total = tar_path.stat().st_size
    members = unpacked = files = 0
    try:
        with tarfile.open(tar_path, "r:*") as archive:
            for member in archive:
                members += 1
                where = f"{tar_path.name}: member {member.name!r}"
                if members > max_members:
                    raise CheckpointError(f"{tar_path.name} has more than {max_members} members; refused")
                destination = target.joinpath(*safe_parts(member.name, where))
                if member.isdir():
                    _make_directory(destination, where)
                    continue
                if not member.isreg() or member.issparse():
                    raise CheckpointError(f"{where} is {_kind(member)}; only regular files and directories are accepted")
                unpacked += member.size
                if unpacked > max_bytes:
                    raise CheckpointError(f"{where} takes the archive over the limit of {readable_size(max_bytes)} unpacked; refused")
                stream = archive.extractfile(member)
                assert stream is not None  # it is a regular file
                _write(stream, destination, member.size, where)
                files += 1
                progress(min(archive.offset, total), total, "unpacking")
            _require_end_of_archive(archive, tar_path, max_bytes)
    except tarfile.TarError as error:
        reason = str(error).partition("\n")[0].rstrip(":")  # one line for each compression that was tried follows
        raise CheckpointError(f"{tar_path.name} is not a readable tar archive ({reason}); it is damaged or was cut short") from error
    except (EOFError, ValueError) as error:
        raise CheckpointError(f"{tar_path.name} is damaged: {error}") from error
    if not files:
        raise CheckpointError(f"{tar_path.name} contains no files")
    _strip_wrapper(target)


def safe_parts(name: str, where: str) -> tuple[str, ...]:
    """The components of the relative path ``name``; ``where`` names it in errors.

    Raises:
        CheckpointError: it is absolute, or has a component that could leave the directory it is joined to.
    """
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"{where} points outside the target directory; refused")
    return parts


def _make_directory(path: Path, where: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise CheckpointError(f"{where} is there twice, once as a file and once as a directory") from error
    except OSError as error:
        raise CheckpointError(f"{where} cannot be written: {error.strerror}") from error


def _write(stream: IO[bytes], destination: Path, size: int, where: str) -> None:
    _make_directory(destination.parent, where)
    written = 0
    try:
        with destination.open("xb") as out:
            while block := stream.read(_BLOCK):
                out.write(block)
                written += len(block)
    except (FileExistsError, IsADirectoryError) as error:
        raise CheckpointError(f"{where} is there twice") from error
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read or written: {error.strerror or error}") from error
    if written != size:
        raise CheckpointError(f"{where} has {written} bytes, expected {size}: the archive was cut short")


def _require_end_of_archive(archive: tarfile.TarFile, tar_path: Path, max_bytes: int) -> None:
    # tarfile takes a cut or garbage between two members for the end, so look for the block of zeros that really ends an archive.
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise CheckpointError(f"{tar_path.name} is damaged or was cut short: it does not end with an end-of-archive block")
    # Decompressors check their own sum, and raise, only at the very end.
    while archive.fileobj.read(_BLOCK):
        if archive.fileobj.tell() - archive.offset > max_bytes:
            raise CheckpointError(f"{tar_path.name} goes on for more than {readable_size(max_bytes)} after its last member; refused")


def _strip_wrapper(target: Path) -> None:
    entries = list(target.iterdir())
    if len(entries) != 1 or not entries[0].is_dir() or entries[0].name == "params":
        return
    # Under a name of its own first: the wrapper may hold an entry of the same name.
    wrapper = Path(tempfile.mkdtemp(dir=target)) / "wrapper"
    entries[0].rename(wrapper)
    for entry in wrapper.iterdir():
        entry.rename(target / entry.name)
    shutil.rmtree(wrapper.parent)


def _kind(member: tarfile.TarInfo) -> str:
    if member.issym():
        return f"a symbolic link to {member.linkname!r}"
    if member.islnk():
        return f"a hard link to {member.linkname!r}"
    if member.isfifo():
        return "a FIFO"
    if member.isdev():
        return "a device"
    if member.issparse():
        return "a sparse file"
    return f"of the unknown type {member.type!r}"
