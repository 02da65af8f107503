import gc
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hosting.protocol import framing
from hosting.protocol.framing import MessageReader, header
from hosting.protocol.messages import MessageType
from pi0.errors import MessageError

LIMIT = 8 << 20
NOISE = random.Random(0).randbytes(6 << 20)


def framed(type: int, body: bytes) -> bytes:
    return header(type, len(body)) + body


def feed(reader: MessageReader, data: bytes, sizes: list[int]) -> list[tuple[int, bytes]]:
    """What the reader makes of ``data`` that comes in reads of at most these sizes, over and over."""
    messages, position, turn = [], 0, 0
    while position < len(data):
        buffer = reader.get_buffer()
        assert len(buffer)
        count = min(len(buffer), sizes[turn % len(sizes)], len(data) - position)
        buffer[:count] = data[position : position + count]
        reader.received(count)
        position, turn = position + count, turn + 1
        while (message := reader.next()) is not None:
            messages.append((message.type, bytes(message.body)))
    return messages


@pytest.mark.parametrize(
    ("type", "body", "expected"),
    [
        (MessageType.METADATA, b"", "00000001 01"),
        (MessageType.RESET, b"", "00000001 03"),
        (MessageType.ERROR, "é".encode(), "00000003 13 c3a9"),
        (MessageType.INFER_FRAME, bytes(255), "00000100 02" + "00" * 255),
    ],
)
def test_bytes_on_the_wire(type, body, expected):
    assert framed(type, body) == bytes.fromhex(expected)
    assert feed(MessageReader(LIMIT), bytes.fromhex(expected), [LIMIT]) == [(type, body)]


BODIES = st.one_of(st.binary(max_size=40), st.sampled_from([16_379, 16_384, 70_000, 1_500_000]))
READS = st.sampled_from([1, 3, 5, 6, 100, 16_389, 100_000, LIMIT])


@given(messages=st.lists(st.tuples(st.integers(0, 255), BODIES), max_size=8), sizes=st.lists(READS, min_size=1, max_size=6))
@settings(max_examples=120, deadline=None)
def test_any_chunking_gives_the_same_messages(messages, sizes):
    sent = [(type, body if isinstance(body, bytes) else NOISE[type : type + body]) for type, body in messages]
    data = b"".join(framed(type, body) for type, body in sent)
    if len(data) > 200_000:
        sizes = [*sizes, LIMIT]
    reader = MessageReader(LIMIT)
    assert feed(reader, data, sizes) == sent
    assert reader.pending == 0


def test_messages_that_come_in_one_read_are_views_of_it():
    reader = MessageReader(LIMIT)
    data = framed(1, b"one") + framed(2, b"") + framed(3, b"three")[:-1]
    buffer = reader.get_buffer()
    buffer[: len(data)] = data
    reader.received(len(data))
    first, second = reader.next(), reader.next()
    assert (first.type, bytes(first.body)) == (1, b"one") and (second.type, bytes(second.body)) == (2, b"")
    assert reader.next() is None and reader.pending == 9
    assert first.body.obj is buffer.obj


def test_an_observation_is_received_into_the_buffer_that_is_handed_out():
    reader = MessageReader(LIMIT)
    data = framed(2, NOISE[:450_000])
    feed(reader, data, [LIMIT])  # from now on that size is expected
    buffer = reader.get_buffer()
    buffer[: len(data)] = data
    reader.received(len(data))
    body = reader.next().body
    assert body.obj is buffer.obj and body == NOISE[:450_000]


def test_memory_is_reserved_as_bytes_arrive_not_on_the_word_of_a_length():
    reader = MessageReader(LIMIT)
    feed(reader, header(2, LIMIT), [5])
    arrived, reads = 5, 0
    while reader.next() is None:
        room = len(reader.get_buffer())
        assert arrived + room <= max(4 * arrived, 1 << 20)
        reader.received(room)
        arrived, reads = arrived + room, reads + 1
    assert arrived == LIMIT + 5
    assert reads <= 5, "each growth copies what came before"


def test_a_reader_that_waits_between_messages_holds_nothing():
    reader = MessageReader(LIMIT)
    feed(reader, framed(2, NOISE[:450_000]), [LIMIT])
    assert reader._buffer is None


def test_buffers_come_back_when_nothing_refers_to_their_messages_any_more():
    framing._spares.clear()
    reader = MessageReader(LIMIT)
    feed(reader, framed(2, NOISE[:450_000]), [LIMIT])
    reader.get_buffer()[:450_005] = framed(2, NOISE[:450_000])
    reader.received(450_005)
    array = np.frombuffer(reader.next().body, np.uint8)[1000:]
    assert len(framing._spares) == 0, "an array made of the message holds the buffer"
    other = MessageReader(LIMIT)
    feed(other, framed(2, bytes(450_000)), [LIMIT])
    assert array.tobytes() == NOISE[1000:450_000], "another message has overwritten it"
    del array
    gc.collect()
    assert framing._spares


def test_spare_buffers_are_few():
    readers = [MessageReader(LIMIT) for _ in range(30)]
    for reader in readers:
        feed(reader, header(2, 450_000) + bytes(20_000), [LIMIT])
    del reader, readers
    assert len(framing._spares) == framing._SPARES


@pytest.mark.parametrize("body_bytes", [LIMIT, LIMIT + 1, (1 << 32) - 2])
def test_limit(body_bytes):
    reader = MessageReader(LIMIT)
    reader.get_buffer()[:5] = struct.pack("!IB", body_bytes + 1, 2)
    reader.received(5)
    if body_bytes <= LIMIT:
        assert reader.next() is None
        return
    for _ in range(2):
        with pytest.raises(MessageError, match=rf"^the message has {body_bytes} bytes, expected at most {LIMIT} \(max_message_bytes\)$"):
            reader.next()


def test_length_0_is_seen_before_a_type_comes():
    with pytest.raises(MessageError, match=r"^a message of length 0 came, expected at least 1"):
        feed(MessageReader(LIMIT), framed(1, b"") + bytes(4), [LIMIT])


def test_a_body_that_a_length_cannot_say():
    assert header(2, (1 << 32) - 2) == b"\xff\xff\xff\xff\x02"
    with pytest.raises(MessageError, match=r"^the message has 4294967295 bytes, expected at most 4294967294"):
        header(2, (1 << 32) - 1)
