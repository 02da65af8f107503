"""A live service on all three transports, clients that do it harm in every way a codec or a transport knows, and what must hold afterwards."""

from __future__ import annotations

import gc
import json
import logging
import random
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from websockets.frames import Frame, Opcode

from hosting.clients import Client, connect
from hosting.clients.errors import InferenceError
from hosting.clients.link import Link
from hosting.clients.quic import QuicLink
from hosting.clients.quic_channel import Channel, pump
from hosting.clients.unix_socket import UnixLink
from hosting.clients.websocket import WebSocketLink
from hosting.config import ActionTransportConfig
from hosting.policy import ObservationError
from hosting.protocol import jpeg, local_frame, msgpack_numpy
from hosting.protocol.messages import Message, MessageType
from hosting.protocol.msgpack_numpy import Dialect
from hosting.protocol.striping import split
from hosting.udp import UdpSocket
from tests.golden_data import GOLDEN
from tests.hosting.protocol.fuzz import mutations
from tests.hosting.transports.unix_support import framed, socket_directory
from tests.serving import HORIZON, RunningService, service_config, start, stubs
from tests.wire_objects import build

SECONDS = 20.0
"""No answer takes that long; what does is a hang."""

ANSWERS = frozenset(type for type in MessageType if type >= 0x10)

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class StartledError(Exception):
    """What the stub policy raises where a real one has a bug."""


class NosyPolicy:
    """An action policy that looks at every byte it is given: its answer has a digest of the observation, and ``padding`` zeros."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {
            "action_horizon": HORIZON,
            "image_specs": [{"path": ["images", "cam_high"], "target_shape": [3, 8, 8], "dtype": "uint8"}],
        }

    def infer(self, obs: Mapping[str, Any], *, seed: int | None = None) -> dict[str, Any]:
        if "state" not in obs:
            raise ObservationError("state: missing, expected an array of numbers")
        if not isinstance(obs["state"], np.ndarray):
            raise StartledError(type(obs["state"]).__name__)
        padding = np.zeros(obs["padding"] if isinstance(obs.get("padding"), int) else 0, np.uint8)
        return {"actions": np.full((HORIZON, 2), float(seed or 0)), "digest": digest(obs), "padding": padding, "policy_timing": {"infer_ms": 1.0}}


def digest(value: Any) -> str:
    """Of everything in an observation; the same for what comes over any transport."""
    hashed = sha256()
    _feed(value, hashed.update)
    return hashed.hexdigest()


def _feed(value: Any, update: Callable[[bytes], None]) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            update(repr(key).encode())
            _feed(value[key], update)
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(item, update)
    elif isinstance(value, np.ndarray):
        update(f"{value.dtype}{value.shape}".encode())
        update(value.tobytes())
    else:
        update(repr(value).encode(errors="surrogatepass"))


class Watcher(logging.Handler):
    """Collects what the log must not have: everything of level ERROR but the stub's own failures, which have to come with an error id."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.own = 0
        self._wrong: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        own = record.name == "hosting.failures" and record.exc_info is not None and record.exc_info[0] is StartledError
        if own and "error id" in record.getMessage():
            self.own += 1
        else:
            self._wrong.append(logging.Formatter("%(name)s %(message)s").format(record))

    def check(self) -> None:
        """Fails if there was something, which is forgotten then: it is one test's failure."""
        wrong, self._wrong = self._wrong, []
        assert not wrong, f"{len(wrong)} errors in the log, such as: {wrong[0][-1500:]}"


