"""One client's conversation, without sockets or a clock."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from hosting.policy import MessageError
from hosting.protocol import msgpack_numpy
from hosting.protocol.connection import Connection


def test_hello_is_the_metadata() -> None:
    assert msgpack_numpy.unpack(Connection().hello({"reset_pose": [0.0], "action_horizon": 3})) == {"reset_pose": [0.0], "action_horizon": 3}
    assert Connection().hello({}) == b"\x80"


def test_a_request_is_a_map_and_knows_when_it_came() -> None:
    request = Connection().receive(msgpack_numpy.pack({"state": np.arange(3)}), 12.5)
    assert request.arrived_s == 12.5 and request.observation["state"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("hello", "the request came as a text frame, expected a binary frame with a msgpack map"),
        (b"", "the message is not msgpack as openpi clients send it (ValueError: Unpack failed: incomplete input)"),
        (msgpack.packb([1, 2]), "the request is a list, expected a map of observation keys to values"),
        (msgpack.packb(None), "the request is a NoneType, expected a map of observation keys to values"),
        (msgpack_numpy.pack(np.zeros(2)), "the request is a ndarray, expected a map of observation keys to values"),
    ],
)
def test_what_is_no_request(message: bytes | str, text: str) -> None:
    with pytest.raises(MessageError) as error:
        Connection().receive(message, 0.0)
    assert str(error.value) == text


def test_timing_of_the_previous_request_runs_from_its_arrival_to_its_answer() -> None:
    connection = Connection()
    frames = []
    for arrived_s, sent_s in ((10.0, 10.25), (100.0, 100.5), (200.0, 200.1)):
        request = connection.receive(b"\x80", arrived_s)
        frames.append(connection.reply({"actions": np.zeros(1)}, infer_ms=7.0))
        connection.sent(request, sent_s)
    timings = [msgpack_numpy.unpack(frame)["server_timing"] for frame in frames]
    assert timings == [{"infer_ms": 7.0}, {"infer_ms": 7.0, "prev_total_ms": 250.0}, {"infer_ms": 7.0, "prev_total_ms": 500.0}]


def test_server_timing_is_the_servers_and_the_policys_reply_is_not_changed() -> None:
    result = {"server_timing": {"infer_ms": -1}, "text": "x"}
    assert msgpack_numpy.unpack(Connection().reply(result, infer_ms=2.0)) == {"server_timing": {"infer_ms": 2.0}, "text": "x"}
    assert result["server_timing"] == {"infer_ms": -1}


def test_a_reply_that_cannot_be_sent_is_an_error_not_a_frame() -> None:
    with pytest.raises(TypeError, match="cannot send a set"):
        Connection().reply({"x": {1, 2}}, infer_ms=1.0)
    assert "prev_total_ms" not in msgpack_numpy.unpack(Connection().reply({}, infer_ms=1.0))["server_timing"]
