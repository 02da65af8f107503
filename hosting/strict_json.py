"""JSON as people write settings in it: what the standard parser takes but means nothing or two things is refused."""

from __future__ import annotations

import json
from typing import Any, NoReturn


class StrictJSONError(ValueError):
    """The text is JSON to the standard parser but not to us: a name given twice, or ``NaN``. One readable line."""


def loads(text: str | bytes) -> Any:
    """Parse ``text``.

    Raises:
        StrictJSONError: a name occurs twice in an object, a number is not finite, or it is nested too deeply.
        json.JSONDecodeError: it is not JSON.
        UnicodeDecodeError: it is not UTF-8, UTF-16 or UTF-32.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise StrictJSONError("nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON can spell half a character (a lone surrogate), which no name has; escaped, the name can at least be reported.
    pairs = [(name.encode("utf-8", "backslashreplace").decode(), value) for name, value in pairs]
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise StrictJSONError(f"{min(name for name in found if names.count(name) > 1)}: given twice in one object; keep one")
    return found


def _no_constant(name: str) -> NoReturn:
    raise StrictJSONError(f"{name} is not a JSON number; write a finite one")
