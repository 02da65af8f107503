"""The client over stub links: what is sent, what is tried again, and what never is; then over a real service."""

from __future__ import annotations

import inspect
import math
import random
import re
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from action.embodiments import Aloha
from hosting.clients.client import Client, ClientOptions, connect
from hosting.clients.errors import (
    AuthenticationError,
    ConnectError,
    ConnectionLostError,
    CrossedReplyError,
    InferenceError,
    ReplyTimeoutError,
)
from hosting.clients.retry import Reconnect
from hosting.protocol import msgpack_numpy
from hosting.protocol.messages import Message, MessageType
from tests.hosting.clients.scripted import OURS, StubLink, echoed, reply
from tests.serving import EchoPolicy, service_config, start, stubs

LOST = ConnectionLostError("the connection broke")


class Time:
    """A clock that moves when someone sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept_s: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds


class Dialled:
    """Stands in for dialing: gives these links, or raises these errors, in turn."""

    def __init__(self, *outcomes: StubLink | Exception) -> None:
        self.outcomes = list(outcomes)
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, url: str, *arguments: Any) -> tuple[str, StubLink]:
        self.calls.append(arguments)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return url, outcome


Make = Callable[..., tuple[Client, Dialled, Time]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """A client over these links, with what dialled them and what moves its time."""

    def make(*outcomes: StubLink | Exception, rng: random.Random | None = None, **options: Any) -> tuple[Client, Dialled, Time]:
        dialled, time = Dialled(*outcomes), Time()
        monkeypatch.setattr("hosting.clients.client.dial", dialled)
        reconnect = Reconnect(rng=rng or random.Random(0), sleep=time.sleep, clock=time)
        return Client("ws://robot", reconnect=reconnect, **options), dialled, time

    return make


class TestRequests:
    def test_the_observation_is_sent_with_an_id_that_the_caller_does_not_see(self, make: Make) -> None:
        link = StubLink()
        client, _, _ = make(link)
        obs = {"prompt": "x", "state": np.arange(3.0)}
        answer = client.infer(obs)
        assert [asked.type for asked in link.asked] == [MessageType.INFER]
        assert answer.keys() == {"prompt", "state", "server_timing"} and obs.keys() == {"prompt", "state"}
        client.infer(obs)
        first, second = (asked["request_id"] for asked in link.maps)
        assert first != second

    def test_the_callers_own_id_is_kept_and_comes_back(self, make: Make) -> None:
        client, _, _ = make(StubLink())
        assert client.infer({"request_id": "mine"})["request_id"] == "mine"

    def test_ids_of_two_clients_differ(self, make: Make) -> None:
        links = [StubLink(), StubLink()]
        for link in links:
            make(link)[0].infer({})
        assert links[0].maps[0]["request_id"] != links[1].maps[0]["request_id"]

    def test_others_servers_get_the_observation_alone(self, make: Make) -> None:
        link = StubLink(metadata={"action_horizon": 5})
        client, _, _ = make(link)
        client.infer({"prompt": "x"})
        assert link.maps == [{"prompt": "x"}] and client.get_server_metadata() == {"action_horizon": 5}

    def test_session_seed_and_deadline(self, make: Make) -> None:
        link = StubLink(metadata={})
        client, _, _ = make(link, session_id="robot 1", seed=7)
        client.infer({"n": 1})
        client.infer({"n": 2, "seed": 8, "session_id": "its own"})
        client.infer({"n": 3, "seed": 8}, seed=9, session_id="robot 2", deadline_ms=50.0)
        assert link.maps == [
            {"n": 1, "session_id": "robot 1", "seed": 7},
            {"n": 2, "session_id": "its own", "seed": 8},
            {"n": 3, "session_id": "robot 2", "seed": 9, "deadline_ms": 50.0},
        ]

    def test_time_limits(self, make: Make) -> None:
        link = StubLink()
        client, _, _ = make(link, timeout_s=2.0)
        client.infer({})
        client.infer({}, timeout_s=0.5)
        assert link.timeouts_s == [2.0, 0.5]
        link = StubLink()
        make(link)[0].infer({})
        assert link.timeouts_s == [None]

    def test_time_limits_that_are_for_ever_or_over(self, make: Make) -> None:
        link = StubLink()
        client, _, _ = make(link)
        client.infer({}, timeout_s=math.inf)
        client.infer({}, timeout_s=1e12)
        assert link.timeouts_s == [None, 1e12]
        for late_s in (0.0, -1.0):
            with pytest.raises(ReplyTimeoutError, match=r"^the time for this request was over before it could be sent$"):
                client.infer({}, timeout_s=late_s)
        assert len(link.asked) == 2

    def test_a_batch_is_the_only_key_and_its_rows_have_ids(self, make: Make) -> None:
        def answer(asked: Message) -> Message:
            rows = msgpack_numpy.unpack(asked.body)["batch"]
            return reply({"actions": np.zeros((len(rows), 2, 3)), "request_id": [row["request_id"] for row in rows], "server_timing": {}})

        link = StubLink(answer)
        client, _, _ = make(link, seed=7, session_id="robot")
        answered = client.infer_batch([{"n": 1}, {"n": 2, "seed": 3}])
        assert answered["actions"].shape == (2, 2, 3) and "request_id" not in answered
        assert link.maps[0].keys() == {"batch"}
        assert [{key: row[key] for key in row if key != "request_id"} for row in link.maps[0]["batch"]] == [{"n": 1}, {"n": 2, "seed": 3}]

    def test_a_batch_of_nothing(self, make: Make) -> None:
        link = StubLink()
        with pytest.raises(ValueError, match=r"^infer_batch: got no observations"):
            make(link)[0].infer_batch([])
        assert not link.asked

    def test_what_cannot_be_sent_is_not(self, make: Make) -> None:
        link = StubLink()
        client, _, _ = make(link)
        with pytest.raises(ValueError, match=r"^state: Unsupported dtype"):
            client.infer({"state": np.array([1j])})
        assert not link.asked and client.infer({"n": 1})["n"] == 1

    @pytest.mark.parametrize(("session_id", "body"), [(None, {}), ("robot 1", {"session_id": "robot 1"})])
    @pytest.mark.parametrize("metadata", [OURS, {"needs_session_id": True}], ids=["ours", "RoboArena"])
    def test_reset(self, make: Make, session_id: str | None, body: dict[str, Any], metadata: dict[str, Any]) -> None:
        link = StubLink(Message(MessageType.RESET_REPLY, b""), metadata=metadata)
        make(link, session_id=session_id)[0].reset()
        assert [asked.type for asked in link.asked] == [MessageType.RESET] and link.maps == [body]

    def test_a_server_that_knows_no_reset_is_not_asked(self, make: Make) -> None:
        link = StubLink(metadata={})
        make(link)[0].reset()
        assert not link.asked


class TestAnswers:
    @pytest.mark.parametrize(
        ("answer", "text", "code"),
        [
            (Message(MessageType.ERROR, "état: missing".encode()), "état: missing", None),
            (reply({"type": "error", "code": "observation", "message": "state: missing"}, MessageType.FAILURE), "state: missing", "observation"),
            (reply({"type": "error", "message": "Internal inference error"}), "Internal inference error", None),
            (reply({"type": "error", "error": "Robot policy not available", "code": "unsupported"}), "Robot policy not available", "unsupported"),
        ],
    )
    def test_an_error_keeps_the_servers_words_and_the_connection(self, make: Make, answer: Message, text: str, code: str | None) -> None:
        link = StubLink(answer)
        client, dialled, _ = make(link)
        with pytest.raises(InferenceError) as error:
            client.infer({})
        assert (str(error.value), error.value.code) == (text, code)
        assert client.infer({"n": 1})["n"] == 1 and len(dialled.calls) == 1

    def test_a_bare_array_is_the_actions(self, make: Make) -> None:
        client, _, _ = make(StubLink(reply(np.ones((3, 2), np.float32))))
        assert client.infer({})["actions"].shape == (3, 2)

    def test_named_arrays_have_no_room_for_an_id(self, make: Make) -> None:
        client, _, _ = make(StubLink(reply({"arm": np.ones((3, 2))})))
        assert client.infer({})["arm"].shape == (3, 2)

    @pytest.mark.parametrize("crossed", [{"request_id": "another", "server_timing": {}}, {"server_timing": {}}, {"request_id": "another"}])
    def test_anothers_answer_is_never_returned(self, make: Make, crossed: dict[str, Any]) -> None:
        link, second = StubLink(reply(crossed)), StubLink()
        client, _, _ = make(link, second)
        with pytest.raises(CrossedReplyError, match=rf"carries the id {crossed.get('request_id')}; the connection is closed$"):
            client.infer({"n": 1})
        assert link.closed and len(link.asked) == 1
        assert client.infer({"n": 2})["n"] == 2, "the next one goes over a new connection"

    def test_anothers_error_is_not_raised_as_ones_own(self, make: Make) -> None:
        failure = {"type": "error", "code": "observation", "message": "not yours", "request_id": "another"}
        with pytest.raises(CrossedReplyError):
            make(StubLink(reply(failure, MessageType.FAILURE)))[0].infer({})

    @pytest.mark.parametrize("answer", [Message(MessageType.REPLY, b"\xc1"), reply("text"), Message(0x7F, b"")])
    def test_what_is_no_answer_ends_the_connection(self, make: Make, answer: Message) -> None:
        link = StubLink(answer)
        with pytest.raises(ConnectionLostError):
            make(link, retry_lost=False)[0].infer({})
        assert link.closed


class TestReconnecting:
    def test_a_connection_found_closed_is_made_again_before_anything_is_sent(self, make: Make) -> None:
        first, second = StubLink(), StubLink(metadata={**OURS, "action_horizon": 9})
        client, _, time = make(first, second)
        first.closed = True
        assert client.infer({"n": 1})["n"] == 1
        assert not first.asked and not time.slept_s and client.get_server_metadata()["action_horizon"] == 9

    def test_pauses_between_attempts(self, make: Make) -> None:
        first, refused = StubLink(), ConnectError("refused")
        client, dialled, time = make(first, refused, refused, refused, StubLink())
        first.closed = True
        client.infer({})
        assert len(dialled.calls) == 5 and len(time.slept_s) == 3
        assert all(0 <= slept <= longest for slept, longest in zip(time.slept_s, [0.1, 0.2, 0.4], strict=True))

    def test_attempts_come_to_an_end_and_the_next_call_begins_anew(self, make: Make) -> None:
        first, last = StubLink(), StubLink()
        client, dialled, _ = make(first, *[ConnectError(f"refused {n}") for n in range(5)], last)
        first.closed = True
        with pytest.raises(ConnectError, match="refused 4"):
            client.infer({})
        assert len(dialled.calls) == 6
        client.infer({})

    def test_a_wrong_key_is_not_tried_again(self, make: Make) -> None:
        first = StubLink()
        client, dialled, _ = make(first, AuthenticationError("unauthorized"))
        first.closed = True
        with pytest.raises(AuthenticationError):
            client.infer({})
        assert len(dialled.calls) == 2

    def test_a_request_whose_answer_was_lost_is_sent_once_more(self, make: Make) -> None:
        first, second = StubLink(LOST), StubLink()
        client, _, _ = make(first, second)
        assert client.infer({"n": 1})["n"] == 1
        assert [asked["n"] for asked in first.maps + second.maps] == [1, 1]

    def test_but_not_twice(self, make: Make) -> None:
        first, second, third = StubLink(LOST), StubLink(LOST), StubLink()
        client, _, _ = make(first, second, third)
        with pytest.raises(ConnectionLostError):
            client.infer({"n": 1})
        assert not third.asked

    def test_nor_where_that_is_not_wanted(self, make: Make) -> None:
        second = StubLink()
        client, _, _ = make(StubLink(LOST), second, retry_lost=False)
        with pytest.raises(ConnectionLostError):
            client.infer({"n": 1})
        assert client.infer({"n": 2})["n"] == 2 and [asked["n"] for asked in second.maps] == [2]

    def test_a_link_that_could_not_connect_anew_by_itself(self, make: Make) -> None:
        first, second = StubLink(ConnectError("nobody there")), StubLink()
        client, _, _ = make(first, ConnectError("still nobody"), second, retry_lost=False)
        assert client.infer({"n": 1})["n"] == 1 and first.closed
        refused = StubLink(AuthenticationError("another certificate"))
        with pytest.raises(AuthenticationError):
            make(refused)[0].infer({})

    def test_a_request_that_took_too_long_is_never_repeated(self, make: Make) -> None:
        first = StubLink(ReplyTimeoutError("late"))
        client, dialled, _ = make(first)
        with pytest.raises(ReplyTimeoutError):
            client.infer({})
        assert len(first.asked) == 1 and len(dialled.calls) == 1 and not first.closed, "whether it can still be used is the link's to say"

    def test_reconnecting_keeps_to_the_calls_time(self, make: Make) -> None:
        first = StubLink()
        client, dialled, time = make(first, *[ConnectError("refused")] * 5, rng=LongPauses(), timeout_s=0.05, connect_timeout_s=3.0)
        first.closed = True
        with pytest.raises(ConnectError, match="refused"):
            client.infer({})
        assert len(dialled.calls) == 2 and not time.slept_s, "there is no time for the first pause of 0.1 s"
        assert dialled.calls[0][1:] == (3.0, None) and dialled.calls[1][1:] == (0.05, 0.05)

    def test_an_attempt_that_the_deadline_cuts_short_does_not_hide_why_the_others_failed(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        first = StubLink()
        client, _, time = make(first, timeout_s=1.0)
        first.closed = True
        attempts = iter([(0.01, "refused"), (2.0, "no answer within 0.9 s")])

        def slow(*_: Any) -> Any:
            took_s, why = next(attempts)
            time.now_s += took_s
            raise ConnectError(why)

        monkeypatch.setattr("hosting.clients.client.dial", slow)
        with pytest.raises(ConnectError, match=r"^refused$"):
            client.infer({})
        assert next(attempts, None) is None

    def test_no_time_is_left_to_send(self, make: Make) -> None:
        first, second = StubLink(), StubLink()
        client, dialled, time = make(first, second, timeout_s=1.0)
        first.closed = True
        original = dialled.__call__

        def slow(*arguments: Any) -> Any:
            time.now_s += 2.0
            return original(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hosting.clients.client.dial", slow)
            with pytest.raises(ReplyTimeoutError, match="could be sent"):
                client.infer({})
        assert not second.asked

    def test_whoever_is_interrupted_leaves_no_reply_behind(self, make: Make) -> None:
        def interrupt(asked: Message) -> Message:
            raise KeyboardInterrupt

        first = StubLink(interrupt)
        client, _, _ = make(first, StubLink())
        with pytest.raises(KeyboardInterrupt):
            client.infer({"n": 1})
        assert first.closed and client.infer({"n": 2})["n"] == 2


class LongPauses(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return b


class TestBeginning:
    def test_the_first_connection_is_tried_once(self, make: Make) -> None:
        with pytest.raises(ConnectError, match=r"^nobody there$"):
            make(ConnectError("nobody there"))

    def test_waiting_for_a_server_that_is_not_there_yet(self, make: Make) -> None:
        refused = ConnectError("refused")
        refused.__cause__ = ConnectionRefusedError()
        _, dialled, time = make(refused, refused, refused, StubLink(), wait_s=12.0)
        assert len(dialled.calls) == 4 and time.slept_s == [5.0, 5.0, 2.0]
        with pytest.raises(ConnectError, match="refused"):
            make(*[refused] * 5, wait_s=12.0)

    def test_other_failures_are_not_waited_for(self, make: Make) -> None:
        with pytest.raises(ConnectError, match="no such host"):
            make(ConnectError("no such host"), wait_s=60.0)

    @pytest.mark.parametrize(
        ("metadata", "error"),
        [
            ({"type": "error", "code": "unsupported", "error": "Robot policy not available"}, "refused the conversation: Robot policy not available"),
            ("hello", "does not greet as a policy server: ws://robot sent a str, expected a map"),
        ],
    )
    def test_a_greeting_that_is_none_closes_the_connection(self, make: Make, metadata: Any, error: str) -> None:
        link = StubLink(metadata=metadata)
        with pytest.raises(ConnectError, match=f"^ws://robot {error}$"):
            make(link)
        assert link.closed

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"encode": "png"}, "encode: got 'png', expected 'jpeg' or None"),
            ({"resize": "always"}, "resize: got 'always', expected 'metadata' or None"),
            ({"encode": "jpeg", "jpeg_quality": 0}, "jpeg_quality: got 0, expected 1 to 100"),
        ],
    )
    def test_options_without_meaning(self, make: Make, options: dict[str, Any], error: str) -> None:
        with pytest.raises(ValueError, match=f"^{error}$"):
            make(**options)

    @pytest.mark.parametrize(
        ("metadata", "reason"),
        [({"image_specs": [1]}, "is none of ours, which take JPEG"), (OURS, "names no image_specs")],
        ids=["other", "no specs"],
    )
    def test_jpeg_that_the_server_could_not_read(self, make: Make, metadata: Any, reason: str) -> None:
        link = StubLink(metadata=metadata)
        with pytest.raises(ConnectError, match=f"^encode='jpeg': the server at ws://robot {reason}.*; leave encode out$"):
            make(link, encode="jpeg")
        assert link.closed

    def test_the_options_of_the_wrappers_are_the_clients(self) -> None:
        parameters = inspect.signature(Client.__init__).parameters.values()
        assert ClientOptions.__annotations__.keys() == {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}


class TestThreads:
    def test_requests_take_turns_and_everyone_gets_his_own_answer(self, make: Make) -> None:
        inside = threading.Lock()

        class Exclusive(StubLink):
            def exchange(self, *arguments: Any) -> Message:
                assert inside.acquire(blocking=False), "two requests at once"
                try:
                    return super().exchange(*arguments)
                finally:
                    inside.release()

        client, _, _ = make(Exclusive())
        wrong: list[int] = []

        def robot(number: int) -> None:
            wrong.extend(n for n in range(50) if client.infer({"n": number * 100 + n})["n"] != number * 100 + n)

        threads = [threading.Thread(target=robot, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not wrong

    def test_waiting_for_others_counts_and_closing_does_not_wait(self, make: Make) -> None:
        working, finish = threading.Event(), threading.Event()

        def slow(asked: Message) -> Message:
            working.set()
            assert finish.wait(30)
            return echoed(asked)

        link = StubLink(slow)
        client, _, _ = make(link)
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(client.infer({"n": 1})))
        thread.start()
        assert working.wait(30)
        with pytest.raises(ReplyTimeoutError, match=r"^the requests of other threads took more than 0\.01 s; this one was not sent$"):
            client.infer({"n": 2}, timeout_s=0.01)
        client.close()
        assert not link.closed, "the request under way is finished"
        finish.set()
        thread.join(30)
        assert answers[0]["n"] == 1 and link.closed

    def test_a_closed_client(self, make: Make) -> None:
        link = StubLink()
        client, _, _ = make(link)
        with client:
            client.infer({})
        client.close()
        assert link.closed
        with pytest.raises(ConnectionLostError, match=r"^this client has been closed; make a new one$"):
            client.infer({})


class Cameras(EchoPolicy):
    """Asks for ALOHA's cameras and remembers what it was sent."""

    def __init__(self, hook: Callable[[Mapping[str, Any]], None] = lambda obs: None) -> None:
        self.seen: list[Mapping[str, Any]] = []
        super().__init__(lambda obs: (self.seen.append(obs), hook(obs))[1])  # type: ignore[func-returns-value]
        self.metadata = {**self.metadata, "image_specs": [spec.as_metadata() for spec in Aloha().image_specs]}


