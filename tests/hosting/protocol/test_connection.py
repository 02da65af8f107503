"""One client's conversation, without sockets or a clock."""

from __future__ import annotations

from typing import Any, ClassVar

import msgpack
import numpy as np
import pytest

from hosting.policy import DoneError, MessageError, UnauthorizedError
from hosting.protocol import local_frame, msgpack_numpy
from hosting.protocol.connection import Call, Connection
from hosting.protocol.messages import Message, MessageType
from hosting.protocol.msgpack_numpy import Dialect
from hosting.protocol.profiles import Profile, choose_profile
from hosting.protocol.requests import InferRequest, MetadataRequest, ResetRequest

TYPED = Profile("openpi", errors="map")
RESULT = {"actions": np.arange(6.0).reshape(3, 2), "policy_timing": {"infer_ms": 2.0}, "subtask": {"text": "go"}}


def infer(value: Any, dialect: Dialect = Dialect.OPENPI) -> Message:
    return Message(MessageType.INFER, msgpack_numpy.pack(value, dialect))


def frame(value: dict[str, Any], schema_id: str = "droid") -> Message:
    return Message(MessageType.INFER_FRAME, local_frame.encode(value, schema_id))


def answered(connection: Connection, message: Message, result: dict[str, Any] = RESULT) -> Message:
    return connection.reply(connection.receive(message, 0.0), result, infer_ms=5.0)


def unpacked(message: Message) -> Any:
    return msgpack_numpy.unpack(message.body)


def test_hello_is_the_metadata() -> None:
    assert unpacked(Connection().hello({"reset_pose": [0.0], "action_horizon": 3})) == {"reset_pose": [0.0], "action_horizon": 3}
    assert Connection().hello({}) == (MessageType.METADATA_REPLY, b"\x80")


def test_a_request_knows_when_it_came_and_how() -> None:
    call = Connection().receive(infer({"state": np.arange(3), "seed": 4}), 12.5)
    assert (call.asked, call.arrived_s) == (MessageType.INFER, 12.5)
    assert isinstance(call.request, InferRequest)
    assert call.request.rows[0].observation["state"].tolist() == [0, 1, 2] and call.request.rows[0].seed == 4


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (Message(MessageType.TEXT, b"hello"), "the request came as a text frame, expected a binary frame with a msgpack map"),
        (Message(MessageType.INFER, msgpack.packb([1, 2])), "the request is a list, expected a map of observation keys to values"),
        (Message(MessageType.INFER, msgpack.packb(None)), "the request is a NoneType, expected a map of observation keys to values"),
        (infer(np.zeros(2)), "the request is a ndarray, expected a map of observation keys to values"),
        (Message(0x7F, b""), "message type 0x7f is none that a server takes; expected METADATA, INFER or RESET"),
        (Message(MessageType.REPLY, b""), "message type 0x15 is none that a server takes; expected METADATA, INFER or RESET"),
        (Message(MessageType.RESET, msgpack.packb([1])), "the body of message type 0x03 is a list, expected nothing or a map"),
        (
            Message(MessageType.RESET, msgpack.packb({"x": 1})),
            "the body of message type 0x03 has 'x', expected nothing but session_id, session_ids",
        ),
        (Message(MessageType.METADATA, msgpack.packb({"seed": 1})), "the body of message type 0x01 has 'seed', expected nothing but api_key"),
    ],
)
def test_what_is_no_request(message: Message, text: str) -> None:
    with pytest.raises(MessageError) as error:
        Connection().receive(message, 0.0)
    assert str(error.value) == text


def test_a_reply_has_what_the_policy_gave_and_the_servers_timing() -> None:
    reply = unpacked(answered(Connection(), infer({"state": 1, "request_id": "r7", "obs_index": 3}), {**RESULT, "server_timing": {"infer_ms": -1.0}}))
    np.testing.assert_array_equal(reply.pop("actions"), RESULT["actions"])
    assert reply == {
        "policy_timing": {"infer_ms": 2.0},
        "subtask": {"text": "go"},
        "server_timing": {"infer_ms": 5.0},
        "request_id": "r7",
        "obs_index": 3,
    }


def test_timing_of_the_previous_request_runs_from_its_arrival_to_its_answer() -> None:
    connection = Connection()
    call = connection.receive(infer({}), 10.0)
    assert unpacked(connection.reply(call, {}, infer_ms=5.0))["server_timing"] == {"infer_ms": 5.0}
    connection.sent(10.25)
    call = connection.receive(infer({}), 99.0)
    assert unpacked(connection.reply(call, {}, infer_ms=6.0))["server_timing"] == {"infer_ms": 6.0, "prev_total_ms": 250.0}


