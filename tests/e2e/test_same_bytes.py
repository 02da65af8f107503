"""The same observation gives the same reply on every transport and in process, byte for byte up to its timings (docs/ARCHITECTURE.md)."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from hosting.clients.link import Link
from hosting.clients.quic import QuicLink
from hosting.clients.unix_socket import UnixLink
from hosting.clients.websocket import WebSocketLink
from hosting.config import ActionTransportConfig
from hosting.conversation import Conversation
from hosting.endpoint import Endpoint
from hosting.policy import ObservationError
from hosting.protocol import local_frame, msgpack_numpy
from hosting.protocol.connection import Connection
from hosting.protocol.messages import Message, MessageType
from hosting.protocol.profiles import Profile
from hosting.routing import action_route
from hosting.scheduler import SlotWorker
from tests.serving import service_config, start, stubs

TYPED = Profile("openpi", errors="map")
COUNT = 10_000
DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "?")


class Mirror:
    """Gives back what it got, with actions that depend on it; refuses what says so."""

    metadata: dict[str, Any] = {"action_horizon": 4, "image_specs": []}  # noqa: RUF012 - never modified
    default_prompt = None

    def infer(self, obs: Any, *, seed: int | None = None) -> dict[str, Any]:
        if obs.get("refuse"):
            raise ObservationError(f"refuse: got {obs['refuse']!r}, expected nothing of the kind")
        return {**obs, "actions": np.random.default_rng(seed or 0).random((4, 2)), "server_timing": "replaced", "seen": sorted(obs)}


def observation(rng: random.Random) -> dict[str, Any]:
    """What every encoding can say: arrays, scalars, text, lists and maps."""
    bits = np.random.default_rng(rng.getrandbits(32))

    def array() -> Any:
        shape = tuple(rng.randrange(4) for _ in range(rng.randrange(4)))
        return bits.integers(0, 2, shape).astype(rng.choice(DTYPES)) if rng.random() < 0.9 else np.asfortranarray(bits.random((3, 5, 2)))

    def scalar() -> Any:
        return rng.choice((None, True, False, rng.randrange(-(1 << 60), 1 << 60), rng.uniform(-1e9, 1e9), "größer 🤖"[: rng.randrange(9)]))

    def value(depth: int) -> Any:
        kind = rng.random()
        if kind < 0.4:
            return array()
        if kind < 0.7 or depth == 3:
            return scalar()
        if kind < 0.85:
            return [scalar() for _ in range(rng.randrange(3))]
        return {f"key {i}": value(depth + 1) for i in range(rng.randrange(3))}

    obs = {name: value(0) for name in rng.sample(("state", "observation/image", "images", "prompt", "x y", "größe"), rng.randrange(1, 6))}
    if rng.random() < 0.3:
        obs["seed"] = rng.randrange(1 << 40)
    if rng.random() < 0.3:
        obs["request_id"] = rng.choice((rng.randrange(99), "r-1"))
    if rng.random() < 0.05:
        obs["refuse"] = "x" * rng.randrange(1, 9)
    return obs


def without_timing(message: Message) -> Any:
    """The reply, packed again without what may differ."""
    reply = msgpack_numpy.unpack(message.body) if message.type != MessageType.FRAME_REPLY else local_frame.decode(message.body).value
    reply.pop("server_timing", None)
    return reply


def in_order(value: Any) -> Any:
    return {key: in_order(value[key]) for key in sorted(value)} if isinstance(value, dict) else value


@pytest.fixture(scope="module")
def links() -> Iterator[dict[str, Link]]:
    with tempfile.TemporaryDirectory(prefix="tandem") as directory:
        transport = ActionTransportConfig(websocket_port=0, quic_port=0, unix_socket_path=f"{directory}/a.sock")
        config = service_config("action", action_transport=transport, quic_certificate_dir=directory)
        with start(config, stubs(action=Mirror())) as service:
            pin = httpx.get(service.http("action") + "/ready").json()["quic_certificate_sha256"]
            port = int(service.addresses["action quic"].rpartition(":")[2])
            links = {
                "websocket": WebSocketLink(service.addresses["action"] + "/?errors=map"),
                "quic": QuicLink("127.0.0.1", port, pin=pin),
                "unix": UnixLink(Path(directory) / "a.sock"),
            }
            yield links
            for link in links.values():
                link.close()


def test_the_same_on_all_transports_and_in_process(links: dict[str, Link]) -> None:
    rng = random.Random(3)
    observations = [observation(rng) for _ in range(COUNT)]
    packed = [msgpack_numpy.pack(obs) for obs in observations]

    async def in_process() -> list[Message]:
        worker = SlotWorker("action")
        endpoint = Endpoint("action", {"action": worker})
        endpoint.open(action_route(Mirror()), Mirror.metadata)
        conversation = Conversation(endpoint, Connection(TYPED))
        answers = [await conversation.answer(Message(MessageType.INFER, body)) for body in packed]
        worker.close()
        return answers

    expected = asyncio.run(in_process())
    refused = sum(answer.type == MessageType.FAILURE for answer in expected)
    assert 0.02 * COUNT < refused < 0.1 * COUNT
    assert len({bytes(link.hello.body) for link in links.values()}) == 1
    for name, link in links.items():
        for obs, body, answer in zip(observations, packed, expected, strict=True):
            came = link.exchange(MessageType.INFER, [body], 30.0)
            if answer.type == MessageType.FAILURE:
                # A WebSocket has no types; there the map itself says that it is an error.
                assert bytes(came.body) == bytes(answer.body), (name, obs)
            else:
                assert msgpack_numpy.pack(without_timing(came)) == msgpack_numpy.pack(without_timing(answer)), (name, obs)


def test_local_frames_say_the_same_as_msgpack(links: dict[str, Link]) -> None:
    rng = random.Random(4)
    for _ in range(COUNT // 5):
        obs = observation(rng)
        framed = links["unix"].exchange(MessageType.INFER_FRAME, local_frame.encode_parts(obs), 30.0)
        packed = links["unix"].exchange(MessageType.INFER, [msgpack_numpy.pack(obs)], 30.0)
        if packed.type == MessageType.FAILURE:
            assert framed == (MessageType.ERROR, msgpack_numpy.unpack(packed.body)["message"].encode())
        else:
            # A frame keeps arrays apart from everything else, so the order of keys is not kept.
            assert msgpack_numpy.pack(in_order(without_timing(framed))) == msgpack_numpy.pack(in_order(without_timing(packed))), obs


BAD = {
    "no map": msgpack_numpy.pack([1]),
    "not msgpack": b"\xc1",
    "cut short": msgpack_numpy.pack({"state": np.zeros(9)})[:-3],
    "nested": b"\x81\xa1a" * 500 + b"\x01",
    "object array": msgpack_numpy.pack({"state": np.zeros(1)}).replace(b"<f8", b"|O8"),
    "mode": msgpack_numpy.pack({"mode": "dance"}),
    "seed": msgpack_numpy.pack({"seed": -1}),
    "endpoint": msgpack_numpy.pack({"endpoint": "x"}),
    "policy": msgpack_numpy.pack({"refuse": "x", "request_id": 4}),
    "batch": msgpack_numpy.pack({"batch": [{"state": 1}, {"refuse": "y"}]}),
    "jpeg": msgpack_numpy.pack({"cam": b"\xff\xd8\xff\xe0broken"}),
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_a_bad_request_gives_the_same_error_text_on_all_transports(links: dict[str, Link], body: bytes) -> None:
    failures = {bytes(link.exchange(MessageType.INFER, [body], 30.0).body) for link in links.values()}
    assert len(failures) == 1
    failure = msgpack_numpy.unpack(failures.pop())
    assert failure["type"] == "error" and failure["message"] and failure["code"] != "internal"
