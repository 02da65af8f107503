import json
import random

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hosting.protocol.msgpack_numpy import Dialect, pack, pack_parts, unpack, unpack_with_dialect
from pi0.errors import MessageError
from tests.golden_data import GOLDEN
from tests.hosting.protocol.fuzz import mutations
from tests.wire_objects import build, same

WIRE = GOLDEN / "wire"
INDEX = json.loads((WIRE / "wire.json").read_text())
REFUSED = {
    "complex": np.zeros(2, "<c8"),
    "object": np.array([1, "a"], object),
    "structured": np.zeros(2, [("a", "<i4")]),
    "complex_scalar": np.complex128(1),
}


@pytest.mark.parametrize("entry", INDEX["objects"], ids=lambda entry: entry["name"])
def test_golden_bytes(entry):
    value, packed = build(entry["object"]), (WIRE / entry["file"]).read_bytes()
    assert pack(value) == packed
    assert same(value, unpack(packed))


@pytest.mark.parametrize("entry", INDEX["objects"], ids=lambda entry: entry["name"])
def test_golden_bytes_in_parts(entry):
    assert b"".join(pack_parts(build(entry["object"]))) == (WIRE / entry["file"]).read_bytes()


SHAPES = st.sampled_from([(4095,), (4096,), (16384,), (65535,), (65536,), (256, 300), (0, 9)])
LEAVES = hnp.arrays(st.sampled_from(["u1", "<f4", ">i2", "<U3"]), SHAPES) | st.binary(max_size=40) | st.text(max_size=5)


@given(st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)))
@settings(max_examples=60, deadline=None)
def test_the_parts_are_the_whole(value):
    assert b"".join(pack_parts(value)) == pack(value)


def test_large_arrays_are_not_copied():
    image = np.zeros((224, 224, 3), np.uint8)
    head, data, tail = pack_parts({"image": image, "state": np.zeros(14)})
    assert np.shares_memory(np.frombuffer(data, np.uint8), image)
    assert len(head) + len(tail) < 300
    turned = image.transpose(2, 0, 1)
    assert b"".join(pack_parts({"image": turned})) == pack({"image": turned})


@pytest.mark.parametrize("value", [REFUSED["object"], 2**65, {1}])
def test_in_parts_the_same_is_refused_in_the_same_words(value):
    obs = {"images": {"base": np.zeros(9000, np.uint8)}, "extra": [0, value]}
    with pytest.raises((ValueError, TypeError, OverflowError)) as whole:
        pack(obs)
    with pytest.raises(whole.type) as parts:
        pack_parts(obs)
    assert str(parts.value) == str(whole.value)


@pytest.mark.parametrize("case", INDEX["must_raise"], ids=lambda case: case["name"])
def test_refused_when_packing(case):
    with pytest.raises(ValueError, match=r"Unsupported dtype"):
        pack({"x": REFUSED[case["name"]]})


@pytest.mark.parametrize("value", [np.longdouble(1), np.datetime64("2020-01-01"), {1, 2}, object(), 2**65])
def test_values_msgpack_does_not_have(value):
    with pytest.raises((TypeError, ValueError, OverflowError)):
        pack({"x": value})


