import json
import random
import struct
import tracemalloc

import msgpack
import pytest

from hosting.protocol.msgpack_numpy import pack
from hosting.protocol.msgpack_reader import MAX_DEPTH, MAX_ELEMENTS, read
from pi0.errors import MessageError
from tests.golden_data import GOLDEN
from tests.hosting.protocol.fuzz import mutations

WIRE = GOLDEN / "wire"
GOLDEN_FRAMES = [(WIRE / entry["file"]).read_bytes() for entry in json.loads((WIRE / "wire.json").read_text())["objects"]]
# Refusals of ours that msgpack does not share.
STRICTER = ("(extension: ", "(nesting: ", "(elements: ")


def oracle(message: bytes):
    return msgpack.unpackb(message, raw=False)


def random_value(rng: random.Random, depth: int = 0):
    kind = rng.randrange(12 if depth < 4 else 9)
    match kind:
        case 0:
            return rng.choice((None, True, False))
        case 1:
            return rng.choice((0, 1, -1, 127, 128, -32, -33, 255, 256, -128, -129))
        case 2 | 3:
            bits = rng.randrange(1, 65)
            return rng.getrandbits(bits) if rng.random() < 0.5 else -rng.getrandbits(min(bits, 63))
        case 4:
            return struct.unpack("<f", rng.randbytes(4))[0]  # -0.0, NaN and infinity among them
        case 5:
            return rng.uniform(-10, 10) * 10.0 ** rng.randrange(-30, 30)
        case 6 | 7:
            return "".join(rng.choices("abc observation/é漢🤖\0", k=rng.choice((0, 3, 8, 31, 32, 40, 300))))
        case 8:
            return rng.randbytes(rng.choice((0, 1, 5, 31, 255, 256, 70_000) if depth == 0 else (0, 1, 5, 31, 255, 256)))
        case 9:
            return [random_value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 3, 15, 16)))]
        case _:
            keys = (random_value(rng, 4) for _ in range(rng.choice((0, 1, 2, 4, 4, 16))))
            return {key: random_value(rng, depth + 1) for key in keys if isinstance(key, str | bytes)}


def test_agrees_with_msgpack_on_random_values():
    rng = random.Random(0)
    for i in range(12_000):
        value = random_value(rng)
        message = msgpack.packb(value, use_single_float=i % 5 == 0)
        # repr tells types, -0.0 and NaN apart.
        assert repr(read(message)) == repr(oracle(message))


@pytest.mark.parametrize("frame", GOLDEN_FRAMES)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda frame: memoryview(bytearray(frame))])
def test_agrees_with_msgpack_on_golden_frames(frame, kind):
    assert repr(read(kind(frame))) == repr(oracle(frame))


@pytest.mark.parametrize("first", range(256))
def test_every_first_byte(first):
    for rest in (
        b"",
        b"\0",
        b"\x01a",
        b"\0\x01a",
        b"\0\0\0\x01a",
        b"\x81\xa1k\xc0",
        b"\x3f\xc0\0\0",
        b"\xc0" * 15,
        b"a" * 31,
        b"\xa1a\x01" * 15,
        bytes(8),
    ):
        message = bytes((first,)) + rest
        try:
            expected = repr(oracle(message))
        except (ValueError, TypeError):
            with pytest.raises(MessageError, match="not msgpack"):
                read(message)
            continue
        try:
            assert repr(read(message)) == expected
        except MessageError as error:
            assert "(extension: " in str(error) and 0xC7 <= first <= 0xD8