class Ground:
    """The service under attack, and three clients that were there before.

    Attributes:
        service: all three transports of an action slot.
        unix: the socket's path.
    """

    def __init__(self, service: RunningService, watcher: Watcher, stack: ExitStack) -> None:
        self.service = service
        self.watcher = watcher
        self._stack = stack
        host, port = service.addresses["action"].removeprefix("ws://").split(":")
        self.websocket = (host, int(port))
        host, port = service.addresses["action quic"].removeprefix("quic://").split(":")
        self.quic = (host, int(port))
        self.unix = Path(service.addresses["action unix"].removeprefix("unix://"))
        self.pin: str = service.service.status()["quic_certificate_sha256"]
        self._good = [self.client(transport) for transport in ("websocket", "quic", "unix")]
        self._threads = set(threading.enumerate())
        self.asked = 0
        self.check()

    def link(self, transport: str, path: str = "/") -> Link:
        """A new link of ``websocket``, ``quic`` or ``unix``; closed with the ground."""
        link: Link
        match transport:
            case "websocket":
                link = WebSocketLink(f"ws://{self.websocket[0]}:{self.websocket[1]}{path}")
            case "quic":
                link = QuicLink(*self.quic, pin=self.pin)
            case _:
                link = UnixLink(str(self.unix))
        self._stack.callback(link.close)
        return link

    def client(self, transport: str, **options: Any) -> Client:
        """A new client; closed with the ground."""
        url = self.service.addresses["action" if transport == "websocket" else f"action {transport}"]
        options = {"api_key": self.service.service.config.api_key, **options}
        return self._stack.enter_context(connect(url, pin=self.pin if transport == "quic" else None, **options))

    def check(self, *, in_a_rush: bool = False) -> None:
        """What must hold whatever came before. The good clients' connections are those from before the attack.

        Args:
            in_a_rush: the slot's queue may be full, and they have to ask again.
        """
        for client in self._good:
            self.asked += 1
            obs = observation(self.asked)
            reply = _asked_again(client, obs) if in_a_rush else client.infer(obs)
            assert reply["digest"] == digest(obs), f"{client} got a wrong answer"
        with urllib.request.urlopen(f"http://{self.websocket[0]}:{self.websocket[1]}/healthz", timeout=SECONDS) as answer:
            assert answer.status == 200
        gc.collect()  # a task whose exception nobody took says so when it goes
        self.watcher.check()
        dead = [thread.name for thread in self._threads if not thread.is_alive()]
        assert not dead, f"threads died: {dead}"


def _asked_again(client: Client, obs: dict[str, Any]) -> dict[str, Any]:
    deadline_s = time.monotonic() + SECONDS
    while True:
        try:
            return client.infer(obs)
        except InferenceError as error:
            if error.code != "overloaded" or time.monotonic() > deadline_s:
                raise


@contextmanager
def ground(**fields: Any) -> Iterator[Ground]:
    """A service with a :class:`NosyPolicy`, watched."""
    watcher = Watcher()
    with ExitStack() as stack:
        directory = stack.enter_context(socket_directory())
        transport = ActionTransportConfig(websocket_port=0, quic_port=0, unix_socket_path=str(directory / "a.sock"))
        config = service_config("action", action_transport=transport, quic_certificate_dir=str(directory / "tls"), **fields)
        logging.getLogger().addHandler(watcher)
        stack.callback(logging.getLogger().removeHandler, watcher)
        service = stack.enter_context(start(config, stubs(NosyPolicy())))
        yield Ground(service, watcher, stack)
    gc.collect()
    watcher.check()


def observation(number: int) -> dict[str, Any]:
    """A good observation, different for each ``number``."""
    state = np.full(14, number, np.float32)
    return {"state": state, "images": {"cam_high": np.full((3, 8, 8), number % 256, np.uint8)}, "prompt": f"fold towel {number}"}


# --- seeds -----------------------------------------------------------------------------------------------------------------------------------


def _golden() -> tuple[list[bytes], list[dict[str, Any]]]:
    index = json.loads((GOLDEN / "wire" / "wire.json").read_text())["objects"]
    frames = [(GOLDEN / "wire" / entry["file"]).read_bytes() for entry in index]
    observations = [build(entry["object"]) for entry in index if entry["name"].startswith("obs_")]
    return frames, observations


