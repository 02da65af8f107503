"""Whatever comes, the clients that were there before get their own right answers (``hostile.py`` has what comes, and what must hold).

Damaged cases that a test run makes, all from golden frames and whole conversations:

=======  =========================================================================================================
63,000   codecs: ``tests/hosting/protocol/test_{msgpack_reader,msgpack_numpy,local_frame}.py``
10,000   the Unix transport by itself: ``tests/hosting/transports/test_unix_socket.py``
6,000    QUIC datagrams: ``tests/hosting/transports/test_quic.py``
31,000   here, over live sockets: requests over each transport, WebSocket frames, HTTP, Unix streams, QUIC streams
=======  =========================================================================================================

``python -m benchmarks.fuzz`` makes a million.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from hosting.clients.quic import QuicLink
from hosting.clients.quic_channel import pump
from hosting.protocol import jpeg, msgpack_numpy
from hosting.protocol.connection import RESET_TEXT
from hosting.protocol.messages import Message, MessageType
from hosting.protocol.striping import MAX_UNFINISHED, split
from tests.e2e import hostile
from tests.e2e.hostile import SECONDS, Ground, check_answer, keeping_at_most, observation

TRANSPORTS = ("websocket", "quic", "unix")


KEPT_BYTES = 48 << 20
"""None of these tests was seen to leave more than 4 MB (a batch of 256 observations: 15 MB); 3,000 requests kept would be 100 MB."""
BOMB_BYTES = 160 << 20
"""Each of the two decoding threads keeps some 35 MB for the next image."""


@pytest.fixture(scope="module")
def shared_ground() -> Iterator[Ground]:
    with hostile.ground() as ground:
        yield ground


@pytest.fixture
def ground(shared_ground: Ground) -> Iterator[Ground]:
    with keeping_at_most(KEPT_BYTES):
        yield shared_ground
        shared_ground.check()


@pytest.fixture
def own_ground() -> Iterator[Ground]:
    with keeping_at_most(BOMB_BYTES), hostile.ground() as ground:
        yield ground
        ground.check()


@pytest.mark.parametrize("path", ["/", "/v1/realtime/robot/openpi", "/?profile=empty&reply=arrays&response_key=action&errors=map"])
def test_damaged_requests_over_websocket(ground: Ground, path: str) -> None:
    assert hostile.damaged_bodies(ground.link("websocket", path), random.Random(path), 3000) == 3000


@pytest.mark.parametrize("transport", ["unix", "quic"])
def test_damaged_requests(ground: Ground, transport: str) -> None:
    assert hostile.damaged_bodies(ground.link(transport), random.Random(transport), 6000) == 6000


def test_damaged_requests_from_several_clients_at_once(ground: Ground) -> None:
    links = [ground.link(transport) for transport in TRANSPORTS]
    with ThreadPoolExecutor(len(links)) as pool:
        futures = [pool.submit(hostile.damaged_bodies, link, random.Random(number), 150) for number, link in enumerate(links)]
        while not all(future.done() for future in futures):
            ground.check()
        assert sum(future.result() for future in futures) == 450


def test_damaged_websocket_frames(ground: Ground) -> None:
    assert hostile.damaged_websocket_frames(ground.websocket, random.Random(1), 2500) == 2500


def test_damaged_http(ground: Ground) -> None:
    assert hostile.damaged_http(ground.websocket, random.Random(2), 1500) == 1500


def test_damaged_unix_streams(ground: Ground) -> None:
    assert hostile.damaged_unix_streams(ground.unix, random.Random(3), 1500) == 1500


def test_damaged_quic_streams(ground: Ground) -> None:
    assert hostile.damaged_quic_streams(quic(ground), random.Random(4), 3000) == 3000


# --- what no mutation finds soon -----------------------------------------------------------------------------------------------------------

ODD: list[Any] = [
    *(None, True, 7, float("nan"), float("inf"), 2**64 - 1, -(2**63), 1e-9, 5e-324, 1e308),
    *("", "x" * 256, "x" * 257, "\0\n\x1b[31m", b"abc", b"\xff\xd8\xff", b"\xff\xd8\xff" + bytes(500)),
    *([], [[[]]], {}, {"a": {"b": 1}}, {b"a": 1}, {"seed": None}, [None, "a"]),
    *(np.zeros(3), np.arange(3), np.array(5), np.array(5.5), np.array([5]), np.zeros((0, 3)), np.array(["a", "b"]), np.array([b"a"])),
    *(np.array([True, False]), np.array(True), np.array(["2020-01-01"], "M8[D]")),
    *(np.float32(1.5), np.int64(7), np.bool_(True), np.float64("nan")),
]
KEYS = (
    *("endpoint", "session_id", "session_ids", "reset", "seed", "sampling_params", "deadline_ms", "request_id", "obs_index", "mode", "batch"),
    *("prompt", "task", "state", "images", "observation/exterior_image_0_left", "api_key", "type", b"bytes"),
)


VARIES = re.compile("(?<=internal error )[0-9a-f]{8}")
LATE = re.compile("deadline_ms: passed [0-9]+ ms before the action's turn came; nothing was computed")


@pytest.mark.parametrize("key", KEYS)
def test_odd_values_of_every_key_that_the_server_reads(ground: Ground, key: Any) -> None:
    """Each is served, or refused with a reason; none is an error of the server's."""
    links = [ground.link(transport) for transport in TRANSPORTS]
    for value in ODD:
        good = {**observation(1), "observation/exterior_image_0_left": np.zeros((2, 2, 3), np.uint8)}
        for request in ({**good, key: value}, {"batch": [good, {**good, key: value}]}, {"endpoint": "reset", key: value}, {key: value}):
            body = msgpack_numpy.pack(request)
            answers = [link.exchange(MessageType.INFER, [body], SECONDS) for link in links]
            for answer in answers:
                check_answer(answer)
            # Whether a deadline of some milliseconds passed is chance.
            texts = {VARIES.sub("…", LATE.sub("None", str(refusal(answer)))) for answer in answers}
            assert len(texts) == 1, "one request, different answers"
            assert key == "state" or not texts.pop().startswith("internal error"), "the stub has a fault only there"