def test_agrees_with_msgpack_on_damaged_frames():
    """Whatever we read msgpack reads the same, and what it reads we refuse only for the reasons that are ours."""
    read_so_far = 0
    for message in mutations([*GOLDEN_FRAMES, pack([{"a": [1.5, -7, None]}, "text"])], random.Random(1), 15_000):
        try:
            value = read(message)
        except MessageError as error:
            assert str(error).isprintable()
            if not any(word in str(error) for word in STRICTER):
                with pytest.raises((ValueError, TypeError)):
                    oracle(message)
        else:
            read_so_far += 1
            assert repr(value) == repr(oracle(message))
    assert read_so_far > 1000, "the damage is such that some frames are still readable"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"", "(truncated: the message ends at byte 0, where a value should begin)"),
        (b"\x82\xa1a\0", "(truncated: 2 elements are announced at byte 1, but 3 bytes are left)"),
        (b"\x92\xa1a", "(truncated: the message ends at byte 3, where a value should begin)"),
        (b"\xa5abc", "(truncated: a str of 5 bytes begins at byte 0, but the message ends at byte 4)"),
        (b"\x81\xa5a\0", "(truncated: a str of 5 bytes begins at byte 1, but the message ends at byte 4)"),
        (b"\x81\xc4\x05a", "(truncated: a bin of 5 bytes begins at byte 1, but the message ends at byte 4)"),
        (b"\x81\xa0\xc4", "(truncated: the message ends at byte 3, within a value)"),
        (b"\xc6\xff\xff\xff\xff", "(truncated: a bin of 4294967295 bytes begins at byte 0, but the message ends at byte 5)"),
        (b"\xdd\xff\xff\xff\xff\0", "(truncated: 4294967295 elements are announced at byte 5, but 1 bytes are left)"),
        (b"\xdf\0\0\0\x03\0\0\0\0\0", "(truncated: 3 elements are announced at byte 5, but 5 bytes are left)"),
        (b"\xcb\0\0", "(truncated: a float of 8 bytes begins at byte 0, but the message ends at byte 3)"),
        (b"\xce\0\0", "(truncated: the message ends at byte 3, within a value)"),
        (b"\x80\x80", "(trailing: the value ends at byte 1 of 2)"),
        (b"\xc1", "(reserved: byte 0xc1 at 0 begins nothing)"),
        (b"\xd4\x01\0", "(extension: a value of an extension type or a timestamp begins at byte 0; send numbers, text or arrays)"),
        (b"\x81\x01\x02", "(keys: a map has a key of type int at byte 1, expected str or bytes)"),
        (b"\x81\x90\x02", "(keys: a map has a key of type list at byte 1, expected str or bytes)"),
        (b"\x81\xa1a\xa2\xff\xff", "(text: a str that ends before byte 6 is not UTF-8, invalid start byte)"),
    ],
)
@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_messages_that_are_not_msgpack(message, text, kind):
    with pytest.raises(MessageError) as caught:
        read(kind(message))
    assert str(caught.value) == f"the message is not msgpack as openpi clients send it {text}"


def test_nesting_is_bounded():
    for nested in (b"\x91", b"\x81\xa0", b"\xdc\0\x01"):
        assert read(nested * MAX_DEPTH + b"\xc0") == oracle(nested * MAX_DEPTH + b"\xc0")
        with pytest.raises(MessageError, match=r"\(nesting: lists and maps are nested more than 32 deep"):
            read(nested * (MAX_DEPTH + 1) + b"\xc0")


