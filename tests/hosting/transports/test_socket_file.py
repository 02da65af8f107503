import contextlib
import os
import socket
import stat

import pytest

from hosting.policy import ConfigError
from hosting.transports import socket_file
from hosting.transports.socket_file import SocketFile
from tests.hosting.transports.unix_support import socket_directory


@pytest.fixture
def path():
    with socket_directory() as directory:
        yield directory / "s"


@contextlib.contextmanager
def claimed(path, mode=0o600, backlog=10):
    file = SocketFile(path, mode=mode, backlog=backlog)
    try:
        yield file
    finally:
        file.remove()
        file.socket.close()


@contextlib.contextmanager
def umask(value):
    before = os.umask(value)
    try:
        yield
    finally:
        assert os.umask(before) == value, "somebody has left another umask behind"


def refused(path, message):
    with pytest.raises(ConfigError, match=message) as raised:
        SocketFile(path, mode=0o600, backlog=10)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_the_mode_is_exact_from_the_first_moment(path, mode, mask, monkeypatch):
    at_first = []
    bind = socket.socket.bind

    def watched(self, address):
        bind(self, address)
        at_first.append(stat.S_IMODE(os.stat(address).st_mode))

    monkeypatch.setattr(socket.socket, "bind", watched)
    with umask(mask), claimed(path, mode):
        assert at_first == [mode] and stat.S_IMODE(path.stat().st_mode) == mode


def test_it_listens_and_is_removed(path):
    with claimed(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert not path.exists()


def test_what_a_dead_server_left_is_replaced_and_logged(path, caplog):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()
    with claimed(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert [record.getMessage() for record in caplog.records] == [f"unix socket {path}: removed what a server that is gone had left"]


def test_a_live_server_is_left_alone(path):
    with claimed(path):
        refused(path, "is in use by another server")
        assert path.is_socket()


def test_a_server_whose_queue_is_full_is_alive(path):
    with claimed(path, backlog=0), socket.socket(socket.AF_UNIX) as queued, socket.socket(socket.AF_UNIX) as late:
        queued.connect(str(path))
        late.setblocking(False)
        with pytest.raises(BlockingIOError):
            late.connect(str(path))
        refused(path, "is in use by another server")


@pytest.mark.parametrize("kind", ["file", "directory", "link", "link to what a dead server left"])
def test_what_is_no_socket_is_never_removed(path, kind):
    other = path.with_name("other")
    other.write_text("precious")
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to(other)
        case _:
            path.symlink_to(path.with_name("dead"))
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(path.with_name("dead")))
    refused(path, "there is something that is no socket")
    assert path.exists() and other.read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("no/such/directory", "No such file or directory"), ("x" * 120, "AF_UNIX path too long"), ("a\0b", "embedded null")],
)
def test_names_that_cannot_be_had(path, name, reason):
    with pytest.raises(ConfigError, match=rf"cannot listen there \(.*{reason}.*\); choose another unix_socket_path$"):
        SocketFile(path.parent / name, mode=0o600, backlog=10)


def test_the_file_of_a_server_that_came_after_is_left(path):
    with claimed(path) as first:
        path.unlink()
        with claimed(path):
            first.remove()
            assert path.is_socket()


def test_removing_twice_removes_once(path, monkeypatch):
    monkeypatch.setattr(socket_file, "_identity", lambda path: (1, 1))  # the system may give the number to the next file
    with claimed(path) as file:
        file.remove()
        path.write_text("mine")
        file.remove()
    assert path.read_text() == "mine"


def test_a_process_that_leaves_at_once_takes_its_files_along(path):
    other = path.with_name("o")
    with claimed(path), claimed(other):
        other.unlink()
        other.write_text("somebody else's by now")
        socket_file.remove_all()
        assert not path.exists() and other.exists()
        socket_file.remove_all()
    other.unlink()