def refusal(answer: Message) -> str | None:
    """The error's text, whatever its form."""
    if answer.type == MessageType.ERROR:
        text = bytes(answer.body).decode()
        return None if text == RESET_TEXT else text
    value = msgpack_numpy.unpack(answer.body) if answer.type in (MessageType.REPLY, MessageType.FAILURE) else {}
    return value["message"] if value.get("type") == "error" else None


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_jpeg_bombs(own_ground: Ground, transport: str) -> None:
    """A few hundred kB that would decode to 100 MB each: one fits the limit, a second one or a batch of them does not."""
    bomb = jpeg.encode(np.zeros((6000, 6000, 3), np.uint8))
    assert len(bomb) < 1_000_000
    good = observation(1)
    link = own_ground.link(transport)
    for request in ({**good, "a": bomb, "b": bomb}, {"batch": [{**good, "a": bomb}] * 20}):
        answer = link.exchange(MessageType.INFER, [msgpack_numpy.pack(request)], SECONDS)
        assert "the JPEG images decode to more than 134217728 bytes; resize them before sending" in str(refusal(answer))
    header = bomb.index(b"\xff\xc0") + 5
    for size in (b"\xff\xff\xff\xff", b"\x20\x01\x00\x01", b"\0\0\0\0"):
        lying = {**good, "a": bomb[:header] + size + bomb[header + 4 :]}
        assert refusal(link.exchange(MessageType.INFER, [msgpack_numpy.pack(lying)], SECONDS)) is not None


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_full_batch_of_large_observations(ground: Ground, transport: str) -> None:
    row = {**observation(1), "image": np.zeros((112, 112, 3), np.uint8)}
    reply = ground.link(transport).exchange(MessageType.INFER, [msgpack_numpy.pack({"batch": [row] * 256})], SECONDS)
    assert msgpack_numpy.unpack(reply.body)["actions"].shape == (256, hostile.HORIZON, 2)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_deadline_that_has_passed_before_it_began(ground: Ground, transport: str) -> None:
    link = ground.link(transport)
    for deadline_ms in (1e-9, 5e-324):
        answer = link.exchange(MessageType.INFER, [msgpack_numpy.pack({**observation(1), "deadline_ms": deadline_ms})], SECONDS)
        assert "nothing was computed" in str(refusal(answer))


