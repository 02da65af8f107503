"""What is remembered for the page, and that it stays bounded whatever comes; time is a number that the tests advance."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hosting.calls import Served
from hosting.policy import ObservationError, SupersededError
from hosting.recent import CHUNKS, MAX_CAMERAS, MAX_CHUNK_NUMBERS, MAX_STATE_DIMS, STATES, SUBTASKS, TIMINGS, Recent, plain
from hosting.sessions import ClientSessions, Session, SessionStore

IMAGE = np.zeros((4, 6, 3), np.uint8)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class World:
    """A store of sessions, one connection, and what is remembered of them."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.sessions = SessionStore(clock=self.clock, ttl_s=600.0)
        self.client: ClientSessions = self.sessions.client()
        self.recent = Recent(self.sessions, clock=self.clock, **options)

    def answer(self, name: str | None = "a", obs: dict[str, Any] | None = None, reply: dict[str, Any] | None = None, ms: float = 5.0) -> Session:
        session = self.client.observe(name)
        self.recent.answered("action", session, obs or {}, reply or {}, ms)
        return session

    def details(self, session: Session, since: int | None = None) -> dict[str, Any]:
        details = self.recent.details(session.key, since)
        assert details is not None
        shown = plain(details)
        json.dumps(shown, allow_nan=False)
        return shown

    def listed(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = self.recent.overview()["sessions"]
        json.dumps(listed, allow_nan=False)
        return listed


@pytest.fixture
def world() -> World:
    return World()


def subtask(text: str, **more: Any) -> dict[str, Any]:
    return {"subtask": {"text": text, "ms": 20.0, "age_ms": 3.0, "waited": True, "revision": 1, "template_revision": 1, **more}}


class TestSubtasks:
    def test_one_entry_for_as_long_as_nothing_changes(self, world: World) -> None:
        for text in ("pick", "pick", "put"):
            session = world.answer(obs={"prompt": "tidy"}, reply=subtask(text))
            world.clock.now_s += 1
        first, second = world.details(session)["subtasks"]
        assert (first["text"], first["task"], first["requests"], first["began"], first["last"]) == ("pick", "tidy", 2, 100.0, 101.0)
        assert (second["text"], second["requests"], second["began"], second["waited"], second["ms"]) == ("put", 1, 102.0, True, 20.0)

    @pytest.mark.parametrize(
        "changed",
        [{"task": "older"}, {"error": "internal error 1"}, {"done": True}, {"template_revision": 2}],
        ids=lambda changed: next(iter(changed)),
    )
    def test_a_new_entry_where_what_it_rests_on_changes(self, world: World, changed: dict[str, Any]) -> None:
        world.answer(obs={"prompt": "tidy"}, reply=subtask("pick"))
        session = world.answer(obs={"prompt": "tidy"}, reply=subtask("pick", **changed))
        before, after = world.details(session)["subtasks"]
        assert [(entry["done"], entry["failed"]) for entry in (before, after)] == [(False, False), ("done" in changed, "error" in changed)]
        assert after["task"] == changed.get("task", "tidy") and after["error"] == changed.get("error")

    def test_errors_with_ids_of_their_own_are_one_entry(self, world: World) -> None:
        for number in range(3):
            session = world.answer(reply=subtask("", error=f"internal error {number}"))
        (entry,) = world.details(session)["subtasks"]
        assert entry["error"] == "internal error 2" and entry["requests"] == 3

    def test_what_changed_since_alone_is_told(self, world: World) -> None:
        session = world.answer(reply=subtask("pick"))
        known = world.details(session)
        world.answer(reply=subtask("pick"))
        world.answer(reply=subtask("put"))
        newer = world.details(session, known["version"])
        assert [(entry["text"], entry["requests"]) for entry in newer["subtasks"]] == [("pick", 2), ("put", 1)]
        assert newer["subtasks"][0]["id"] == known["subtasks"][0]["id"] and newer["since"] == known["version"]
        assert world.details(session, newer["version"])["subtasks"] == []
        assert world.details(session, 10**9)["since"] == -1  # of another process

    def test_a_reply_may_have_none_or_a_strange_one(self, world: World) -> None:
        for strange in ({}, {"subtask": "pick"}, {"subtask": {}}, {"subtask": {"text": 3, "ms": float("nan"), "age_ms": "x", "done": 1}}):
            session = world.answer(reply=strange)
        assert [entry["text"] for entry in world.details(session)["subtasks"]] == [""]

    def test_done_without_actions(self, world: World) -> None:
        session = world.answer(reply=subtask("all done", done=True))
        assert world.listed()[0]["done"] and world.details(session)["chunks"] == []


class TestStatesAndChunks:
    @pytest.mark.parametrize(
        ("obs", "state"),
        [
            ({"state": np.array([1.0, 2.0])}, [1, 2]),
            ({"state": [1, 2.5]}, [1, 2.5]),
            ({"state": np.array([[1.0]])}, None),
            ({"state": ["a"]}, None),
            ({"state": "a"}, None),
            ({"state": np.zeros(MAX_STATE_DIMS + 1)}, None),
            ({"state": [0.0] * (MAX_STATE_DIMS + 1)}, None),
            ({"state": [10**400]}, None),
            ({"observation/state": np.array([3], np.float32)}, [3]),
            ({"observation/joint_position": np.arange(2.0), "observation/gripper_position": np.array(0.5)}, [0, 1, 0.5]),
            ({"observation/joint_position": np.arange(2.0)}, [0, 1]),
            ({"observation/gripper_position": np.arange(2.0)}, None),
            ({}, None),
        ],
    )
    def test_where_the_state_is(self, world: World, obs: dict[str, Any], state: list[float] | None) -> None:
        session = world.answer(obs=obs, ms=50.0)
        assert world.details(session)["states"] == ([] if state is None else [[99.95, state]])

    def test_the_chunk_is_a_copy_and_says_when_it_was_given(self, world: World) -> None:
        actions = np.ones((2, 3), np.float32)
        session = world.answer(reply={"actions": actions})
        actions[:] = 7
        assert world.details(session)["chunks"] == [[100.0, [[1, 1, 1], [1, 1, 1]]]]
        for strange in (np.zeros(3), np.zeros((300, 300)), np.array([["a"]]), [[1.0]], np.zeros((0, 3))):
            world.answer(reply={"actions": strange})
        assert len(world.details(session)["chunks"]) == 1

    def test_one_answer_has_no_more_numbers_than_the_event_loop_can_bear(self, world: World) -> None:
        for rows in (100, 200, MAX_CHUNK_NUMBERS // 2 - 100, MAX_CHUNK_NUMBERS // 2):
            session = world.answer(reply={"actions": np.zeros((rows, 1))})
            world.clock.now_s += 1
        assert [len(chunk) for _, chunk in world.details(session)["chunks"]] == [MAX_CHUNK_NUMBERS // 2 - 100, MAX_CHUNK_NUMBERS // 2]

    @pytest.mark.filterwarnings("ignore:overflow encountered")  # by the expectation itself
    @given(hnp.arrays(hnp.floating_dtypes(), hnp.array_shapes(min_dims=2, max_dims=2, max_side=4)))
    def test_every_number_is_json(self, actions: Any) -> None:
        world = World()
        session = world.answer(obs={"state": actions[0]}, reply={"actions": actions})
        ((_, shown),) = world.details(session)["chunks"]
        assert [[value is None for value in row] for row in shown] == (~np.isfinite(np.round(actions.astype(np.float64), 4))).tolist()

    def test_a_reset_begins_new_plots_and_keeps_the_timeline(self, world: World) -> None:
        session = world.answer(obs={"state": [1.0]}, reply={"actions": np.zeros((1, 1)), **subtask("pick")})
        session.reset()
        world.answer(obs={"state": [2.0]}, reply=subtask("pick"))
        details = world.details(session)
        assert [state for _, state in details["states"]] == [[2.0]] and details["chunks"] == [] and details["epoch"] == 1
        assert [entry["epoch"] for entry in details["subtasks"]] == [0, 1]


class TestPictures:
    def test_those_that_can_be_shown(self, world: World) -> None:
        images = {
            "cam_high": np.zeros((3, 4, 6), np.uint8),
            "cam_low": np.zeros((4, 6, 1), np.float32),
            "depth": np.zeros((4, 6), np.uint8),
            "labels": np.zeros((4, 6, 3), np.int64),
            "encoded": b"\xff\xd8\xff",
            "empty": np.zeros((0, 6, 3), np.uint8),
            "none": None,
        }
        session = world.answer(obs={"images": images})
        cameras = world.details(session)["cameras"]
        assert [(camera["name"], camera["width"], camera["height"]) for camera in cameras] == [("cam_high", 6, 4), ("cam_low", 6, 4)]
        found = world.recent.image(session.key, "cam_high")
        assert found is not None and found[1] is images["cam_high"]
        assert world.recent.image(session.key, "depth") is None and world.recent.image(99, "cam_high") is None

    def test_not_more_than_so_many(self, world: World) -> None:
        session = world.answer(obs={"images": {str(number): IMAGE for number in range(MAX_CAMERAS + 3)}})
        assert len(world.details(session)["cameras"]) == MAX_CAMERAS

    def test_images_that_are_no_map_are_left_to_the_policy(self, world: World) -> None:
        assert world.details(world.answer(obs={"images": 3}))["cameras"] == []

    def test_the_message_that_they_are_views_of_counts_once(self, world: World) -> None:
        message = bytes(1000)
        one = np.frombuffer(message, np.uint8, 12).reshape(2, 2, 3)
        other = np.frombuffer(memoryview(message)[100:], np.uint8, 12).reshape(2, 2, 3)[::-1]
        world.answer("a", {"images": {"x": one, "y": other}})
        assert world.recent.held_bytes == 1000
        world.answer("b", {"images": {"x": other}})  # another row of the same batch
        assert world.recent.held_bytes == 1000
        world.answer("a", {"images": {"x": IMAGE}})
        assert world.recent.held_bytes == 1000 + IMAGE.nbytes
        world.answer("b", {"images": {"x": IMAGE}})
        assert world.recent.held_bytes == IMAGE.nbytes

    def test_who_was_not_heard_of_for_longest_loses_its_pictures_first(self) -> None:
        world = World(max_image_bytes=2 * IMAGE.nbytes)
        a, b, c = (world.answer(name, {"images": {"x": IMAGE.copy()}}) for name in "abc")
        assert world.details(a)["images_dropped"] and world.details(a)["cameras"] == []
        assert all(world.details(session)["cameras"] for session in (b, c))
        world.answer("a", {"images": {"x": IMAGE.copy()}})
        assert world.details(a)["cameras"] and not world.details(a)["images_dropped"] and world.details(b)["images_dropped"]

    def test_what_is_too_large_by_itself_is_not_kept(self) -> None:
        world = World(max_image_bytes=IMAGE.nbytes - 1)
        session = world.answer(obs={"images": {"x": IMAGE.copy()}})
        assert world.recent.held_bytes == 0 and world.details(session)["images_dropped"]

    def test_nothing_of_an_older_observation_is_kept_alive(self, world: World) -> None:
        image, state, actions = IMAGE.copy(), np.zeros(3), np.zeros((2, 3))
        alive = [weakref.ref(array) for array in (image, state, actions)]
        world.answer(obs={"images": {"x": image}, "state": state}, reply={"actions": actions})
        world.answer(obs={"images": {"x": IMAGE}})
        del image, state, actions
        gc.collect()
        assert [array() for array in alive] == [None, None, None]

    @given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 5), st.integers(1, 40)), max_size=40))
    def test_the_bound_holds_whatever_comes(self, steps: list[tuple[str, int, int]]) -> None:
        world = World(max_sessions=3, max_image_bytes=1000)
        messages = [bytes(size) for size in (50, 300, 700, 999, 1000, 1200)]
        newest: dict[int, int] = {}  # session → the message that its picture is of
        for name, message, offset in steps:
            image = np.frombuffer(messages[message], np.uint8, 3, offset).reshape(1, 1, 3)
            session = world.answer(name, {"images": {"x": image}})
            newest[session.key] = message
            keys = [entry["key"] for entry in world.listed()]
            kept = [key for key in keys if world.recent.image(key, "x")]
            assert len(keys) <= 3 and (session.key in kept) == (message != 5)
            assert world.recent.held_bytes == sum(len(messages[held]) for held in {newest[key] for key in kept}) <= 1000


