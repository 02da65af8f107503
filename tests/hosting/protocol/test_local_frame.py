import json
import math
import random
import re
import struct
import tracemalloc
from collections import UserDict
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hosting.protocol.local_frame import MAX_JSON_BYTES, LocalFrame, decode, encode, encode_parts
from hosting.protocol.msgpack_reader import MAX_DEPTH
from pi0.errors import MessageError
from tests.golden_data import GOLDEN
from tests.hosting.protocol.fuzz import mutations
from tests.wire_objects import build, same

INDEX = {entry["name"]: entry["object"] for entry in json.loads((GOLDEN / "wire" / "wire.json").read_text())["objects"]}
CODES = {np.dtype(name): i for i, name in enumerate(("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "?"), 1)}


def text(value: str) -> bytes:
    return bytes([len(value.encode())]) + value.encode()


def entry(path, array) -> bytes:
    """One array as the reference says, step by step."""
    keys = b"".join(map(text, path))
    shape = b"".join(struct.pack(">I", n) for n in array.shape)
    data = array.astype(array.dtype.newbyteorder("<")).tobytes(order="C")
    return bytes([len(path)]) + keys + bytes([CODES[array.dtype], array.ndim]) + shape + struct.pack(">Q", len(data)) + data


def frame(arrays=(), scalars="{}", schema="unknown", count=None) -> bytes:
    """A frame of encoded ``arrays`` and JSON text."""
    packed = scalars.encode()
    head = text(schema) + struct.pack(">H", len(arrays) if count is None else count)
    return head + b"".join(arrays) + struct.pack(">I", len(packed)) + packed


def leaves(value, path=()):
    for key, item in value.items():
        if isinstance(item, dict):
            yield from leaves(item, (*path, key))
        else:
            yield (*path, key), item


def reference(value, schema="unknown") -> bytes:
    """``value`` as openpi-flash writes it: arrays by their paths, then every other leaf as JSON."""
    arrays, scalars = [], {}
    for path, item in leaves(value):
        if isinstance(item, np.ndarray):
            arrays.append(entry(path, item))
            continue
        inner = scalars
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = item.item() if isinstance(item, np.generic) else item
    return frame(arrays, json.dumps(scalars, separators=(",", ":"), ensure_ascii=False), schema)


EXAMPLE = {"prompt": "hi", "state": np.array([1, 2], np.float32), "images": {"cam": np.zeros((1, 1, 3), np.uint8)}}
EXAMPLE_FRAME = bytes.fromhex(
    "05616c6f6861 0002 01057374617465 0a01 00000002 0000000000000008 0000803f00000040 "
    "0206696d616765730363616d 0103 00000001 00000001 00000003 0000000000000003 000000 0000000f 7b2270726f6d7074223a226869227d"
)


def test_the_example_of_the_reference():
    assert encode(EXAMPLE, "aloha") == EXAMPLE_FRAME == reference(EXAMPLE, "aloha")
    schema_id, value = decode(EXAMPLE_FRAME)
    assert schema_id == "aloha"
    assert same({key: EXAMPLE[key] for key in value}, value) and value.keys() == EXAMPLE.keys()


@pytest.mark.parametrize("name", ["obs_aloha", "obs_droid", "obs_libero", "response", "subtask_response", "metadata_empty"])
def test_what_robots_send_comes_out_byte_for_byte(name):
    value = build(INDEX[name])
    assert encode(value) == reference(value)
    assert dict(leaves(decode(encode(value)).value)).keys() == dict(leaves(value)).keys()


# openpi-flash has these; everything else is better refused or better kept than it does.
DTYPES = st.sampled_from(["|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8", "|b1"])
ARRAYS = DTYPES.flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
LISTS = st.lists(SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(TEXTS, SCALARS, max_size=3), max_size=3)
MAPS = st.recursive(
    st.dictionaries(TEXTS, ARRAYS | SCALARS | LISTS, max_size=4),
    lambda inner: st.dictionaries(TEXTS, inner | ARRAYS | SCALARS, max_size=4),
    max_leaves=6,
)


def in_order_of(value, template):
    """``value`` with the keys in the order of ``template``: a frame has its arrays apart from all else."""
    if not isinstance(template, dict):
        return value
    assert isinstance(value, dict) and value.keys() == template.keys()
    return {key: in_order_of(value[key], item) for key, item in template.items()}


@given(MAPS, TEXTS)
def test_round_trip(value, schema_id):
    decoded = decode(encode(value, schema_id))
    assert decoded.schema_id == schema_id
    assert same(value, in_order_of(decoded.value, value))


@given(MAPS)
def test_byte_identical_where_the_reference_loses_nothing(value):
    def has_empty(item):
        return isinstance(item, dict) and (not item or any(map(has_empty, item.values())))

    if not any(map(has_empty, value.values())):
        assert encode(value) == reference(value)


def test_parts_are_views_of_the_senders_memory():
    image, state = np.arange(9000, dtype=np.uint8).reshape(3, 3000), np.zeros(14)
    parts = encode_parts({"images": {"cam": image}, "state": state})
    assert b"".join(parts) == encode({"images": {"cam": image}, "state": state})
    assert [len(part) for part in parts][1] == 9000 and np.shares_memory(np.frombuffer(parts[1], np.uint8), image)
    assert len(parts) == 3, "small arrays are joined to what stands around them"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda body: memoryview(bytearray(body))])
def test_arrays_are_read_only_views(kind):
    body = kind(EXAMPLE_FRAME)
    value = decode(body).value
    for array in (value["state"], value["images"]["cam"]):
        assert not array.flags.writeable and not array.flags.owndata and array.flags.c_contiguous
        assert np.shares_memory(array, np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array(1.5, np.float32), np.array(1.5, np.float32)),
        (np.array([1, 2], ">i4"), np.array([1, 2], "<i4")),
        (np.array(7, ">f8"), np.array(7, "<f8")),
        (np.asfortranarray(np.arange(6).reshape(2, 3)), np.arange(6).reshape(2, 3)),
        (np.arange(12).reshape(3, 4)[::-1, ::2], np.arange(12).reshape(3, 4)[::-1, ::2].copy()),
        (np.zeros((0, 14), np.float32), np.zeros((0, 14), np.float32)),
        (np.array([1, 2], np.longlong), np.array([1, 2], np.int64)),
    ],
)
def test_layouts_and_byte_orders(array, expected):
    assert same({"x": expected}, decode(encode({"x": array})).value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": {}}, {"a": {}}),
        ({"a": {"b": {}}}, {"a": {"b": {}}}),
        ({"a": (1, [2.5, None, {"b": True}])}, {"a": [1, [2.5, None, {"b": True}]]}),
        ({"a": np.float32(0.5), "b": np.int8(-3), "c": np.bool_(True), "d": np.float64(2), "e": np.str_("x"), "f": [np.float16(1)]},
         {"a": 0.5, "b": -3, "c": True, "d": 2.0, "e": "x", "f": [1.0]}),
        (UserDict(a=MappingProxyType({"b": 1})), {"a": {"b": 1}}),
    ],
)  # fmt: skip
def test_values_beside_arrays(value, expected):
    decoded = decode(encode(value)).value
    assert decoded == expected and repr(decoded) == repr(expected)


