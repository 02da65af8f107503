"""The server's own keys taken apart from the observation's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hosting.policy import MessageError
from hosting.protocol.requests import MAX_BATCH, InferRequest, ResetRequest, Row, parse_request


def row(value: dict[str, Any]) -> Row:
    request = parse_request(value)
    assert isinstance(request, InferRequest) and not request.batched and len(request.rows) == 1
    return request.rows[0]


def test_an_observation_without_own_keys_is_handed_on_as_it_is() -> None:
    obs = {"state": 1, "mode": "default", "prompt": "x"}
    assert row(obs).observation is obs
    assert row(obs) == Row(obs)


def test_own_keys_leave_the_observation() -> None:
    obs = {
        "state": 1,
        "endpoint": "infer",
        "session_id": 7,
        "reset": True,
        "replan": True,
        "seed": np.int64(3),
        "deadline_ms": 50,
        "request_id": "r1",
        "obs_index": 4,
        "sampling_params": {"seed": 3},
    }
    before = dict(obs)
    assert row(obs) == Row({"state": 1}, "7", True, True, 3, 50.0, {"request_id": "r1", "obs_index": 4})
    assert obs == before


def test_absent_own_keys_may_also_be_null() -> None:
    obs = {"state": 1, "session_id": None, "seed": None, "deadline_ms": None, "request_id": None, "sampling_params": None}
    assert row(obs) == Row({"state": 1})


def test_batch_alone_is_a_batch_and_beside_others_an_ordinary_field() -> None:
    request = parse_request({"batch": [{"state": 1, "seed": 2}, {"state": 3}]})
    assert request == InferRequest((Row({"state": 1}, seed=2), Row({"state": 3})), batched=True)
    for obs in ({"batch": [{"state": 1}], "state": 2}, {"batch": 3}):
        assert row(obs).observation == obs


@pytest.mark.parametrize(
    ("value", "sessions"),
    [
        ({}, None),
        ({"session_ids": None}, None),
        ({"session_ids": []}, ()),
        ({"session_ids": ["a", 2, "a"]}, ("a", "2")),
        ({"session_id": "b"}, ("b",)),
        ({"session_ids": ["a"], "session_id": "b"}, ("a", "b")),
    ],
)
def test_resets(value: dict[str, Any], sessions: tuple[str, ...] | None) -> None:
    assert parse_request({"endpoint": "reset", **value}) == ResetRequest(sessions)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([1], "the request is a list, expected a map of observation keys to values"),
        ({"endpoint": "metadata"}, "endpoint: got 'metadata', expected infer or reset"),
        ({"endpoint": None}, "endpoint: got NoneType, expected infer or reset"),
        ({"endpoint": np.array(["infer", "infer"])}, "endpoint: got ndarray, expected infer or reset"),
        ({"batch": [{"endpoint": np.arange(2)}]}, "batch[0].endpoint: got ndarray, expected infer; send a reset by itself"),
        ({"session_id": np.arange(3)}, "session_id: got ndarray, expected text or a whole number"),
        ({"reset": np.array([True, False])}, "reset: got ndarray, expected true or false"),
        ({"session_id": ""}, "session_id: has 0 characters, expected 1 to 256"),
        ({"session_id": "x" * 257}, "session_id: has 257 characters, expected 1 to 256"),
        ({"session_id": 1.5}, "session_id: got 1.5, expected text or a whole number"),
        ({"session_id": True}, "session_id: got True, expected text or a whole number"),
        ({"session_ids": ["a"]}, "session_ids: goes with endpoint reset; an observation has one session_id"),
        ({"endpoint": "reset", "session_ids": "a"}, "session_ids: got 'a', expected a list of session ids, or null for all of this connection"),
        ({"endpoint": "reset", "session_ids": ["a", None]}, "session_ids[1]: is null, expected a session id"),
        ({"endpoint": "reset", "session_ids": [[]]}, "session_ids[0]: got list, expected text or a whole number"),
        ({"reset": 1}, "reset: got 1, expected true or false"),
        ({"seed": "1"}, "seed: got '1', expected a whole number from 0 to 2**63 - 1"),
        ({"seed": 1.0}, "seed: got 1.0, expected a whole number from 0 to 2**63 - 1"),
        ({"seed": True}, "seed: got True, expected a whole number from 0 to 2**63 - 1"),
        ({"seed": -1}, "seed: got -1, expected a whole number from 0 to 2**63 - 1"),
        ({"seed": 1 << 63}, "seed: got 9223372036854775808, expected a whole number from 0 to 2**63 - 1"),
        ({"sampling_params": 3}, "sampling_params: got 3, expected a map"),
        ({"sampling_params": {"steps": 4}}, "sampling_params: 'steps' cannot be set per request; only seed can"),
        ({"seed": 1, "sampling_params": {"seed": 2}}, "seed: differs from sampling_params.seed; send one of them"),
        ({"deadline_ms": 0}, "deadline_ms: got 0, expected a number of milliseconds above 0"),
        ({"deadline_ms": float("nan")}, "deadline_ms: got nan, expected a number of milliseconds above 0"),
        ({"deadline_ms": "5"}, "deadline_ms: got '5', expected a number of milliseconds above 0"),
        ({"deadline_ms": [1]}, "deadline_ms: got list, expected a number of milliseconds above 0"),
        ({"request_id": [1]}, "request_id: got list, expected a number or a text of at most 256 characters"),
        ({"batch": []}, f"batch: has 0 observations, expected 1 to {MAX_BATCH}"),
        ({"batch": [{}] * 300}, f"batch: has 300 observations, expected 1 to {MAX_BATCH}; split it into several requests"),
        ({"batch": [{}, 3]}, "batch[1]: is a int, expected a map of observation keys to values"),
        ({"batch": [{"endpoint": "reset"}]}, "batch[0].endpoint: got 'reset', expected infer; send a reset by itself"),
        ({"batch": [{}, {"seed": "x"}]}, "batch[1].seed: got 'x', expected a whole number from 0 to 2**63 - 1"),
    ],
)
def test_what_is_wrong_names_the_key(value: Any, problem: str) -> None:
    with pytest.raises(MessageError) as error:
        parse_request(value)
    assert str(error.value) == problem


@pytest.mark.parametrize("came", [7, "7", np.int32(7), np.array([7], np.int32), np.array(7), np.array(["7"])])
def test_session_ids_in_every_form_that_clients_send(came: Any) -> None:
    assert row({"session_id": came}).session_id == "7"


@pytest.mark.parametrize(("came", "plain"), [(np.int64(3), 3), (np.float32(0.5), 0.5), (np.str_("x"), "x")])
def test_numpys_scalars_come_back_plain(came: Any, plain: Any) -> None:
    assert row({"obs_index": came}).echo == {"obs_index": plain}


@pytest.mark.parametrize(
    ("came", "known"),
    [
        ({"observation/exterior_image_0_left": 0, "prompt": "x"}, {"observation/exterior_image_1_left": 0, "prompt": "x"}),
        (
            {"observation/exterior_image_0_left": 0, "observation/exterior_image_0_right": 1, "observation/exterior_image_1_left": 2},
            {"observation/exterior_image_1_left": 0, "observation/exterior_image_1_right": 1, "observation/exterior_image_2_left": 2},
        ),
        ({"observation/exterior_image_0_left": 0, b"key": 1}, {"observation/exterior_image_1_left": 0, b"key": 1}),
        ({"task": "x", "state": 1}, {"prompt": "x", "state": 1}),
    ],
)
def test_keys_of_other_projects_become_openpis(came: dict[str, Any], known: dict[str, Any]) -> None:
    assert row(came).observation == row({**came, "seed": 1}).observation == known
    batch = parse_request({"batch": [came, {"prompt": "y"}]})
    assert isinstance(batch, InferRequest) and batch.rows[0].observation == known


@pytest.mark.parametrize("obs", [{"observation/exterior_image_1_left": 0, "observation/exterior_image_2_left": 1}, {"task": "x", "prompt": "y"}])
def test_openpis_own_keys_are_left_alone(obs: dict[str, Any]) -> None:
    assert row(obs).observation is obs


_arrays = hnp.arrays(st.sampled_from(["?", "<i8", "<f4", "<U3", "S2", "<M8[s]"]), hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3))
_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5) | _arrays,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
_keys: list[str | bytes] = ["endpoint", "session_id", "session_ids", "reset", "seed", "sampling_params", "deadline_ms", "request_id", "obs_index"]
_own = st.sampled_from([*_keys, "batch", "x", b"x", "task", "observation/exterior_image_0_left"])


@given(st.dictionaries(_own, _anything | st.sampled_from(["infer", "reset"]), max_size=6) | _anything)
def test_whatever_comes_is_a_request_or_a_message_error(value: Any) -> None:
    try:
        request = parse_request(value)
    except MessageError as error:
        assert "\n" not in str(error)
        return
    assert isinstance(request, InferRequest | ResetRequest)