class TestSessions:
    def test_those_at_work_come_first_and_keep_their_places(self, world: World) -> None:
        world.answer("old")
        world.clock.now_s += 100
        for name in ("a", "b", "a"):
            world.answer(name)
        assert [entry["id"] for entry in world.listed()] == ["b", "a", "old"]

    def test_no_more_than_so_many(self) -> None:
        world = World(max_sessions=2)
        first = world.answer("a", {"images": {"x": IMAGE.copy()}})
        world.answer("b")
        world.answer("c")
        assert {entry["id"] for entry in world.listed()} == {"b", "c"} and world.recent.details(first.key) is None and world.recent.held_bytes == 0

    def test_one_that_ended_lingers_and_goes(self, world: World) -> None:
        world.answer(None, {"images": {"x": IMAGE.copy()}})
        world.client.close()
        world.clock.now_s += 59
        assert [(entry["id"], entry["ended"]) for entry in world.listed()] == [(None, True)]
        world.clock.now_s += 1
        assert world.listed() == [] and world.recent.held_bytes == 0

    def test_one_that_is_remembered_stays_however_long_it_is_silent(self, world: World) -> None:
        world.answer("a")
        world.clock.now_s += 500
        assert [(entry["id"], entry["ended"], entry["idle_s"]) for entry in world.listed()] == [("a", False, 500.0)]

    def test_what_it_says_of_one(self, world: World) -> None:
        session = world.answer(obs={"prompt": b"tidy"}, reply={"instruction": "stop", **subtask("pick")}, ms=12.34)
        session.instruction = "go on"
        (entry,) = world.listed()
        assert (entry["prompt"], entry["instruction"], entry["applied"], entry["subtask"], entry["ms"]) == ("tidy", "go on", "stop", "pick", 12.3)
        world.answer(obs={"prompt": 3})
        assert world.listed()[0]["prompt"] is None and world.listed()[0]["applied"] is None

    def test_rate(self, world: World) -> None:
        for _ in range(5):
            world.answer()
            world.clock.now_s += 0.5
        assert world.listed()[0]["hz"] == 2.0
        world.clock.now_s += 20
        assert world.listed()[0]["hz"] is None

    def test_refusals(self, world: World) -> None:
        session = world.client.observe("a")
        world.recent.refused("action", session, {"prompt": "tidy", "images": {"x": IMAGE}}, ObservationError("state: missing\n\x1b[31m"))
        (entry,) = world.listed()
        assert entry["refusals"] == 1 and entry["refusal"] == {"at": 100.0, "text": r"state: missing \x1b[31m"} and entry["prompt"] == "tidy"
        assert world.details(session)["cameras"]
        world.recent.refused("action", session, {}, SupersededError("a newer one came"))
        world.recent.refused("action", session, {}, KeyError("secret"))
        assert world.listed()[0]["refusals"] == 2 and "secret" not in str(world.listed())