def test_nothing_was_sent_before_the_first_reply() -> None:
    connection = Connection()
    connection.sent(3.0)
    assert "prev_total_ms" not in unpacked(answered(connection, infer({})))["server_timing"]


@pytest.mark.parametrize("dialect", Dialect)
def test_the_first_array_decides_the_dialect_of_all_answers(dialect: Dialect) -> None:
    connection = Connection()
    assert answered(connection, infer({"prompt": "no array yet"})).body == msgpack_numpy.pack({**RESULT, "server_timing": {"infer_ms": 5.0}})
    connection = Connection()
    for message in (infer({"x": 1}), infer({"state": np.zeros(2)}, dialect), infer({"x": 1})):
        body = answered(connection, message).body
    assert body == msgpack_numpy.pack({**RESULT, "server_timing": {"infer_ms": 5.0}}, dialect)


def test_a_local_frame_is_answered_with_one_of_its_schema() -> None:
    message = answered(Connection(TYPED), frame({"state": np.zeros(2, np.float32), "prompt": "hi"}))
    assert message.type == MessageType.FRAME_REPLY
    decoded = local_frame.decode(message.body)
    assert decoded.schema_id == "droid"
    np.testing.assert_array_equal(decoded.value["actions"], RESULT["actions"])
    assert decoded.value["server_timing"] == {"infer_ms": 5.0} and decoded.value["subtask"] == {"text": "go"}


class TestProfiles:
    def test_a_bare_array(self) -> None:
        reply = unpacked(answered(Connection(choose_profile("/openpi/policy", "")), infer({"request_id": 3})))
        assert reply.dtype == np.float32
        np.testing.assert_array_equal(reply, RESULT["actions"])

    def test_a_reply_without_actions_stays_a_map(self) -> None:
        reply = unpacked(answered(Connection(choose_profile("/openpi/policy", "")), infer({}), {"subtask": {"text": "go"}}))
        assert reply == {"subtask": {"text": "go"}, "server_timing": {"infer_ms": 5.0}}

    def test_arrays_only(self) -> None:
        reply = unpacked(answered(Connection(choose_profile("/", "reply=arrays&response_key=action")), infer({})))
        assert reply.keys() == {"action"} and reply["action"].dtype == np.float32

    def test_another_name_for_the_actions(self) -> None:
        reply = unpacked(answered(Connection(choose_profile("/", "response_key=action")), infer({})))
        assert reply.keys() == {"action", "policy_timing", "subtask", "server_timing"}


class TestNothingLeftToDo:
    DONE: ClassVar[dict[str, Any]] = {"subtask": {"text": "all done", "done": True}}
    MIXED: ClassVar[dict[str, Any]] = {
        "actions": [np.zeros((2, 3)), None],
        "subtask": [{"text": "go", "done": False}, {"text": "all done", "done": True}],
    }
    BATCH: ClassVar[dict[str, Any]] = {"batch": [{"request_id": 1}, {"request_id": 2}]}

    @pytest.mark.parametrize("query", ["", "errors=map", "profile=roboarena", "response_key=action"])
    def test_a_map_says_so(self, query: str) -> None:
        assert unpacked(answered(Connection(choose_profile("/", query)), infer({}), self.DONE))["subtask"]["done"] is True

    @pytest.mark.parametrize("query", ["profile=vllm", "reply=array", "reply=arrays"])
    def test_who_takes_nothing_but_arrays_is_told_as_of_a_failure(self, query: str) -> None:
        with pytest.raises(DoneError, match=r"^nothing is left to do, the planner says 'all done', so there are no actions; stop$"):
            answered(Connection(choose_profile("/", query)), infer({}), self.DONE)

    def test_who_asks_for_subtasks_has_a_map_anyway(self) -> None:
        connection = Connection(choose_profile("/", "reply=array"))
        assert unpacked(answered(connection, infer({"mode": "subtask_only"}), self.DONE))["subtask"]["done"] is True
        planner = connection.reply(connection.receive(infer({}), 0.0), self.DONE, infer_ms=5.0, acting=False)
        assert unpacked(planner)["subtask"]["done"] is True

    def test_of_a_batch_the_others_have_their_actions(self) -> None:
        reply = unpacked(answered(Connection(), infer(self.BATCH), self.MIXED))
        assert reply["actions"][0].shape == (2, 3) and reply["actions"][1] is None and reply["request_id"] == [1, 2]

    @pytest.mark.parametrize(("message", "query"), [(infer(BATCH), "reply=array"), (frame(BATCH), "")])
    def test_of_a_batch_the_row_is_named_where_there_is_no_room_for_a_gap(self, message: Message, query: str) -> None:
        problem = r"^batch\[1\]: nothing is left to do, the planner says 'all done', so there are no actions; leave this row out$"
        with pytest.raises(DoneError, match=problem):
            answered(Connection(choose_profile("/", query)), message, self.MIXED)

    def test_a_local_frame_says_so_too(self) -> None:
        assert local_frame.decode(answered(Connection(), frame({}), self.DONE).body).value["subtask"]["done"] is True


