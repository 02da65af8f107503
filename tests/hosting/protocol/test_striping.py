"""Messages cut into parts and put together again, and every way in which parts can disagree."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosting.protocol.messages import Message, MessageType
from hosting.protocol.striping import MAX_PARTS, MAX_UNFINISHED, PART_HEADER_BYTES, Assembler, split
from pi0.errors import MessageError

ID = bytes(range(16))


def parts(body: bytes, count: int, *, transfer_id: bytes = ID, type: int = MessageType.INFER) -> list[bytes]:
    return [b"".join(part) for part in split(type, [body], count, transfer_id)]


def header(index: int, count: int, total: int, *, type: int = MessageType.INFER, transfer_id: bytes = ID) -> bytes:
    return transfer_id + index.to_bytes(2, "big") + count.to_bytes(2, "big") + bytes((type,)) + total.to_bytes(8, "big")


def assembler(limit: int = 1 << 20) -> Assembler[str]:
    return Assembler(max_message_bytes=limit, timeout_s=30.0)


@given(st.lists(st.binary(max_size=50), max_size=8), st.integers(1, MAX_PARTS), st.randoms(use_true_random=False))
def test_parts_in_any_order_give_the_message(body, count, order):
    whole = b"".join(body)
    pieces = [b"".join(part) for part in split(MessageType.INFER_FRAME, body, count, ID)]
    assert len(pieces) == count
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    numbered = list(enumerate(pieces))
    order.shuffle(numbered)
    made = assembler()
    for position, (index, piece) in enumerate(numbered):
        taken = made.add(piece, f"stream {index}", now=0.0)
        assert taken.index == index
        assert (taken.whole is None) == (position < count - 1)
    assert taken.whole == ("stream 0", Message(MessageType.INFER_FRAME, whole))
    assert made.held_bytes == 0 and made.next_deadline_s() is None


def test_the_header_on_the_wire():
    (first, second) = parts(b"abcde", 2)
    assert first == header(0, 2, 5) + b"ab"
    assert second == header(1, 2, 5) + b"cde"


def test_arrays_of_any_kind_are_cut_without_copies():
    import numpy as np

    array = np.arange(10, dtype=np.float32)
    pieces = list(split(MessageType.INFER, [b"x", memoryview(array)], 3, ID))
    assert b"".join(b"".join(piece[1:]) for piece in pieces) == b"x" + array.tobytes()
    assert np.shares_memory(np.frombuffer(pieces[2][-1], np.uint8), array)


def test_transfers_of_several_clients_do_not_mix():
    made = assembler()
    bodies = {os.urandom(16): os.urandom(1000) for _ in range(20)}
    queue = [piece for transfer_id, body in bodies.items() for piece in parts(body, 4, transfer_id=transfer_id)]
    random.Random(1).shuffle(queue)
    wholes = [taken.whole for piece in queue if (taken := made.add(piece, piece[:16].hex(), now=0.0)).whole]
    assert {bytes.fromhex(reply): message.body for reply, message in wholes} == bodies


@pytest.mark.parametrize(
    ("piece", "words"),
    [
        (b"", "a part has 0 bytes; expected a header of 29 bytes"),
        (bytes(PART_HEADER_BYTES - 1), "a part has 28 bytes"),
        (header(0, 0, 5), "number 0 of 0; expected 1 to 64 parts"),
        (header(2, 2, 5), "number 2 of 2"),
        (header(0, MAX_PARTS + 1, 5), "number 0 of 65"),
        (header(0, 2, 5, type=MessageType.PART), "a part carries a part"),
        (header(0, 2, (1 << 20) + 1), "the message has 1048577 bytes; the server takes at most 1048576"),
        (header(0, 2, 5) + b"sixsix", "the parts have 6 bytes together; they announce 5"),
        (header(0, 1, 5) + b"four", "the parts have 4 bytes together; they announce 5"),
    ],
)
def test_parts_that_are_wrong_in_themselves(piece, words):
    made = assembler()
    with pytest.raises(MessageError) as caught:
        made.add(piece, "stream", now=0.0)
    assert words in str(caught.value)
    assert made.held_bytes == 0 and made.next_deadline_s() is None


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (header(1, 3, 10) + b"12345", "part 1 disagrees"),
        (header(1, 2, 11) + b"12345", "part 1 disagrees"),
        (header(1, 2, 10, type=MessageType.INFER_FRAME) + b"12345", "part 1 disagrees"),
        (header(0, 2, 10) + b"12345", "part 0 came twice"),
        (header(1, 2, 10) + b"1234", "the parts have 9 bytes together; they announce 10"),
        (header(1, 2, 10) + b"123456", "the parts have 11 bytes together; they announce 10"),
    ],
)
def test_parts_that_do_not_fit_together(second, words):
    made = assembler()
    made.add(header(0, 2, 10) + b"12345", "stream 0", now=0.0)
    with pytest.raises(MessageError) as caught:
        made.add(second, "stream 1", now=0.0)
    assert words in str(caught.value)
    assert made.add(header(1, 2, 10) + b"67890", "stream 1", now=1.0).whole == ("stream 0", Message(MessageType.INFER, b"1234567890"))


def test_what_is_held_is_bounded_by_what_arrived():
    made = assembler(limit=1000)
    for number in range(4):
        made.add(header(0, 2, 1000, transfer_id=bytes([number]) * 16) + bytes(500), f"stream {number}", now=0.0)
    assert made.held_bytes == 2000
    with pytest.raises(MessageError, match="too many unfinished"):
        made.add(header(0, 2, 1000, transfer_id=b"x" * 16) + b"1", "stream", now=0.0)
    assert made.held_bytes == 2000


def test_empty_parts_are_bounded_in_number():
    made = assembler()
    for number in range(MAX_UNFINISHED):
        made.add(header(0, 2, 10, transfer_id=number.to_bytes(16, "big")), "stream", now=0.0)
    with pytest.raises(MessageError, match="too many unfinished"):
        made.add(header(0, 2, 10), "stream", now=0.0)
    last = made.add(header(1, 2, 10, transfer_id=bytes(16)) + b"0123456789", "other stream", now=0.0)
    assert last.whole == ("stream", Message(MessageType.INFER, b"0123456789")), "what is begun can be finished"


def test_a_transfer_whose_parts_stop_coming_is_given_up():
    made = assembler()
    made.add(header(0, 3, 9) + b"123", "stream 0", now=0.0)
    made.add(header(1, 3, 9) + b"456", "stream 1", now=20.0)
    made.add(header(1, 2, 9, transfer_id=b"x" * 16) + b"456", "stream of another", now=25.0)
    assert made.next_deadline_s() == 50.0
    assert made.expire(49.0) == []
    assert made.expire(50.0) == [("stream 0", "only 2 of 3 parts came within 30 s; send the request again")]
    assert made.expire(60.0) == [], "nobody waits on the stream of a part that is not the first"
    assert made.held_bytes == 0


def test_a_transfer_that_nobody_waits_for_is_dropped():
    made = assembler()
    made.add(header(0, 2, 10) + b"12345", "stream 0", now=0.0)
    made.add(header(1, 2, 10, transfer_id=b"x" * 16) + b"12345", "other", now=0.0)
    made.forget(lambda reply: reply == "stream 0")
    assert made.held_bytes == 5
