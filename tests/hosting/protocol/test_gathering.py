"""Messages out of pieces that come on many streams at once, and what is held of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosting.protocol.gathering import Gatherer
from hosting.protocol.messages import Message, MessageType
from hosting.protocol.striping import PART_HEADER_BYTES

LIMIT = 1000


@given(st.dictionaries(st.integers(0, 9), st.lists(st.binary(max_size=30), min_size=1, max_size=5), min_size=1), st.randoms())
def test_any_interleaving_gives_each_message(pieces, chance):
    made = Gatherer(LIMIT * 100)
    queues = {stream: list(parts) for stream, parts in pieces.items()}
    outcomes = {}
    for stream in queues:
        made.begin(stream)
    while queues:
        stream = chance.choice(sorted(queues))
        piece = queues[stream].pop(0)
        outcome = made.add(stream, piece, last=not queues[stream])
        if queues[stream]:
            assert outcome is None and stream in made
        else:
            del queues[stream]
            outcomes[stream] = outcome
    for stream, parts in pieces.items():
        whole = b"".join(parts)
        assert outcomes[stream] == (Message(whole[0], whole[1:]) if whole else "the message is empty; expected a type byte and a body")
    assert len(made) == 0 and made.held_bytes == 0


@pytest.mark.parametrize(("type", "allowed"), [(MessageType.INFER, LIMIT), (MessageType.PART, LIMIT + PART_HEADER_BYTES)])
def test_the_limit_is_exact(type, allowed):
    made = Gatherer(LIMIT)
    made.begin(0)
    assert made.add(0, bytes((type,)) + bytes(allowed), last=True) == Message(type, bytes(allowed))
    made.begin(4)
    assert made.add(4, bytes((type,)) + bytes(allowed + 1), last=True) == "the message has more than 1000 bytes"
    assert made.held_bytes == 0


def test_what_is_unfinished_shares_one_limit_and_the_rest_of_a_refused_message_is_not_held():
    made = Gatherer(LIMIT)
    for stream in (0, 4):
        made.begin(stream)
    assert made.add(0, bytes(600), last=False) is None
    assert made.add(4, bytes(600), last=False) == "the message has more than 1000 bytes"
    assert made.held_bytes == 600
    assert made.add(4, bytes(600), last=False) is None and 4 in made
    assert made.add(4, bytes(600), last=True) is None and 4 not in made
    assert made.add(0, b"", last=True) == Message(0, bytes(599))
    assert made.held_bytes == 0


def test_a_message_that_nobody_wants_any_more():
    made = Gatherer(LIMIT)
    made.begin(0)
    made.add(0, bytes(100), last=False)
    assert made.discard(0) and not made.discard(0) and not made.discard(8)
    assert made.held_bytes == 0 and 0 in made
    assert made.add(0, bytes(100), last=False) is None
    made.end(0)
    assert 0 not in made and made.held_bytes == 0
    made.begin(4)
    made.add(4, bytes(100), last=False)
    made.end(4)
    assert len(made) == 0 and made.held_bytes == 0