def array(dtype="<f4", shape=(1,), data=b"\0\0\0\0", **more):
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": list(shape), **more}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (b"\x81\xa1a", "not msgpack"),
        (pack({}) + b"\0", "not msgpack"),
        (b"\x91" * 5000 + b"\xc0", "not msgpack"),
        (msgpack.packb({1: 2}), "not msgpack"),
        (b"\xa2\xff\xff", "not msgpack"),
        (b"\xdf\xff\xff\xff\xff", "not msgpack"),
        (b"\xc6\xff\xff\xff\xff", "not msgpack"),
        (msgpack.packb(array(dtype="|S0", data=b"", shape=[1 << 40])), "whose elements hold nothing"),
        (msgpack.packb(array(dtype="|O")), "Unsupported dtype: object"),
        (msgpack.packb(array(dtype="|V4")), "Unsupported dtype: "),
        (msgpack.packb(array(dtype="<c8", data=b"\0" * 8)), "Unsupported dtype: complex64"),
        (msgpack.packb(array(dtype="nonsense")), "none of NumPy's"),
        (msgpack.packb(array(dtype="i4," * 50)), "expected a string such as"),
        (msgpack.packb(array(dtype=None)), "expected a string such as"),
        (msgpack.packb(array(dtype=7)), "expected a string such as"),
        (msgpack.packb(array(shape=(2,))), "needs 8 bytes of data, got 4 bytes"),
        (msgpack.packb(array(shape=(-1,))), "expected a list of at most 32 sizes"),
        (msgpack.packb(array(shape=(True,))), "expected a list of at most 32 sizes"),
        (msgpack.packb(array(shape=(1,) * 33)), "expected a list of at most 32 sizes"),
        (msgpack.packb(array(shape=(2**62, 2**62))), "bytes of data, got 4 bytes"),
        (msgpack.packb(array(shape=(0, 2**62), data=b"")), "array is too big"),
        (msgpack.packb(array(data="text")), "bytes of data, got str"),
        (msgpack.packb({b"__ndarray__": True}), "expected a string such as"),
        (msgpack.packb({b"__npgeneric__": True, b"dtype": "<f4"}), "cannot be read"),
        (msgpack.packb({b"__npgeneric__": True, b"dtype": "|u1", b"data": 300}), "cannot be read"),
        (msgpack.packb({b"__npgeneric__": True, b"dtype": "<f4", b"data": [1, 2]}), "cannot be read"),
        (msgpack.packb({b"__npgeneric__": True, b"dtype": "<f4", b"data": "1"}), "its data is a str"),
        (msgpack.packb({b"__npgeneric__": True, b"dtype": "<i4", b"data": 1.5}), r"1\.5 is no int32"),
        (msgpack.packb({b"__npgeneric__": True, b"dtype": "<f2", b"data": 1e9}), "FloatingPointError: overflow"),
        (msgpack.packb({b"__npgeneric__": True, b"dtype": "|S4", b"data": 1 << 40}), "its data is a int"),
        (msgpack.packb(array(dtype=b"\x1b<f4")), r"an array has dtype b'\\x1b<f4', expected a string such as"),
        (msgpack.packb(array(dtype="\x1b" * 40)), "expected a string such as"),
        (msgpack.packb({b"__ndarray__": True, b"dtype": "<f4", b"shape": b"12"}), "an array has shape b'12', expected a list"),
    ],
)
def test_malformed_messages(message, text):
    with pytest.raises(MessageError, match=text) as caught:
        unpack(message)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_arrays_are_read_only_views(kind, dialect):
    message = kind(pack({"x": np.arange(300), "images": {"cam": np.asfortranarray(np.arange(12, dtype=">i2").reshape(3, 4))}}, dialect))
    decoded = unpack(message)
    for array in (decoded["x"], decoded["images"]["cam"]):
        assert not array.flags.writeable and not array.flags.owndata and array.flags.c_contiguous
        assert np.shares_memory(array, np.frombuffer(message, np.uint8))


def test_bytes_that_stay_are_bytes():
    message = pack({"image": b"\xff\xd8", "list": [b"1", b""], b"key": b"2", "map": {"data": b"3", "shape": b"4"}})
    assert unpack(message) == {"image": b"\xff\xd8", "list": [b"1", b""], b"key": b"2", "map": {"data": b"3", "shape": b"4"}}
    assert type(unpack(pack(b"bare"))) is bytes


def test_string_keys_are_an_ordinary_map():
    assert unpack(msgpack.packb({"__ndarray__": True})) == {"__ndarray__": True}


DTYPES = st.sampled_from(["|u1", "|i1", "<i2", ">i4", "<i8", "<f2", "<f4", ">f8", "|b1", "<u4"])
ARRAYS = DTYPES.flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary() | ARRAYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_round_trip(value):
    assert same(value, unpack(pack(value)))


@given(VALUES)
def test_round_trip_in_the_other_dialect(value):
    assert same(value, unpack(pack(value, Dialect.PYPI)))


# --- msgpack-numpy 0.4.8 of PyPI, as it packs (NumPy 2.4, msgpack 1.2) ----------------------------------------------------------------

