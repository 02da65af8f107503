"""What is wrong with a configuration, in words its author can act on: one line per problem, the field first, then the fix.

Pydantic finds the problems; this module says them without its vocabulary. The admin port uses the same words.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Callable, Iterable
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

Location = tuple[str, ...]
"""Where a value belongs, outermost section first: ``("planner", "dtype")``."""

_LONGEST_SHOWN = 60


def validation_problems(details: Iterable[ErrorDetails], model: type[BaseModel], origin: Callable[[Location], str | None]) -> list[str]:
    """One line for each problem in ``details``.

    Args:
        details: the ``errors()`` of what validating ``model`` raised.
        model: the outermost model.
        origin: where the value at a location came from (``environment OPENPI_HOST``), None when it was never given.
    """
    return [line for detail in details for line in _lines(detail, model, origin)]


def _lines(detail: ErrorDetails, model: type[BaseModel], origin: Callable[[Location], str | None]) -> list[str]:
    path = detail["loc"]
    item = f"[{path[-1]}]" if path and isinstance(path[-1], int) else ""  # of a list
    location: Location = tuple(str(part) for part in (path[:-1] if item else path))
    if not location:  # a rule between fields, whose message names them
        return str(detail["ctx"]["error"]).splitlines()
    if detail["type"] == "extra_forbidden":
        return [unknown_field(location, model, origin(location))]
    name = ".".join(location) + item
    source = origin(location)
    source = f" ({source})" if source else ""
    if detail["type"] == "missing":
        return [f"{name}: missing; set it in the configuration file or as {variable_name(location)}"]
    if detail["type"] == "value_error":
        return [f"{name}: {detail['ctx']['error']}{source}"]
    field = field_at(model, location)
    expected = "a string" if item else expectation(field) if field else "a known field"
    got = shown(detail["input"]) if field is None or field.repr else f"a {type(detail['input']).__name__}, which is secret and not shown"
    return [f"{name}: expected {expected}, got {got}{source}"]


def unknown_field(location: Location, model: type[BaseModel], source: str | None) -> str:
    """The line for a field at ``location`` that ``model`` does not have; ``source`` is where it came from."""
    section = section_at(model, location[:-1]) or model
    name = ".".join(part or '""' for part in location)
    return f"{name}: unknown field{f' ({source})' if source else ''}; {suggestion(location[-1], section.model_fields)}"


def field_at(model: type[BaseModel], location: Location) -> FieldInfo | None:
    """The field at ``location``, or None when there is none."""
    section: type[BaseModel] | None = model
    field: FieldInfo | None = None
    for name in location:
        field = section.model_fields.get(name) if section else None
        if field is None:
            return None
        section = section_of(field)
    return field


def section_at(model: type[BaseModel], location: Location) -> type[BaseModel] | None:
    """The section at ``location``, or None when that is a plain value or unknown."""
    if not location:
        return model
    field = field_at(model, location)
    return section_of(field) if field else None


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that ``field`` holds, or None when it holds a plain value."""
    kind, _ = _without_none(field.annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def is_text(field: FieldInfo) -> bool:
    """Whether ``field`` takes a string."""
    kind, _ = _without_none(field.annotation)
    return kind is str or get_origin(kind) is Literal


def is_optional(field: FieldInfo) -> bool:
    """Whether ``field`` may be null."""
    return _without_none(field.annotation)[1]


def expectation(field: FieldInfo) -> str:
    """What ``field`` takes: ``an integer 1…1000``, ``one of "float32", "bfloat16" or null``."""
    kind, optional = _without_none(field.annotation)
    bounds = {name: getattr(item, name) for item in _constraints(field) for name in ("ge", "le", "gt") if hasattr(item, name)}
    lowest, highest = bounds.get("ge"), bounds.get("le")
    if section := section_of(field):
        text = f"an object with the fields {', '.join(section.model_fields)}"
    elif get_origin(kind) is Literal:
        text = f"one of {', '.join(shown(choice) for choice in get_args(kind))}"
    elif get_origin(kind) is tuple:
        text = 'a list of strings (["…", "…"])'
    else:
        text = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[kind]
    if lowest is not None:
        text += f" {lowest}…{highest}" if highest is not None else f" of at least {lowest}"
    if "gt" in bounds:
        text += f" above {bounds['gt']}"
    return f"{text} or null" if optional else text


def suggestion(name: str, known: Iterable[str]) -> str:
    """How to go on after an unknown ``name``: the closest known one, or all of them."""
    names = list(known)
    close = closest(name, names)
    return f'did you mean "{close}"?' if close else f"known here: {', '.join(names)}"


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` is probably a misspelling of."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.6)), None)


def variable_name(location: Location) -> str:
    """The environment variable of the field at ``location``."""
    return "OPENPI_" + "__".join(location).upper()


def shown(value: object) -> str:
    """``value`` as JSON, cut to fit in a line, safe to print on any terminal."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    text = text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…"
    return text.encode("utf-8", "backslashreplace").decode()


def _constraints(field: FieldInfo) -> list[Any]:
    """The constraints on ``field``, also where it may be null instead."""
    found = list(field.metadata)
    for choice in get_args(field.annotation):
        for item in getattr(choice, "__metadata__", ()):
            found += item.metadata if isinstance(item, FieldInfo) else [item]
    return found


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """(the type without None and without validators, whether None was in it)."""
    choices = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    rest = [choice for choice in choices if choice is not types.NoneType]
    kind = rest[0]
    while hasattr(kind, "__metadata__"):
        kind = kind.__origin__
    return kind, len(rest) < len(choices)