def test_a_map_may_hold_arrays_and_other_values():
    value = {"images": {"count": 1, "cam": np.zeros(2), "more": {"cam": np.ones(1), "note": "x"}}}
    decoded = decode(encode(value)).value
    assert same(value, in_order_of(decoded, value))


def deep(levels: int, leaf):
    return {"a": deep(levels - 1, leaf)} if levels > 1 else {"a": leaf}


@pytest.mark.parametrize("leaf", [1, np.zeros(1)])
def test_depth_is_bounded_alike_on_both_ends(leaf):
    assert same(deep(MAX_DEPTH, leaf), decode(encode(deep(MAX_DEPTH, leaf))).value)
    with pytest.raises(ValueError, match=r"^a\.a\..*nested more than 32 deep"):
        encode(deep(MAX_DEPTH + 1, leaf))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"images": {"cam": b"\xff\xd8"}}, "images.cam: bytes, which JSON does not have; send text as str and anything else as an array of uint8"),
        ({"prompt": np.array("hi")}, "prompt: an array of dtype <U2, which a local frame does not have; send text as str"),
        ({"x": np.array([b"a"])}, "x: an array of dtype |S1, which a local frame does not have; send text as str"),
        ({"x": np.zeros(1, "c8")}, "x: an array of dtype complex64, which a local frame does not have; send numbers or booleans of at most 64 bits"),
        ({"x": np.zeros(1, object)}, "x: an array of dtype object, which a local frame does not have; send numbers or booleans of at most 64 bits"),
        ({"x": np.zeros(1, np.longdouble)}, "x: an array of dtype float128, which a local frame does not have; send numbers or booleans"),
        ({"x": [1, np.zeros(1)]}, "x.1: an array in a list, which a local frame does not have; stack them into one, or use a map"),
        ({"x": [{"y": np.zeros(1)}]}, "x.0.y: an array in a list, which a local frame does not have; stack them into one, or use a map"),
        ({"x": {"gain": math.nan}}, "x.gain: is nan, which JSON does not have; send a finite number, or an array of it"),
        ({"x": [np.float32("-inf")]}, "x.0: is -inf, which JSON does not have; send a finite number, or an array of it"),
        ({"x": {1: 2}}, "x.1: the key is of type int, expected str"),
        ({b"x": 2}, "b'x': the key is of type bytes, expected str"),
        ({"x": 1 << 64}, "x: the integer has more than 64 bits; send it as text"),
        ({"x": np.complex64(1)}, "x: a complex64, which JSON does not have; send an array, number, text, list or map"),
        ({"x": {"y": {1, 2}}}, "x.y: a set, which JSON does not have; send an array, number, text, list or map"),
        ({"x": np.datetime64("2020-01-01")}, "x: a datetime64, which JSON does not have; send an array, number, text, list or map"),
        ({"x": "\udc80"}, "x: text that UTF-8 does not have, surrogates not allowed (a file name read with surrogateescape?)"),
        ({"x\udc80": np.zeros(1)}, "x\\udc80: text that UTF-8 does not have, surrogates not allowed (a file name read with surrogateescape?)"),
        ({"y": {"é" * 128: np.zeros(1)}}, "y." + "\\xe9" * 28 + "\\xe9..."[:3] + "...: a key on the way to an array has 256 bytes, at most 255 fit"),
        ({"y": {"x" * 256: {"z": np.zeros(1)}}}, "y." + "x" * 115 + "...: a key on the way to an array has 256 bytes, at most 255 fit"),
        ({str(i): np.zeros(0) for i in range(65536)}, "65536 arrays, at most 65535 fit into a local frame; stack some of them"),
        ({"x": np.zeros((0, 1 << 32))}, "x: has shape [0, 4294967296], sizes up to 4294967295 fit"),
        ({"x": "y" * MAX_JSON_BYTES}, "everything but the arrays is 1048584 bytes of JSON, at most 1048576 fit; send numbers as arrays"),
    ],
)  # fmt: skip
def test_refused_when_encoding(value, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        encode(value)
    assert str(caught.value).isprintable()


def test_schema_ids_are_short():
    with pytest.raises(ValueError, match="schema_id: has 256 bytes, at most 255 fit"):
        encode({}, "x" * 256)


def test_a_list_in_itself_ends():
    endless: list = []
    endless.append(endless)
    with pytest.raises(ValueError, match="nested more than 32 deep"):
        encode({"x": endless})


def test_long_keys_are_fine_away_from_arrays():
    assert decode(encode({"x" * 300: {"y": 1}})).value == {"x" * 300: {"y": 1}}


A = np.array([1, 2], np.uint8)
GOOD = entry(["a"], A)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "truncated: it ends at byte 0, within a value"),
        (b"\x05alo", "truncated: it ends at byte 4, within a value"),
        (EXAMPLE_FRAME[:20], "truncated: it ends at byte 20, within a value"),
        (EXAMPLE_FRAME[:-1], "its JSON is announced with 15 bytes, but 14 bytes are left"),
        (EXAMPLE_FRAME + b"\0", "its JSON is announced with 15 bytes, but 16 bytes are left"),
        (b"\x01\xff\0\0\0\0\0\0", "text: a key or the schema id is not UTF-8, invalid start byte"),
        (frame([b"\x01\x01\xff" + GOOD[3:]]), "text: a key or the schema id is not UTF-8, invalid start byte"),
        (frame([GOOD], count=2), "an array has a path of 0 keys at byte "),
        (frame([b"\0" + GOOD[3:]]), "an array has a path of 0 keys at byte 10, expected 1 to 32"),
        (frame([entry(["a"] * 33, A)]), "an array has a path of 33 keys at byte 10, expected 1 to 32"),
        (frame([GOOD[:3] + b"\0" + GOOD[4:]]), "the array 'a' has dtype code 0, expected 1 to 12"),
        (frame([GOOD[:3] + b"\x0d" + GOOD[4:]]), "the array 'a' has dtype code 13, expected 1 to 12"),
        (frame([GOOD[:4] + b"\x21" + GOOD[5:] + bytes(200)]), "the array 'a' has 33 dimensions, expected at most 32"),
        (frame([GOOD[:8] + b"\x03" + GOOD[9:]]), "the array 'a' of shape [3] and dtype uint8 needs 3 bytes, but 2 are announced"),
        (frame([b"\x01\x01a\x0b\x03" + b"\xff" * 12 + b"\0" * 8]), "the array 'a' of shape [4294967295, 4294967295, 4294967295] and dtype "),
        (frame([b"\x01\x01a\x01\x01\0\0\0\xff" + struct.pack(">Q", 255)]), "the array 'a' has 255 bytes, but 6 are left"),
        (frame([b"\x01\x01a\x0b\x04\0\0\0\0" + b"\xff" * 12 + b"\0" * 8]), "the array 'a' cannot have shape [0, 4294967295, 4294967295, 4294967295]"),
        (frame([GOOD, GOOD]), "'a' is there twice"),
        (frame([GOOD], '{"a":1}'), "'a' is there twice"),
        (frame([GOOD, entry(["a", "b"], A)]), "the array 'a.b' lies within something that is no map"),
        (frame([entry(["a", "b"], A), GOOD]), "'a' is there twice"),
        (frame([entry(["a", "b"], A)], '{"a":[]}'), "the array 'a.b' lies within something that is no map"),
        (frame([entry(["a", "b"], A)], '{"a":{"b":null}}'), "'a.b' is there twice"),
        (frame([entry(["\x1b\n"], A)] * 2), "'\\x1b\\n' is there twice"),
        (frame((), "[]"), "its JSON is a list, expected an object"),
        (frame((), "{"), "its JSON cannot be read, JSONDecodeError: "),
        (frame((), "{} {}"), "its JSON cannot be read, JSONDecodeError: Extra data"),
        (frame((), '{"a":NaN}'), "its JSON cannot be read, ValueError: it has NaN, which is no JSON"),
        (frame((), '{"a":-Infinity}'), "its JSON cannot be read, ValueError: it has -Infinity, which is no JSON"),
        (frame((), '{"a":[1e999]}'), "its JSON has a number beyond 64 bits"),
        (frame((), '{"a":18446744073709551616}'), "its JSON has a number beyond 64 bits"),
        (frame((), '{"a":' + "9" * 5000 + "}"), "its JSON cannot be read, ValueError: Exceeds the limit"),
        (frame((), '{"a":1,"a":2}'), "its JSON cannot be read, ValueError: an object has the same key twice"),
        (frame((), '{"a":"\\ud800"}'), "its JSON cannot be read, UnicodeEncodeError: "),
        (frame((), '{"a":' * 33 + "1" + "}" * 33), "its JSON is nested more than 32 deep"),
        (frame((), '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "its JSON cannot be read, RecursionError: "),
        (frame((), '{"a":[' + "0," * 50_000 + "0]}"), "it has more than 50000 elements; send numbers as arrays"),
        (frame([entry(["a"] * 32, A[:0])] * 1563), "it has more than 50000 elements"),
        (frame((), '{"a":"' + "x" * MAX_JSON_BYTES + '"}'), "everything but the arrays is 1048584 bytes of JSON, expected at most 1048576"),
        (text("") + b"\0\0" + b"\0\0\0\x01\xff", "its JSON cannot be read, UnicodeDecodeError: "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_bodies_that_are_not_frames(body, message, kind):
    with pytest.raises(MessageError) as caught:
        decode(kind(body))
    assert str(caught.value).startswith(f"the message is not a local frame ({message}")
    assert str(caught.value).isprintable()


def test_no_json_is_an_empty_map():
    assert decode(frame([GOOD], "")).value.keys() == {"a"}
    assert decode(b"\0\0\0\0\0\0\0") == LocalFrame("", {})


# --- Damaged frames -------------------------------------------------------------------------------------------------------------------

SEEDS = [
    EXAMPLE_FRAME,
    *(encode(build(INDEX[name]), name) for name in ("obs_aloha", "obs_droid", "obs_libero", "response", "subtask_response")),
    frame([entry(["a", "b"], A), entry(["a", "c"], np.array(1.5))], '{"a":{"d":[1,2.5,{"é":"\\u00e9"}]},"e":-1e3}'),
    frame([GOOD] * 2),
]  # fmt: skip


def test_damaged_frames_give_a_value_or_a_message_error():
    readable = refused = 0
    for message in mutations(SEEDS, random.Random(0), 20_000):
        try:
            schema_id, value = decode(message)
        except MessageError as error:
            assert str(error).isprintable()
            refused += 1
        else:
            assert same(value, in_order_of(decode(encode(value, schema_id)).value, value)), "what can be read can be sent"
            readable += 1
    assert readable > 1000 and refused > 5000


def peak_bytes(message: bytes) -> int:
    tracemalloc.start()
    try:
        decode(message)
    except MessageError:
        pass  # what counts is the memory
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_memory_is_in_proportion_to_damaged_frames():
    for message in mutations(SEEDS, random.Random(1), 400):
        assert peak_bytes(message) <= 64 * len(message) + 1_000_000


@pytest.mark.parametrize(
    "message",
    [
        frame((), '{"a":[' + "{}," * 60_000 + "0]}"),
        frame((), '{"a":[' + '{"":0},' * 40_000 + "0]}"),
        frame((), '{"a":[' + "1.5," * 90_000 + "0]}"),
        frame([entry([str(i)], A) for i in range(5000)]),
        frame([b"\x01\x01a\x01\x01" + b"\xff" * 12] * 1000),
    ],
)
def test_memory_is_in_proportion_to_the_worst_frames(message):
    assert peak_bytes(message) <= 64 * len(message) + 1_000_000


def test_memory_for_long_paths():
    """31 maps for 50 bytes; the number of elements ends this at some 10 MB."""
    assert peak_bytes(frame([entry([str(i), *[""] * 31], A) for i in range(600)])) <= 200 * 600 * 50 + 1_000_000