ND = b"\x85\xc4\x02nd\xc3\xc4\x04type"
FROM_PYPI = [
    (np.array([1, 2], np.int32), ND + b"\xa3<i4\xc4\x04kind\xc4\x00\xc4\x05shape\x91\x02\xc4\x04data\xc4\x08\x01\x00\x00\x00\x02\x00\x00\x00"),
    (np.array(1.5, np.float32), ND + b"\xa3<f4\xc4\x04kind\xc4\x00\xc4\x05shape\x90\xc4\x04data\xc4\x04\x00\x00\xc0?"),
    (np.zeros((0, 14), np.float32), ND + b"\xa3<f4\xc4\x04kind\xc4\x00\xc4\x05shape\x92\x00\x0e\xc4\x04data\xc4\x00"),
    (
        np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        ND + b"\xa3<i2\xc4\x04kind\xc4\x00\xc4\x05shape\x92\x02\x03\xc4\x04data\xc4\x0c\x00\x00\x01\x00\x02\x00\x03\x00\x04\x00\x05\x00",
    ),
    (np.array([1.5], ">f4"), ND + b"\xa3>f4\xc4\x04kind\xc4\x00\xc4\x05shape\x91\x01\xc4\x04data\xc4\x04?\xc0\x00\x00"),
    (np.array([True, False]), ND + b"\xa3|b1\xc4\x04kind\xc4\x00\xc4\x05shape\x91\x02\xc4\x04data\xc4\x02\x01\x00"),
    (np.array(["a", "c"]), ND + b"\xa3<U1\xc4\x04kind\xc4\x00\xc4\x05shape\x91\x02\xc4\x04data\xc4\x08a\x00\x00\x00c\x00\x00\x00"),
    (
        {"prompt": "hi", "images": {"cam": np.arange(3, dtype=np.uint8).reshape(1, 1, 3)}},
        b"\x82\xa6prompt\xa2hi\xa6images\x81\xa3cam"
        + ND
        + b"\xa3|u1\xc4\x04kind\xc4\x00\xc4\x05shape\x93\x01\x01\x03\xc4\x04data\xc4\x03\x00\x01\x02",
    ),
    (np.float32(1.5), b"\x83\xc4\x02nd\xc2\xc4\x04type\xa3<f4\xc4\x04data\xc4\x04\x00\x00\xc0?"),
    (np.int64(7), b"\x83\xc4\x02nd\xc2\xc4\x04type\xa3<i8\xc4\x04data\xc4\x08\x07\x00\x00\x00\x00\x00\x00\x00"),
    (np.bool_(True), b"\x83\xc4\x02nd\xc2\xc4\x04type\xa3|b1\xc4\x04data\xc4\x01\x01"),
]
REFUSED_FROM_PYPI = [
    (b"\x82\xc4\x07complex\xc3\xc4\x04data\xa6(1+2j)", "a complex number cannot be read; send its real and imaginary parts"),
    (ND + b"\xa3<c8\xc4\x04kind\xc4\x00\xc4\x05shape\x91\x01\xc4\x04data\xc4\x08" + bytes(8), "Unsupported dtype: complex64"),
    (ND + b"\x91\x92\xa1a\xa3<i4\xc4\x04kind\xc4\x01V\xc4\x05shape\x91\x01\xc4\x04data\xc4\x04" + bytes(4), r"Unsupported dtype: \[\['a', '<i4'\]\]"),
    (ND + b"\x91\x92\xa0\xa2|O\xc4\x04kind\xc4\x01O\xc4\x05shape\x91\x02\xc4\x04data\xc4\x03\x80\x02c", r"Unsupported dtype: \[\['', '\|O'\]\]"),
    (b"\x83\xc4\x02nd\xc2\xc4\x04type\xa3<c8\xc4\x04data\xc4\x08" + bytes(8), "Unsupported dtype: complex64"),
    (b"\x83\xc4\x02nd\xc2\xc4\x04type\xa3<f4\xc4\x04data\xc4\x02ab", "expected 4 bytes of a number, got 2 bytes"),
    (b"\x83\xc4\x02nd\xc2\xc4\x04type\xa3<f4\xc4\x04data\x01", "expected 4 bytes of a number, got int"),
    (b"\x83\xc4\x02nd\xc2\xc4\x04type\xa3|S0\xc4\x04data\xc4\x00", "expected 0 bytes of a number, got 0 bytes"),
    (b"\x81\xc4\x02nd\xc3", "an array has dtype None, expected a string such as"),
]


@pytest.mark.parametrize(("value", "message"), FROM_PYPI)
def test_the_dialect_of_pypi(value, message):
    assert pack(value, Dialect.PYPI) == message
    decoded, dialect = unpack_with_dialect(message)
    assert same(value, decoded)
    assert dialect is Dialect.PYPI


@pytest.mark.parametrize(("message", "text"), REFUSED_FROM_PYPI)
def test_refused_in_the_dialect_of_pypi(message, text):
    with pytest.raises(MessageError, match=text) as caught:
        unpack(message)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", [*REFUSED.values(), np.datetime64("2020-01-01"), np.complex64(1), 1j, object(), 2**65])
