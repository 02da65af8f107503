from typing import Any

import numpy as np
import pytest

from pi0.errors import ObservationError
from pi0.prompt import prompt_text

EXPECTED = "expected text (str, 0-d string array or UTF-8 bytes)"


def code_point(value: int) -> Any:
    """A 0-d string array of one code point, as the wire can carry it, valid or not."""
    return np.array(value, np.uint32).view("<U1")


@pytest.mark.parametrize("prompt", ["pick up the cüp", "pick up the cüp".encode(), np.array("pick up the cüp"), np.array("pick up the cüp".encode())])
def test_text_bytes_and_string_arrays(prompt: Any) -> None:
    assert prompt_text({"prompt": prompt}, "not this") == "pick up the cüp"


def test_default_only_where_the_key_is_absent() -> None:
    assert prompt_text({}, "tidy") == "tidy"
    assert prompt_text({"prompt": ""}, "tidy") == ""


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ({}, "prompt: missing, and there is no default; send the task as text"),
        ({"prompt": 5}, f"prompt: got int, {EXPECTED}"),
        ({"prompt": None}, f"prompt: got NoneType, {EXPECTED}"),
        ({"prompt": ["a"]}, f"prompt: got list, {EXPECTED}"),
        ({"prompt": b"\xff"}, "prompt: 1 bytes that are not UTF-8 (at byte 0), expected text"),
        ({"prompt": np.array(["a"])}, f"prompt: got an array of shape [1] and dtype <U1, {EXPECTED}"),
        ({"prompt": "a\ud800"}, "prompt: holds a lone surrogate (at character 1), which is not text; send valid Unicode"),
        ({"prompt": code_point(0xDC00)}, "prompt: holds a lone surrogate (at character 0), which is not text; send valid Unicode"),
        ({"prompt": code_point(0x110000)}, "prompt: a string array with values that are no Unicode characters, expected text"),
        ({"prompt": np.array(1.5)}, f"prompt: got an array of shape [] and dtype float64, {EXPECTED}"),
    ],
)
def test_anything_else_is_an_error(observation: dict[str, Any], message: str) -> None:
    with pytest.raises(ObservationError) as error:
        prompt_text(observation)
    assert str(error.value) == message