def test_the_same_request_id_again_and_again(ground: Ground) -> None:
    channel = quic(ground)._channels[0]
    bodies = [msgpack_numpy.pack({**observation(number), "request_id": "the same", "session_id": number}) for number in range(20)]
    streams = [channel.request(MessageType.INFER, [body]) for body in bodies]
    assert pump([channel], lambda: all(stream in channel.outcomes for stream in streams), time.monotonic() + SECONDS)
    for number, stream in enumerate(streams):
        reply = msgpack_numpy.unpack(channel.outcomes[stream].body)  # type: ignore[union-attr]
        assert (reply["request_id"], reply["digest"]) == ("the same", hostile.digest(observation(number)))


def test_hundreds_of_streams_at_once(ground: Ground) -> None:
    """From eight connections, as many as flow control lets them open; they are answered, though it be with "overloaded" or "superseded"."""
    channels = [quic(ground)._channels[0] for _ in range(8)]
    body = msgpack_numpy.pack(observation(1))
    bodies = [body if number % 2 else msgpack_numpy.pack({**observation(1), "session_id": f"of {number}"}) for number in range(98)]
    streams = [(channel, channel.request(MessageType.INFER, [each])) for channel in channels for each in bodies]
    ground.check(in_a_rush=True)
    # Where loopback loses datagrams of such a flood, answers may be late.
    assert pump(channels, lambda: sum(len(channel.outcomes) for channel in channels) >= len(streams) // 2, time.monotonic() + SECONDS)
    answers = [channel.outcomes.get(stream) for channel, stream in streams]
    texts = {str(refusal(answer)) for answer in answers if isinstance(answer, Message)}
    assert all(text == "None" or text.startswith(("the action is overloaded: ", "superseded: ")) for text in texts), texts

    def open_unfinished_streams() -> None:
        for _ in range(1000):
            next(channels[0].connection.request(MessageType.INFER, [body[:10], body[10:]]))

    with pytest.raises(ValueError, match="stream limit"):  # the server's, however many it has answered
        open_unfinished_streams()
    for channel in channels:
        channel.close()
    ground.check(in_a_rush=True)


def test_transfers_that_are_never_finished(own_ground: Ground) -> None:
    """Their number is bounded; what is begun can still be finished; and they go with the connection."""
    links = [quic(own_ground) for _ in range(3)]
    body = msgpack_numpy.pack(observation(5))
    transfers = [list(split(MessageType.INFER, [body], 2, number.to_bytes(16, "big"))) for number in range(MAX_UNFINISHED + 10)]
    streams = []
    for number, (first, _) in enumerate(transfers):
        channel = links[number % 3]._channels[0]
        streams.append((channel, channel.request(MessageType.PART, first)))
    channels = [link._channels[0] for link in links]
    assert pump(channels, lambda: sum(len(channel.outcomes) for channel in channels) == 10, time.monotonic() + SECONDS)
    for outcome in [outcome for channel in channels for outcome in channel.outcomes.values()]:
        assert isinstance(outcome, Message) and str(refusal(outcome)).startswith("too many unfinished striped messages at once; ")
    channel, stream = next((channel, stream) for channel, stream in streams if stream not in channel.outcomes)
    channel.request(MessageType.PART, transfers[streams.index((channel, stream))][1])
    assert pump([channel], lambda: stream in channel.outcomes, time.monotonic() + SECONDS)
    assert msgpack_numpy.unpack(channel.outcomes[stream].body)["digest"] == hostile.digest(observation(5))  # type: ignore[union-attr]
    for link in links:
        link.close()
    striped = QuicLink(*own_ground.quic, pin=own_ground.pin, connections=2)
    reply = striped.exchange(MessageType.INFER, [msgpack_numpy.pack({**observation(3), "image": np.zeros((200, 200, 3), np.uint8)})], SECONDS)
    assert refusal(reply) is None
    striped.close()


def quic(ground: Ground) -> QuicLink:
    link = ground.link("quic")
    assert isinstance(link, QuicLink)
    return link
