import json
import math

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hosting.protocol.msgpack_numpy import pack, unpack
from pi0.errors import MessageError
from tests.golden_data import GOLDEN
from tests.wire_objects import build

WIRE = GOLDEN / "wire"
INDEX = json.loads((WIRE / "wire.json").read_text())
REFUSED = {
    "complex": np.zeros(2, "<c8"),
    "object": np.array([1, "a"], object),
    "structured": np.zeros(2, [("a", "<i4")]),
    "complex_scalar": np.complex128(1),
}


def same(a, b) -> bool:
    """Equal in value and in kind; sequences come back as lists."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic) and not isinstance(a, float | str | bytes):
        return type(a) is type(b) and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return a == b and isinstance(b, type(a).__mro__[-2] if isinstance(a, np.generic) else type(a))


@pytest.mark.parametrize("entry", INDEX["objects"], ids=lambda entry: entry["name"])
def test_golden_bytes(entry):
    value, packed = build(entry["object"]), (WIRE / entry["file"]).read_bytes()
    assert pack(value) == packed
    assert same(value, unpack(packed))


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
    ],
)
def test_malformed_messages(message, text):
    with pytest.raises(MessageError, match=text) as caught:
        unpack(message)
    assert "\n" not in str(caught.value)


def test_arrays_are_read_only_views():
    decoded = unpack(pack({"x": np.arange(3)}))["x"]
    assert not decoded.flags.writeable and not decoded.flags.owndata


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


GOLDEN_FRAMES = [(WIRE / entry["file"]).read_bytes() for entry in INDEX["objects"]]


@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(GOLDEN_FRAMES), st.data())
def test_mutated_golden_frames_never_crash(frame, data):
    mutated = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(mutated) - 1))
        mutated[position] = data.draw(st.integers(0, 255))
    try:
        unpack(bytes(mutated[: data.draw(st.integers(1, len(mutated)))]))
    except MessageError as error:
        assert "\n" not in str(error)