class TestARealService:
    def test_replies_batches_errors_and_resets(self) -> None:
        with start(service_config("action"), stubs()) as service, connect(service.addresses["action"]) as client:
            assert client.get_server_metadata()["server_name"] == "tandem" and client.address == service.addresses["action"]
            assert client.infer({"prompt": "x"})["asked"] == {"prompt": "x"}
            assert client.infer_batch([{"prompt": "x"}, {"prompt": "y"}])["actions"].shape == (2, 10, 14)
            with pytest.raises(InferenceError, match=r"^mode: got 'wrong'") as error:
                client.infer({"mode": "wrong"})
            assert error.value.code == "mode"
            client.reset()
            assert client.infer({"prompt": "z"})["asked"] == {"prompt": "z"}

    def test_cameras_arrive_as_they_were_asked_for(self) -> None:
        policy = Cameras()
        image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
        obs = {"state": np.ones(14), "images": {"cam_high": image}, "prompt": "x"}
        with start(service_config("action"), stubs(policy)) as service:
            for options in ({}, {"encode": "jpeg", "jpeg_quality": 100}, {"resize": None}):
                with connect(service.addresses["action"], **options) as client:  # type: ignore[arg-type]
                    client.infer(obs)
        resized, jpeg, raw = (obs["images"]["cam_high"] for obs in policy.seen)
        assert resized.shape == jpeg.shape == (3, 224, 224) and raw.shape == (48, 64, 3)
        assert resized.dtype == jpeg.dtype == np.uint8
        assert np.abs(resized.astype(int) - jpeg).mean() < 3 and (resized != jpeg).any()

    def test_a_restarted_server_is_found_again(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        config = service_config("action")
        config = config.model_copy(update={"action_transport": config.action_transport.model_copy(update={"websocket_port": port})})
        with start(config, stubs()):
            client = connect(f"ws://127.0.0.1:{port}")
            assert client.infer({"prompt": "before"})["asked"] == {"prompt": "before"}
        with pytest.raises(ConnectError, match="Connection refused"):
            client.infer({}, timeout_s=0.05)
        with start(config, stubs()):
            assert client.infer({"prompt": "after"})["asked"] == {"prompt": "after"}
        client.close()

    @pytest.mark.parametrize(
        "query", ["?profile=empty", "?profile=vllm", "?reply=arrays", "/v1/realtime/robot/openpi", "?response_key=action", "?errors=text"]
    )
    def test_every_dialect_of_ours(self, query: str) -> None:
        with start(service_config("action"), stubs()) as service, connect(service.addresses["action"] + query) as client:
            reply = client.infer({"prompt": "x"})
            assert reply["action" if "response_key" in query else "actions"].shape == (10, 14)
            with pytest.raises(InferenceError, match="mode: got 'wrong'"):
                client.infer({"mode": "wrong"})
            client.reset()


@pytest.mark.parametrize("scheme", ["ws", "quic", "unix", "auto"])
def test_a_server_that_is_not_there_yet_is_waited_for_over_every_transport(scheme: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free, socket.socket(type=socket.SOCK_DGRAM) as free_udp:
        free_udp.bind(("127.0.0.1", 0))
        port, udp_port = free.getsockname()[1], free_udp.getsockname()[1]
    host = "127.0.0.1"
    url = {
        "ws": f"ws://{host}:{port}",
        "quic": f"quic://{host}:{udp_port}",
        "unix": f"unix://{tmp_path}/x",
        "auto": f"auto://{host}:{port}?quic={udp_port}",
    }
    time = Time()
    with pytest.raises(ConnectError):
        connect(url[scheme], wait_s=12.0, verify=False, reconnect=Reconnect(sleep=time.sleep, clock=time))
    assert time.slept_s == [5.0, 5.0, 2.0]


@pytest.mark.parametrize(
    ("url", "options", "problem"),
    [
        ("ws://robot", {"pin": "ab" * 32}, "pin: ws://robot brings no certificate to check; leave it out, or use wss:// or quic://"),
        ("WS://robot", {"cafile": "x"}, "cafile: WS://robot brings no certificate to check; leave it out, or use wss:// or quic://"),
        ("unix:///x", {"pin": "ab" * 32}, "pin: unix:///x brings no certificate to check; leave it out, or use wss:// or quic://"),
        ("quic://robot", {"pin": "ab" * 32, "cafile": "x"}, "pin and cafile: give one of them; a pinned certificate needs no authority"),
        ("wss://robot", {"pin": "ab"}, "pin: 'ab' is no SHA-256 fingerprint; expected 64 hexadecimal digits, as the server's log shows them"),
        ("ws://robot", {"connect_timeout_s": math.inf}, "connect_timeout_s: got inf, expected a number of seconds above 0"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_anything_is_sent(url: str, options: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        connect(url, **options)
