"""JSON as people write settings in it: what the standard parser takes but means nothing or two things is refused."""

from __future__ import annotations

import json
from typing import Any, NoReturn

_SHOWN_DIGITS = 20


class StrictJSONError(ValueError):
    """The text is JSON but nothing that a setting can be: a name given twice, ``NaN``, an endless number. One readable line."""


def loads(text: str | bytes) -> Any:
    """Parse ``text``.

    Raises:
        StrictJSONError: a name occurs twice in an object, a number is not finite or has thousands of digits, or it is nested too deeply.
        json.JSONDecodeError: it is not JSON.
        UnicodeDecodeError: it is not UTF-8, UTF-16 or UTF-32.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_int=_integer, parse_constant=_no_constant)
    except RecursionError:
        raise StrictJSONError("nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON can spell half a character (a lone surrogate), which no name has; escaped, the name can at least be reported.
    pairs = [(name.encode("utf-8", "backslashreplace").decode(), value) for name, value in pairs]
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise StrictJSONError(f"{name}: given twice in one object; keep one")
        found[name] = value
    return found


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python reads at most 4300, as the work grows with their square
        raise StrictJSONError(f"{digits[:_SHOWN_DIGITS]}… has {len(digits)} digits; write a smaller number") from None


def _no_constant(name: str) -> NoReturn:
    raise StrictJSONError(f"{name} is not a JSON number; write a finite one")
