from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from hosting.api_keys import authorized, sent_key


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"Authorization": "Bearer a b"}, "a b"),
        ({"Authorization": "bearer  k "}, "k"),
        ({"Authorization": "Api-Key k"}, "k"),
        ({"X-API-Key": "k"}, "k"),
        ({"Authorization": "Basic x", "X-API-Key": "k"}, "k"),
        ({"Authorization": "Bearer k", "X-API-Key": "other"}, "k"),
        ({"Authorization": "k"}, ""),
        ({"Authorization": "Bearer"}, ""),
        ({}, ""),
    ],
)
def test_where_a_key_may_stand(headers: dict[str, str], key: str) -> None:
    assert sent_key(Headers(headers)) == key


def test_only_the_right_one_will_do() -> None:
    assert authorized(Headers({}), None)
    assert authorized(Headers({"X-API-Key": "right"}), "right")
    for wrong in ("", "Right", "rightx", "righ", "r\xefght"):
        assert not authorized(Headers({"X-API-Key": wrong}), "right")
    assert not authorized(Headers({}), "right")