def test_elements_are_counted_over_the_whole_message():
    half = [0] * (MAX_ELEMENTS // 2 - 1)
    assert read(msgpack.packb([half, half])) == [half, half]
    with pytest.raises(MessageError, match=r"\(elements: more than 50000 list items and map entries; send numbers as arrays\)"):
        read(msgpack.packb([half, half, 0]))
    with pytest.raises(MessageError, match=r"\(elements: "):
        read(msgpack.packb({str(i): 0 for i in range(MAX_ELEMENTS + 1)}))


def peak_bytes(message: bytes) -> int:
    tracemalloc.start()
    try:
        read(message)
    except MessageError:
        pass  # what counts is the memory
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_memory_is_in_proportion_to_damaged_messages():
    for message in mutations(GOLDEN_FRAMES, random.Random(2), 400):
        assert peak_bytes(message) <= 64 * len(message) + 1_000_000


@pytest.mark.parametrize(
    "message",
    [
        b"\xdc\x4e\x20" + b"\x80" * 20_000,  # the smallest things there are
        b"\xdc\x02\x58" + (b"\x81\xa0" * 30 + b"\xc0") * 600,  # chains of maps
        b"\xdc\x27\x10" + b"\x81\xa0\xc4\0" * 10_000,  # views that become bytes
        b"\xdd\0\0\x4e\x20" * 20_000,  # lists that announce lists
        b"\x82\xa0\xc4\0\xa0\xce\x7f\xff\xff\xff",  # a key that comes again with a number: it must not become that many bytes
    ],
)
def test_memory_is_bounded_for_the_worst_messages(message):
    # MAX_ELEMENTS ends this at some 40 MB.
    assert peak_bytes(message) <= 100 * len(message) + 1_000_000


def test_of_equal_keys_the_last_wins():
    message = b"\x83\xa1a\xc4\x01x\xa1b\x02\xa1a\x03"
    assert list(read(message).items()) == list(oracle(message).items()) == [("a", 3), ("b", 2)]
    assert read(b"\x82\xa1a\x01\xa1a\xc4\x01x") == {"a": b"x"}


def test_a_hook_sees_views_and_leaves_bytes():
    message = msgpack.packb({"image": b"1234", "inner": {b"key": [b"56"]}, "text": {"a": 1}})
    seen = []

    def hook(entries):
        seen.append({key: type(value) for key, value in entries.items()})
        for value in entries.values():
            if isinstance(value, memoryview):
                assert value.readonly and value.obj is message
        return entries

    assert read(message, hook) == {"image": b"1234", "inner": {b"key": [b"56"]}, "text": {"a": 1}}
    assert seen == [{b"key": list}, {"image": memoryview, "inner": dict, "text": dict}], "inner ones first; plain maps are not shown"


def test_what_a_hook_returns_takes_the_place_of_the_map():
    message = msgpack.packb([{b"k": i} for i in range(3)])
    assert read(message, lambda entries: entries[b"k"] * 10) == [0, 10, 20]
    assert read(msgpack.packb(b"bare")) == b"bare"


def test_views_of_writable_memory_are_read_only():
    message = bytearray(msgpack.packb({"image": b"1234"}))
    assert read(message, lambda entries: entries["image"].readonly) is True


ARRAY = b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x02\x01\x02\xc4\x05dtype\xa3|u1\xc4\x05shape\x91\x02"


def hooked(message: bytes, kind=bytes):
    """Every map a hook is shown, bytes for views."""
    maps = []
    read(kind(message), lambda entries: maps.append({k: bytes(v) if isinstance(v, memoryview) else v for k, v in entries.items()}))
    return maps


@pytest.mark.parametrize(
    "message",
    [
        ARRAY,
        ARRAY.replace(b"\xc4\x02\x01\x02", b"\xc5\0\x02\x01\x02"),
        ARRAY.replace(b"\xc4\x02\x01\x02", b"\xc6\0\0\0\x02\x01\x02"),
        ARRAY.replace(b"\xc4\x02\x01\x02", b"\xc0"),
        ARRAY.replace(b"\xc4\x02\x01\x02", b"\x05"),
        ARRAY.replace(b"\xa3|u1", b"\xa7float32"),
        ARRAY.replace(b"\xa3|u1", b"\xc4\x03|u1"),
        ARRAY.replace(b"shape\x91\x02", b"shape\xc0"),
        ARRAY.replace(b"shape\x91\x02", b"shape\xdc\0\x01\xcd\0\x02"),
        ARRAY.replace(b"shape", b"spahe"),
        ARRAY.replace(b"\xc3", b"\xc2"),
    ],
)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_the_quick_way_for_arrays_reads_what_the_plain_one_reads(message, kind):
    maps = []
    msgpack.unpackb(message, object_hook=maps.append, raw=False)
    assert hooked(message, kind) == maps


def test_the_quick_way_for_arrays_on_damaged_ones():
    agreed = 0
    for message in mutations([ARRAY, b"\x91" + ARRAY], random.Random(3), 8000):
        maps = []

        def show(entries, maps=maps):
            plain = not any(isinstance(item, bytes) for pair in entries.items() for item in pair)
            return entries if plain else maps.append(entries)

        try:
            msgpack.unpackb(message, object_hook=show, raw=False)
        except (ValueError, TypeError):
            with pytest.raises(MessageError):
                hooked(message)
            continue
        try:
            ours = hooked(message)
        except MessageError as error:
            assert any(word in str(error) for word in STRICTER)
            continue
        assert repr(ours) == repr(maps)
        agreed += 1
    assert agreed > 500