def _seeds() -> tuple[list[bytes], list[bytes]]:
    frames, observations = _golden()
    camera = jpeg.encode(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    good = observation(7)
    own = {"session_id": "robot-1", "seed": 3, "deadline_ms": 5e3, "request_id": "r-1", "obs_index": 4, "reset": True}
    with_jpeg = {"state": good["state"], "images": {"cam_high": camera, "cam_wrist": camera}, "prompt": "x"}
    framed_maps = [
        *({**obs, "state": obs.get("state", good["state"])} for obs in observations),
        good,
        {**good, **own},
        {**good, "endpoint": "infer", "sampling_params": {"seed": 1}, "mode": "action_only"},
        {"endpoint": "reset", "session_ids": ["a", "b"], "session_id": 5},
        {"endpoint": "reset", "session_ids": None},
        {"observation/exterior_image_0_left": np.zeros((4, 4, 3), np.uint8), "task": "x", "state": good["state"]},
    ]
    maps = [*framed_maps, with_jpeg, {"batch": [good, {**good, **own}, with_jpeg]}]
    packed = [msgpack_numpy.pack(value, dialect) for value in maps for dialect in Dialect]
    small = [frame for frame in frames if len(frame) < 50_000]
    local = [local_frame.encode(value, "aloha") for value in framed_maps]
    return [*packed, *packed, *small], local


MSGPACK_SEEDS, FRAME_SEEDS = _seeds()
FIELD_SEEDS = [b"", *(msgpack_numpy.pack(fields) for fields in ({"api_key": "k" * 20}, {"session_id": "s"}, {"session_ids": ["a", 1]}))]


def bodies(rng: random.Random, count: int) -> Iterator[tuple[int, bytes]]:
    """``count`` damaged requests: (type, body), now and then of a type that does not fit."""
    streams = {
        MessageType.INFER: mutations(MSGPACK_SEEDS, rng, count),
        MessageType.INFER_FRAME: mutations(FRAME_SEEDS, rng, count),
        MessageType.RESET: mutations(FIELD_SEEDS, rng, count),
        MessageType.METADATA: mutations(FIELD_SEEDS, rng, count),
    }
    kinds = (MessageType.INFER,) * 5 + (MessageType.INFER_FRAME,) * 3 + (MessageType.RESET, MessageType.METADATA)
    for _ in range(count):
        kind = rng.choice(kinds)
        body = next(streams[kind])
        yield (rng.randrange(256) if rng.random() < 0.05 else int(kind)), body


# --- attacks: each returns how many cases it made ------------------------------------------------------------------------------------------


def check_answer(answer: Message) -> None:
    """Fails unless it is an answer as the protocol has them, and for people one line without a traceback."""
    assert answer.type in ANSWERS, f"an answer of type 0x{answer.type:02x}"
    text = ""
    match answer.type:
        case MessageType.ERROR | MessageType.RESET_REPLY:
            text = bytes(answer.body).decode()
        case MessageType.FRAME_REPLY:
            local_frame.decode(answer.body)
        case MessageType.REPLY | MessageType.FAILURE | MessageType.METADATA_REPLY:
            value = msgpack_numpy.unpack(answer.body)
            if isinstance(value, dict) and value.get("type") == "error":
                text = value["message"]
    assert text.isprintable() and len(text) <= 2000 and "Traceback" not in text, text


def damaged_bodies(link: Link, rng: random.Random, count: int) -> int:
    """Well framed messages whose bodies are damaged, one after the other on one connection, which must stay."""
    for type, body in bodies(rng, count):
        if isinstance(link, WebSocketLink):
            type = MessageType.INFER
        check_answer(link.exchange(type, [body], SECONDS))
        assert not link.closed
    return count


def damaged_unix_streams(path: Path, rng: random.Random, count: int) -> int:
    """Each on a connection of its own; what comes back is whole answers until the end of the stream."""
    whole = [framed(type, body) for type, body in bodies(rng, 200)]
    seeds = [*whole, *(b"".join(rng.sample(whole, 3)) for _ in range(100))]
    for stream in mutations(seeds, rng, count):
        with socket.socket(socket.AF_UNIX) as attacker:
            attacker.settimeout(SECONDS)
            attacker.connect(str(path))
            received = _send_and_read(attacker, stream)
        while len(received) >= 4 and len(received) >= 4 + (length := int.from_bytes(received[:4], "big")):
            check_answer(Message(received[4], received[5 : 4 + length]))
            received = received[4 + length :]
    return count


def damaged_websocket_frames(address: tuple[str, int], rng: random.Random, count: int) -> int:
    """Each on a connection of its own: masks, opcodes, lengths, fragments, control frames, all of it damaged."""
    seeds = websocket_streams(rng)
    for stream in mutations(seeds, rng, count):
        with socket.create_connection(address, timeout=SECONDS) as attacker:
            attacker.sendall(UPGRADE)
            received = b""
            while b"\r\n\r\n" not in received:
                piece = attacker.recv(1 << 16)
                assert piece, "the upgrade was not answered"
                received += piece
            received += _send_and_read(attacker, stream)
        head, _, frames = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        check_websocket_frames(frames)
    return count


def websocket_streams(rng: random.Random) -> list[bytes]:
    """What a client may send after the upgrade: messages in every form, and closes."""

    def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, mask: bool = True) -> bytes:
        return Frame(Opcode(opcode), payload, fin).serialize(mask=mask)

    large = msgpack_numpy.pack({**observation(1), "image": np.zeros((160, 160, 3), np.uint8)})
    good = msgpack_numpy.pack(observation(1))
    text = frame(Opcode.TEXT, "grüße".encode())
    parts = [frame(Opcode.BINARY, good[:40], fin=False), frame(Opcode.PING, b"?"), frame(Opcode.CONT, good[40:80], fin=False)]
    fragments = b"".join([*parts, frame(Opcode.CONT, good[80:])])
    close = frame(Opcode.CLOSE, struct.pack("!H", 1000) + b"bye")
    control = frame(Opcode.PING, b"x" * 125) + frame(Opcode.PONG) + frame(Opcode.PONG, b"abcd")
    half_characters = frame(Opcode.TEXT, b"\xff\xfe") + frame(Opcode.TEXT, b"\xc3", fin=False) + frame(Opcode.CONT, b"\xbc")
    whole = [frame(Opcode.BINARY, good), frame(Opcode.BINARY, large), text, fragments, close, control, half_characters]
    whole += [frame(Opcode.BINARY, good, mask=False), frame(Opcode.CLOSE), frame(Opcode.CLOSE, b"\x03"), frame(Opcode.CLOSE, struct.pack("!H", 1005))]
    return whole + [b"".join(rng.sample(whole, 3)) for _ in range(40)]


