"""Large frames: what the library's own server makes of them, and whose memory they lie in."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.server import ServerProtocol

from hosting.clients.websocket_frame import LARGE_BYTES, FrameMemory

NOISE = os.urandom(300_000)


def received(frame: bytes | memoryview) -> list[Frame]:
    """The frames that a server takes ``frame`` for."""
    protocol = ServerProtocol(state=OPEN, max_size=None)
    protocol.receive_data(bytes(frame))
    frames = [event for event in protocol.events_received() if isinstance(event, Frame)]
    assert protocol.parser_exc is None
    return frames


SIZES = st.sampled_from([0, 1, 2, 7, 8, 13, 4096, 70_001])


@given(st.lists(SIZES, max_size=5), st.sampled_from([LARGE_BYTES, LARGE_BYTES + 1, LARGE_BYTES + 7, 150_528]), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_server_gets_the_message(small: list[int], large: int, place: int) -> None:
    sizes = [*small[:place], large, *small[place:]]
    parts = [NOISE[index : index + size] for index, size in enumerate(sizes)]
    memory = FrameMemory()
    for _ in range(2):
        (frame,) = received(memory.frame(parts))
        assert (frame.opcode, frame.fin, bytes(frame.data)) == (Opcode.BINARY, True, b"".join(parts))


def test_parts_of_any_kind() -> None:
    image = np.frombuffer(NOISE, np.uint8, 224 * 224 * 3).reshape(224, 224, 3)
    parts: Sequence[bytes | bytearray | memoryview] = [bytearray(b"head"), image.data, memoryview(np.arange(5.0))]
    (frame,) = received(FrameMemory().frame(parts))
    assert bytes(frame.data) == b"head" + image.tobytes() + np.arange(5.0).tobytes()


def test_every_frame_has_a_mask_of_its_own() -> None:
    memory = FrameMemory()
    masks = {bytes(memory.frame([NOISE])[10:14]) for _ in range(20)}
    assert len(masks) > 15


@pytest.mark.parametrize(("size", "kept"), [(100_000, True), (1 << 20, True), (5 << 20, False)])
def test_memory_is_used_again_and_never_kept_for_a_giant(size: int, kept: bool) -> None:
    memory = FrameMemory()
    memory.frame([bytes(LARGE_BYTES)])
    first, second = memory.frame([bytes(size)]), memory.frame([bytes(size)])
    assert np.shares_memory(np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8)) is kept
    smaller = memory.frame([NOISE[:LARGE_BYTES]])
    assert bytes(received(smaller)[0].data) == NOISE[:LARGE_BYTES]