def test_refused_when_packing_for_pypi(value):
    with pytest.raises((TypeError, ValueError, OverflowError)):
        pack({"x": value}, Dialect.PYPI)


def test_kinds_that_name_the_dtype_are_taken():
    message = msgpack.packb({b"nd": True, b"type": "<f4", b"kind": b"f", b"shape": [1], b"data": b"\0\0\x80?"})
    assert same(np.array([1], "<f4"), unpack(message))


def test_old_senders_with_text_keys():
    whole = {"nd": True, "type": "<f4", "shape": [1], "data": b"\0\0\x80?"}
    decoded, dialect = unpack_with_dialect(msgpack.packb({"state": whole}))
    assert same(np.array([1], "<f4"), decoded["state"]) and dialect is Dialect.PYPI
    for key in whole:
        partial = {name: value for name, value in whole.items() if name != key}
        assert unpack_with_dialect(msgpack.packb({"state": partial})) == ({"state": partial}, None)
    with pytest.raises(MessageError, match="needs 8 bytes of data, got 4 bytes"):
        unpack(msgpack.packb({**whole, "shape": [2]}))


@pytest.mark.parametrize(
    ("value", "dialect"),
    [
        ({}, None),
        ({"a": 1, "b": [b"x", "y", 1.5], b"c": {}}, None),
        (np.float64(1), None),
        (np.float32(1), Dialect.OPENPI),
        ([0, np.zeros(1)], Dialect.OPENPI),
    ],
)
def test_the_dialect_of_openpi_or_none(value, dialect):
    assert unpack_with_dialect(pack(value))[1] is dialect


@pytest.mark.parametrize("first", Dialect)
def test_the_first_array_decides(first):
    second = Dialect.PYPI if first is Dialect.OPENPI else Dialect.OPENPI
    for a, b in ((np.zeros(2), np.float32(1)), (np.float32(1), np.zeros(2))):
        value, dialect = unpack_with_dialect(b"\x92" + pack(a, first) + pack(b, second))
        assert same([a, b], value) and dialect is first


# --- Damaged frames ------------------------------------------------------------------------------------------------------------------

GOLDEN_FRAMES = [(WIRE / entry["file"]).read_bytes() for entry in INDEX["objects"]]


def test_damaged_frames_give_a_value_or_a_message_error():
    readable = refused = 0
    for message in mutations([*GOLDEN_FRAMES, *(message for _, message in FROM_PYPI)], random.Random(0), 20_000):
        try:
            unpack(message)
            readable += 1
        except MessageError as error:
            assert str(error).isprintable()
            refused += 1
    assert readable > 2000 and refused > 2000


def test_an_array_where_the_kind_should_be_is_no_more_than_another_kind():
    message = pack({"nd": True, "kind": np.zeros(3), "type": "<f8", "shape": [3], "data": bytes(24)})
    for key in (b"nd", b"kind", b"type", b"shape", b"data"):
        message = message.replace(b"%c%b" % (0xA0 + len(key), key), b"\xc4%c%b" % (len(key), key), 1)
    assert same(unpack(message), np.zeros(3))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=12), st.integers(0, 64), st.sampled_from([b"__ndarray__", b"__npgeneric__", b"nd"]), st.text(max_size=8), st.data())
def test_any_dtype_gives_a_value_or_a_message_error(data, length, marker, name, more):
    name = more.draw(st.sampled_from([name, "<f4", "|S3", "<U1", "<M8[s]", "<m8", "f4,i2", "(2,)f4", "|V0", "S99999999999999999999"]))
    value = more.draw(st.sampled_from([data, length, "x", None, 0.5]))
    keys = {b"dtype": name, b"type": name, b"shape": [length], b"data": value}
    try:
        unpack(msgpack.packb({marker: more.draw(st.booleans()), **keys}))
    except MessageError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        ({"images": {"front": 1, "wrist": np.array([1j])}}, ValueError, "images.wrist: Unsupported dtype: complex128; "),
        ({"batch": [{"n": 1}, {"state": {1}}]}, TypeError, "batch.1.state: cannot send a set; "),
        ({"n": 1 << 70}, OverflowError, "n: an integer of more than 64 bits; send it as text"),
        ({"prompt": "\ud800"}, ValueError, "prompt: 'utf-8' codec can't encode "),
        (np.array([1j]), ValueError, "Unsupported dtype: complex128; "),
    ],
)
def test_what_cannot_be_packed_is_named(value, kind, text, dialect):
    with pytest.raises(kind) as error:
        pack(value, dialect)
    assert str(error.value).startswith(text) and type(error.value) is kind