class TestResets:
    @pytest.mark.parametrize(
        ("profile", "message", "answer"),
        [
            ("", infer({"endpoint": "reset"}), Message(MessageType.RESET_REPLY, b"reset successful")),
            ("profile=roboarena", infer({"endpoint": "reset"}), Message(MessageType.RESET_REPLY, b"reset successful")),
            (
                "profile=vllm",
                infer({"endpoint": "reset", "request_id": 4}),
                Message(MessageType.REPLY, msgpack.packb({"status": "reset successful", "request_id": 4})),
            ),
            ("", Message(MessageType.RESET, b""), Message(MessageType.RESET_REPLY, b"")),
            (
                "",
                frame({"endpoint": "reset"}, "x"),
                Message(MessageType.FRAME_REPLY, local_frame.encode({"status": "reset successful"}, "x")),
            ),
        ],
    )
    def test_are_confirmed_in_kind(self, profile: str, message: Message, answer: Message) -> None:
        connection = Connection(choose_profile("/", profile))
        call = connection.receive(message, 0.0)
        assert call.request == ResetRequest(None, {"request_id": 4} if "vllm" in profile else {})
        assert connection.reset_done(call) == answer

    def test_name_their_sessions(self) -> None:
        message = Message(MessageType.RESET, msgpack.packb({"session_ids": ["a", 3]}))
        assert Connection().receive(message, 0.0).request == ResetRequest(("a", "3"))


class TestFailures:
    def test_are_text_by_default(self) -> None:
        for message in (infer({}), frame({}), Message(MessageType.TEXT, b""), Message(MessageType.RESET, b"x")):
            assert Connection().failure(message, None, code="message", text="größer") == (MessageType.ERROR, "größer".encode())

    def test_are_maps_for_who_asked_with_msgpack_and_wants_them(self) -> None:
        connection = Connection(TYPED)
        message = infer({"request_id": "r"})
        call = connection.receive(message, 0.0)
        failed = connection.failure(message, call, code="observation", text="no")
        assert failed.type == MessageType.FAILURE
        assert unpacked(failed) == {"type": "error", "code": "observation", "message": "no", "request_id": "r"}
        assert unpacked(connection.failure(message, None, code="message", text="no")) == {"type": "error", "code": "message", "message": "no"}
        for other in (frame({}), Message(MessageType.METADATA, b"")):
            assert connection.failure(other, None, code="message", text="no") == (MessageType.ERROR, b"no")

    def test_of_a_batch_repeat_all_ids(self) -> None:
        connection = Connection(TYPED)
        message = infer({"batch": [{"request_id": "a"}, {}]})
        failed = connection.failure(message, connection.receive(message, 0.0), code="x", text="no")
        assert unpacked(failed)["request_id"] == ["a", None]


class TestKeys:
    def test_nothing_is_answered_before_the_key_came(self) -> None:
        connection = Connection(api_key="sesame")
        for message in (infer({}), frame({}), Message(MessageType.RESET, b""), Message(0x55, b"")):
            with pytest.raises(UnauthorizedError, match=r"^unauthorized: this server wants an API key before anything else"):
                connection.receive(message, 0.0)

    @pytest.mark.parametrize(
        ("body", "problem"),
        [
            (b"", "unauthorized: no API key came; give the server's api_key"),
            (msgpack.packb({"api_key": "Sesame"}), "unauthorized: this is not the API key; give the server's api_key"),
            (msgpack.packb({"api_key": 5}), "unauthorized: this is not the API key; give the server's api_key"),
        ],
    )
    def test_a_wrong_one_opens_nothing(self, body: bytes, problem: str) -> None:
        connection = Connection(api_key="sesame")
        with pytest.raises(UnauthorizedError) as error:
            connection.receive(Message(MessageType.METADATA, body), 0.0)
        assert str(error.value) == problem
        with pytest.raises(UnauthorizedError):
            connection.receive(infer({}), 0.0)

    def test_the_right_one_opens(self) -> None:
        connection = Connection(api_key="sesame")
        call = connection.receive(Message(MessageType.METADATA, msgpack.packb({"api_key": "sesame"})), 1.0)
        assert call == Call(MetadataRequest(), MessageType.METADATA, 1.0)
        connection.receive(infer({}), 0.0)
