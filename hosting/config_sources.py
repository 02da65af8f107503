"""Where configuration values come from (command line, environment, JSON file), and who wins.

Every source is read into a :class:`Layer` of leaf values; :func:`merge` lays them over one another and keeps, for each value,
the name of the source it came from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hosting import strict_json
from hosting.config_problems import (
    Location,
    closest,
    expectation,
    field_at,
    is_optional,
    is_text,
    section_at,
    section_of,
    shown,
    suggestion,
    variable_name,
)
from hosting.strict_json import StrictJSONError
from pi0.errors import ConfigError

logger = logging.getLogger(__name__)

PREFIX: Final = "OPENPI_"

NOT_FIELDS: Final = frozenset(
    {
        "OPENPI_DATA_HOME",  # read by pi0.locations.default_data_home()
        "OPENPI_PYTORCH_COMPILE_MODE",  # read by pytorch_compile_mode()
        "OPENPI_OPEN_LOOP_HORIZON",  # a robot's client reads it
        "OPENPI_FLASH_TRANSPORT_BINARY",  # openpi-flash's sidecar, harmless to have set
    }
)
"""``OPENPI_`` variables that have a meaning but are no configuration field."""


@dataclass
class Layer:
    """Leaf values by location, the origin of each, and what could not be read, one line per problem."""

    values: dict[Location, object] = field(default_factory=dict)
    origins: dict[Location, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def put(self, location: Location, value: object, origin: str) -> None:
        """Set ``value`` at ``location``; a mapping is merged into what is there, anything else replaces it."""
        if isinstance(value, Mapping) and value:
            for name, item in value.items():
                self.put((*location, str(name)), item, origin)
            return
        below = [other for other in self.values if other[: len(location)] == location]
        if isinstance(value, Mapping) and below:
            return
        above = [other for other in self.values if location[: len(other)] == other]
        for other in {*below, *above}:
            del self.values[other], self.origins[other]
        self.values[location], self.origins[location] = value, origin

    def nested(self) -> dict[str, Any]:
        """The values as nested dicts."""
        tree: dict[str, Any] = {}
        for location, value in self.values.items():
            section = tree
            for name in location[:-1]:
                section = section.setdefault(name, {})
            section[location[-1]] = value
        return tree

    def origin(self, location: Location) -> str | None:
        """Where the value (or the first value in the section) at ``location`` came from."""
        return next((origin for other, origin in self.origins.items() if other[: len(location)] == location), None)


def merge(layers: Sequence[Layer]) -> Layer:
    """All ``layers`` in one, the weakest first."""
    merged = Layer()
    for layer in layers:
        for location, value in layer.values.items():
            merged.put(location, value, layer.origins[location])
        merged.problems += layer.problems
    return merged


def read_mapping(values: Mapping[str, object], origin: str) -> Layer:
    """A layer of nested ``values`` that all came from ``origin``."""
    layer = Layer()
    for name, value in values.items():
        layer.put((name,), value, origin)
    return layer


def read_file(path: Path, given_by: str) -> Layer:
    """A layer of what the JSON file at ``path`` says.

    Raises:
        ConfigError: the file cannot be read, or is not one JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file ({given_by}); correct the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror} ({given_by})") from None
    try:
        document = strict_json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected one JSON object, got {shown(document)}; see config.example.json")
    return read_mapping(document, f"file {path}")


def read_environment(model: type[BaseModel], environ: Mapping[str, str]) -> Layer:
    """A layer of the ``OPENPI_`` variables that name fields of ``model``: sections and fields joined by ``__``, in any case.

    A field that takes a string gets the text as it is; any other is read as JSON. A whole section may be given as a JSON object.
    ``null`` unsets what may be null.

    A variable that names no field is a problem when it is meant as one: it has a ``__``, or only its underscores are wrong.
    Others are logged as a warning and ignored, because container platforms set such names on their own (``OPENPI_PORT``).
    """
    layer = Layer()
    known = variables(model)
    found: dict[Location, str] = {}
    for variable in sorted((name for name in environ if name.upper().startswith(PREFIX)), key=lambda name: (name.count("__"), name)):
        name = variable.upper()
        if name in NOT_FIELDS:
            continue
        if name not in known:
            advice = _advice(model, name, known)
            if "__" in name or name.replace("_", "") in {other.replace("_", "") for other in known}:
                layer.problems.append(f"{variable}: names no configuration field, correct or unset it; {advice}")
            else:
                logger.warning("environment variable %s names no configuration field and is ignored; %s", variable, advice)
            continue
        location = known[name]
        if location in found:
            layer.problems.append(f"{variable}: is set twice, also as {found[location]}; unset one of them")
            continue
        found[location] = variable
        target = field_at(model, location)
        assert target is not None
        try:
            value = parse_value(environ[variable], target)
        except StrictJSONError as error:
            layer.problems.append(f"{variable}: {error}")
            continue
        layer.put(location, value, f"environment {variable}")
    return layer


def variables(model: type[BaseModel], section: Location = ()) -> dict[str, Location]:
    """Every environment variable that names a field or a section of ``model``, with where it belongs."""
    names: dict[str, Location] = {}
    for name, info in model.model_fields.items():
        location = (*section, name)
        names[variable_name(location)] = location
        if inner := section_of(info):
            names |= variables(inner, location)
    return names


def _advice(model: type[BaseModel], name: str, known: Mapping[str, Location]) -> str:
    *outer, last = name.removeprefix(PREFIX).lower().split("__")
    if outer and (section := section_at(model, tuple(outer))):
        return suggestion(last, section.model_fields)
    close = closest(name.removeprefix(PREFIX), [other.removeprefix(PREFIX) for other in known])
    return f"did you mean {PREFIX}{close}?" if close else "the names are in docs/configuration.md"


def parse_value(text: str, target: FieldInfo) -> object:
    """The value that ``text`` from outside a file gives ``target``: as it is where a string is taken, else read as JSON.

    ``null`` unsets what may be null; text that is not JSON stays text, so that validation can name what came.

    Raises:
        ValueError: a section that is not given as a JSON object, or JSON that a configuration must not contain.
    """
    if text == "null" and is_optional(target):
        return None
    if is_text(target):
        return text
    try:
        value: object = strict_json.loads(text)
    except StrictJSONError:
        raise
    except ValueError:
        value = text
    if section_of(target) and not isinstance(value, dict):
        raise StrictJSONError(f"expected {expectation(target)} as JSON, got {shown(text)}")
    return value
