from __future__ import annotations

import json

import pytest

from hosting import strict_json


@pytest.mark.parametrize("text", ["{}", '{"a": [1, 2.5, null, {"b": "\\u00e9"}]}', '"x"', " [true]\n"])
def test_what_means_one_thing_is_taken(text: str) -> None:
    assert strict_json.loads(text) == strict_json.loads(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"b": 1, "a": {"c": 1, "c": 1}}', "c: given twice in one object; keep one"),
        ('{"b": 1, "b": 1, "a": 1, "a": 1}', "b: given twice in one object; keep one"),
        ('{"\\ud800": 1, "\\ud800": 2}', "\\ud800: given twice in one object; keep one"),
        ('{"a": NaN}', "NaN is not a JSON number; write a finite one"),
        ("[-Infinity]", "-Infinity is not a JSON number; write a finite one"),
        ('{"a": -' + "1" * 5000 + "}", "-1111111111111111111… has 5001 digits; write a smaller number"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_does_not_is_refused(text: str, problem: str) -> None:
    with pytest.raises(strict_json.StrictJSONError) as error:
        strict_json.loads(text)
    assert str(error.value) == problem


def test_what_is_not_json_is_the_standard_error() -> None:
    with pytest.raises(json.JSONDecodeError):
        strict_json.loads("{")
