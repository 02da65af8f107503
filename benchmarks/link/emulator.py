"""Two network namespaces joined by an emulated link of our own: delay, rate, a drop-tail queue and random loss, in both directions.

For measuring where the kernel has no netem. Needs Linux, the right to make network namespaces (root), /dev/net/tun and a C compiler.

    with emulated_link(rtt_ms=20, loss_percent=0.5, rate_mbit=100) as link:
        with link.b.entered():
            ...  # sockets made by this thread, and processes started by it, are on side b, at link.b.address
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("emulator.c")
_CLONE_NEWNET = 0x40000000
_UNAVAILABLE = 2
_SYSCTLS = Path("/proc/sys")


class LinkUnavailableError(Exception):
    """This machine, or this user, cannot have an emulated link; the message says why."""


@dataclass(frozen=True)
class Traffic:
    """What one direction has carried.

    Attributes:
        packets: IP packets that were sent.
        bytes: of these, headers included.
        dropped: those that found the queue full.
        lost: those that were lost on their way.
        delivered: those that arrived; what is left is still on its way.
    """

    packets: int
    bytes: int
    dropped: int
    lost: int
    delivered: int

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(*(new - old for new, old in zip(astuple(self), astuple(earlier), strict=True)))


@dataclass(frozen=True)
class Side:
    """One end of a link.

    Attributes:
        address: its IPv4 address.
        namespace: its network namespace, as a file; good while the link is.
    """

    address: str
    namespace: Path

    def enter(self) -> None:
        """Move the calling thread here for good."""
        _set_namespace(self.namespace)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is here meanwhile."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            self.enter()
            try:
                yield
            finally:
                _set_namespace(Path(f"/proc/self/fd/{before}"))
        finally:
            os.close(before)

    def sysctl(self, name: str, value: str | None = None) -> str:
        """A setting of this side such as ``net.ipv4.tcp_congestion_control``, after setting it to ``value`` if one is given.

        Raises:
            OSError: the kernel has no such setting, or does not take the value.
        """
        file = _SYSCTLS / name.replace(".", "/")
        with self.entered():
            if value is not None:
                file.write_text(value)
            return file.read_text().strip()


class EmulatedLink:
    """A link that is up: sides ``a`` and ``b``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        said = self._read_line().split()
        if said[:1] != ["ready"]:
            raise RuntimeError(f"the link emulator said {' '.join(said)!r}, expected 'ready' and two file descriptors")
        namespaces = [Path(f"/proc/{process.pid}/fd/{number}") for number in said[1:]]
        self.a, self.b = Side("10.9.0.1", namespaces[0]), Side("10.9.0.2", namespaces[1])

    def traffic(self) -> tuple[Traffic, Traffic]:
        """What has been carried so far, from ``a`` to ``b`` and back."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        numbers = [int(number) for number in self._read_line().split()]
        return Traffic(*numbers[:5]), Traffic(*numbers[5:])

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return line
        assert self._process.stderr is not None
        reason = self._process.stderr.read().strip()
        raise (LinkUnavailableError if self._process.wait() == _UNAVAILABLE else RuntimeError)(reason or "the link emulator ended without a word")


@contextmanager
def emulated_link(*, rtt_ms: float, loss_percent: float, rate_mbit: float, queue_packets: int = 1000, seed: int = 1) -> Iterator[EmulatedLink]:
    """A link for as long as the context lasts; its namespaces end with the last process in them, however this one ends.

    Args:
        rtt_ms: fixed delay, half of it in each direction; what the rate and the queue add comes on top.
        loss_percent: share of packets lost, independently of each other and in each direction.
        rate_mbit: 10⁶ bits of IP packets a second, in each direction.
        queue_packets: how many packets wait for their turn, in each direction; those beyond are dropped.
        seed: which packets are lost: the same seed loses the same ones, counted from the first.

    Raises:
        LinkUnavailableError: see there.
    """
    with tempfile.TemporaryDirectory(prefix="tandem-link-") as directory:
        program = _build(Path(directory))
        arguments = [f"{rtt_ms * 500}", f"{loss_percent}", f"{rate_mbit}", f"{queue_packets}", f"{seed}"]
        pipe = subprocess.PIPE
        with subprocess.Popen([program, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
            # Leaving closes its input, which ends it.
            yield EmulatedLink(process)


def _build(directory: Path) -> Path:
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise LinkUnavailableError("there is no C compiler (looked for $CC, cc, gcc and clang)")
    program = directory / "emulator"
    built = subprocess.run([compiler, "-O2", "-o", str(program), str(_SOURCE)], capture_output=True, text=True, check=False)
    if built.returncode:
        raise RuntimeError(f"{compiler} cannot build {_SOURCE.name}:\n{built.stderr}")
    return program


def _set_namespace(namespace: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(namespace, os.O_RDONLY)
    try:
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
    finally:
        os.close(descriptor)