class TestLatency:
    def test_percentiles_by_nearest_rank(self, world: World) -> None:
        for number in range(1, 101):
            world.recent.request("action", "default", "ok", number / 1e3)
        world.recent.request("action", "default", "deadline", 9.0)
        world.recent.request("action", "metadata", "ok", 9.0)
        world.recent.served(Served("planner", 0.001, 0.5, 1))
        latency = world.recent.overview()["latency"]
        assert latency["request"] == {"p50": 50.0, "p95": 95.0, "p99": 99.0, "n": 100}
        assert latency["planner"]["p99"] == 500.0 and latency["planner_wait"]["p50"] == 1.0 and latency["action"] is None
        assert (latency["window"], latency["failed"]) == (101, 1)

    def test_nothing_yet(self, world: World) -> None:
        latency = world.recent.overview()["latency"]
        assert latency["request"] is None and latency["recent"] == [] and latency["rate"] == 0


def test_everything_is_bounded(world: World) -> None:
    for number in range(2 * TIMINGS):
        session = world.answer(
            obs={"state": [0.0], "prompt": "p" * 10_000}, reply={"actions": np.zeros((2, 1)), **subtask(f"{number} " + "s" * 10_000)}
        )
        world.recent.request("action", "default", "ok", 0.001)
        world.recent.served(Served("action", 0.001, 0.001, 1))
    details = world.details(session)
    assert (len(details["subtasks"]), len(details["states"]), len(details["chunks"])) == (SUBTASKS, STATES, CHUNKS)
    assert max(len(entry["text"]) + len(entry["task"]) for entry in details["subtasks"]) <= 4000
    assert world.recent.overview()["latency"]["window"] == TIMINGS