def check_websocket_frames(received: bytes) -> None:
    """Fails unless these are whole, unmasked frames with answers in them (the last one may be cut off by the end of the connection)."""
    while len(received) >= 2:
        length, begin = received[1], 2
        if length >= 126:
            begin = 4 if length == 126 else 10
            length = int.from_bytes(received[2:begin], "big")
        payload, whole = received[begin : begin + length], len(received) >= begin + length
        match received[0]:
            case 0x82 if whole:
                check_answer(Message(MessageType.REPLY, payload))
            case 0x81 if whole:
                check_answer(Message(MessageType.ERROR, payload))
            case 0x88 if whole:
                assert length != 1, "half a close code"
            case first:
                assert first in (0x81, 0x82, 0x88, 0x89, 0x8A), f"a frame that begins with 0x{first:02x}"
        received = received[begin + length :]


def damaged_http(address: tuple[str, int], rng: random.Random, count: int) -> int:
    """Half upgrades, wrong versions, endless headers, bodies that nobody asked for, and noise; answered in HTTP or not at all."""
    seeds = [
        UPGRADE,
        UPGRADE.replace(b"GET / ", b"GET /v1/realtime/robot/openpi?profile=vllm&reply=array "),
        UPGRADE.replace(b"Version: 13", b"Version: 12"),
        UPGRADE.replace(b"\r\n\r\n", b"\r\nSec-WebSocket-Protocol: a, b\r\nOrigin: http://x\r\nAuthorization: Api-Key \xff\r\n\r\n"),
        UPGRADE.replace(b"\r\n\r\n", b"\r\nContent-Length: 12\r\n\r\nhello, world"),
        UPGRADE.replace(b"\r\n\r\n", b"\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(200)) + b"\r\n"),
        UPGRADE.replace(b"\r\n\r\n", b"\r\nX: " + b"y" * 9000 + b"\r\n\r\n"),
        UPGRADE.replace(b"Key: dGhlIHNhbXBsZSBub25jZQ==", b"Key: dGhl"),
        UPGRADE.replace(b"websocket", b"h2c"),
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 3,
        b"GET /ready HTTP/1.0\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    ]
    for request in mutations(seeds, rng, count):
        with socket.create_connection(address, timeout=SECONDS) as attacker:
            received = _send_and_read(attacker, request)
        assert received == b"" or received.startswith(b"HTTP/1.1 "), received[:100]
        assert b"Traceback" not in received
    return count


def damaged_quic_streams(link: QuicLink, rng: random.Random, count: int, *, at_once: int = 40) -> int:
    """Many streams at a time on one connection: damaged bodies of every type, parts with damaged headers, streams reset in the middle."""
    channel = link._channels[0]
    parts = [b"".join(part) for number in (1, 2, 5) for part in split(MessageType.INFER, [MSGPACK_SEEDS[0]], number, rng.randbytes(16))]
    damaged_parts, damaged = mutations(parts, rng, count), bodies(rng, count)
    for start_at in range(0, count, at_once):
        asked = []
        for _ in range(min(at_once, count - start_at)):
            chance = rng.random()
            type, body = (int(MessageType.PART), next(damaged_parts)) if chance < 0.25 else next(damaged)
            if chance > 0.8 and len(body) > 1:
                half = rng.randrange(1, len(body))
                stream = next(channel.connection.request(type, [body[:half], body[half:]]))
                channel.connection.cancel(stream)
            else:
                asked.append(channel.request(type, [body]))
        # A part that is taken as the first of several is answered only with the whole, which never comes.
        _settle(channel, asked)
        assert channel.lost is None, channel.lost
    return count


def damaged_quic_datagrams(ground: Ground, rng: random.Random, count: int) -> int:
    """Those of a whole conversation, damaged, cut, aimed at other connections. Until they are given up on, no new client may get in."""
    captured: list[bytes] = []
    send = UdpSocket.send

    def capture(udp: UdpSocket, datagrams: Sequence[bytes], *options: Any, **more: Any) -> None:
        captured.extend(bytes(datagram) for datagram in datagrams)
        send(udp, datagrams, *options, **more)

    with mock.patch.object(UdpSocket, "send", capture):
        link = ground.link("quic")
        check_answer(link.exchange(MessageType.INFER, [msgpack_numpy.pack({**observation(1), "image": np.zeros(20_000, np.uint8)})], SECONDS))
        link.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as attacker:
        attacker.connect(ground.quic)
        for number, datagram in enumerate(mutations(captured, rng, count)):
            if rng.random() < 0.1:
                datagram = datagram[:6] + rng.randbytes(8) + datagram[14:]
            attacker.send(datagram[:60_000])
            if number % 500 == 499:
                ground.check()
    return count


def _settle(channel: Channel, asked: Sequence[int]) -> None:
    """Wait for the answers, each of which must be one, and give up the streams on which the server rightly waits for other parts."""
    probe = channel.request(MessageType.METADATA, [b""])
    if not pump([channel], lambda: probe in channel.outcomes or channel.lost is not None, time.monotonic() + SECONDS):
        raise TimeoutError("no answer to METADATA")
    waiting = [stream for stream in asked if stream not in channel.outcomes]
    if waiting:
        pump([channel], lambda: all(stream in channel.outcomes for stream in waiting), time.monotonic() + 0.02)
    for stream in (*asked, probe):
        answer = channel.outcomes.pop(stream, None)
        if isinstance(answer, Message):
            check_answer(answer)
        elif answer is None:
            channel.connection.cancel(stream)


def _send_and_read(attacker: socket.socket, data: bytes) -> bytes:
    """Send, say that nothing more comes, and read to the end."""
    received = bytearray()
    try:
        attacker.sendall(data)
        attacker.shutdown(socket.SHUT_WR)
        while piece := attacker.recv(1 << 16):
            received += piece
    except TimeoutError:
        raise
    except OSError:
        pass  # refused and closed before all of it was sent; what had come by then counts
    return bytes(received)


@contextmanager
def keeping_at_most(limit_bytes: int) -> Iterator[None]:
    """Fails when this process holds that much more at the end; the allocator's slack and the attackers' own memory count."""
    before = resident_bytes()
    yield
    grown = resident_bytes() - before
    assert grown <= limit_bytes, f"{grown >> 20} MiB more than before"


def resident_bytes() -> int:
    """Memory of this process, the service's and the attackers' together."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
