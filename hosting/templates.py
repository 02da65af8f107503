"""Prompt templates that cannot go wrong at run time, and the settings that may be edited while the service runs.

A template is text with bare ``{name}`` placeholders; ``{{`` and ``}}`` stand for literal braces. Everything else that
``str.format`` would accept (``{}``, ``{0}``, ``{task!r}``, ``{task:>9}``, ``{task.upper}``) is refused when the template is set, so
that no request can fail on it and no value that a client sends is ever interpreted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from pi0.errors import ConfigError, TandemError
from pi0.prompt import DEFAULT_GENERATION_PROMPT_FORMAT, DEFAULT_MAX_GENERATION_TOKENS, MAX_GENERATION_TOKENS

if TYPE_CHECKING:
    from hosting.settings_file import SettingsFile

logger = logging.getLogger(__name__)

MAX_TEMPLATE_CHARS: Final = 2_000
"""Longest template, in characters: far beyond what fits in a model's 200 prompt tokens, far below what could hurt."""

DEFAULT_ACTION_PROMPT_TEMPLATE: Final = "{task}. Subtask: {subtask}"

HISTORY: Final = 100
"""Revisions that are remembered, the one in force among them."""

LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")
"""JSON can spell half a character; no tokenizer, terminal or reply can carry it."""

_TOKEN = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]")


@dataclass(frozen=True)
class Template:
    """A parsed template; made by :func:`parse_template`.

    Attributes:
        text: the template as it was written.
        names: every name that :meth:`render` takes, whether or not the text uses it.
        parts: literal text and placeholder name in turn; the name is None after the last literal.
    """

    text: str
    names: frozenset[str]
    parts: tuple[tuple[str, str | None], ...]

    @property
    def placeholders(self) -> frozenset[str]:
        """The names that the text uses."""
        return frozenset(name for _, name in self.parts if name is not None)

    def render(self, **values: str) -> str:
        """The text with each placeholder replaced by its value, literally: braces in a value mean nothing.

        Raises:
            TypeError: ``values`` are not exactly ``names``.
        """
        if values.keys() != self.names:
            raise TypeError(f"render() takes {sorted(self.names)}, got {sorted(values)}")
        return "".join(literal if name is None else literal + values[name] for literal, name in self.parts)


def parse_template(text: str, required: Set[str], allowed: Set[str]) -> Template:
    """Check and parse ``text``.

    Args:
        text: the template, at most ``MAX_TEMPLATE_CHARS`` characters.
        required: placeholders that it must have.
        allowed: placeholders that it may have besides.

    Raises:
        ConfigError: one line saying what is wrong, at which character, and what to write instead.
    """
    names = frozenset(required | allowed)
    if not text.strip():
        raise ConfigError(f"is blank; write a text with {_listing(required)}")
    if len(text) > MAX_TEMPLATE_CHARS:
        raise ConfigError(f"has {len(text)} characters, at most {MAX_TEMPLATE_CHARS} are allowed; shorten it")
    if unpaired := LONE_SURROGATE.search(text):
        raise ConfigError(f"has half a character (a lone surrogate) at character {unpaired.start() + 1}; remove it")
    parts: list[tuple[str, str | None]] = []
    literal, end = "", 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        literal += text[end : match.start()]
        end = match.end()
        if token in ("{{", "}}"):
            literal += token[0]
        elif token[1:-1] in names:
            parts.append((literal, token[1:-1]))
            literal = ""
        else:
            raise ConfigError(f"{_fault(token)} at character {match.start() + 1}; use {_listing(names)}, and {{{{ or }}}} for a literal brace")
    parts.append((literal + text[end:], None))
    template = Template(text, names, tuple(parts))
    if missing := required - template.placeholders:
        raise ConfigError(f"has no {_listing(missing)}; put it where that text belongs")
    return template


def _fault(token: str) -> str:
    if len(token) == 1:
        return f"has a single {token!r}"
    cut = token if len(token) <= 40 else token[:39] + "…"
    if not token[1:-1].strip():
        return f"has a placeholder without a name, {cut!r},"
    return f"has an unknown placeholder {cut!r}"


def _listing(names: Set[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in sorted(names, reverse=True))


def parse_generation_prompt_format(text: str) -> Template:
    """The planner's own prompt: ``{task}`` is required, nothing else is allowed. Raises ConfigError."""
    return parse_template(text, frozenset({"task"}), frozenset())


def parse_action_prompt_template(text: str) -> Template:
    """The prompt the action policy gets: ``{subtask}`` is required; ``{task}`` is optional, since pi0.5's low level was trained
    on the subtask alone while openpi-flash passes both. Raises ConfigError."""
    return parse_template(text, frozenset({"subtask"}), frozenset({"task"}))


@dataclass(frozen=True)
class PromptSettings:
    """What may be edited live, as of one revision. A value of this class is always valid.

    Attributes:
        generation_prompt_format: the planner's prompt, with ``{task}``.
        action_prompt_template: the action policy's prompt in combined mode, with ``{subtask}`` and possibly ``{task}``.
        max_generation_tokens: longest subtask, in tokens (1…256).
        revision: 1 at start, one more with every change.

    Raises:
        ConfigError: a value is wrong; one ``field: problem`` line for each.
    """

    generation_prompt_format: str = DEFAULT_GENERATION_PROMPT_FORMAT
    action_prompt_template: str = DEFAULT_ACTION_PROMPT_TEMPLATE
    max_generation_tokens: int = DEFAULT_MAX_GENERATION_TOKENS
    revision: int = 1
    _generation_prompt: Template = field(init=False, repr=False, compare=False)
    _action_prompt: Template = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        problems: list[str] = []
        try:
            object.__setattr__(self, "_generation_prompt", parse_generation_prompt_format(self.generation_prompt_format))
        except ConfigError as error:
            problems.append(f"generation_prompt_format: {error}")
        try:
            object.__setattr__(self, "_action_prompt", parse_action_prompt_template(self.action_prompt_template))
        except ConfigError as error:
            problems.append(f"action_prompt_template: {error}")
        if not 1 <= self.max_generation_tokens <= MAX_GENERATION_TOKENS:
            problems.append(f"max_generation_tokens: expected an integer 1…{MAX_GENERATION_TOKENS}, got {self.max_generation_tokens}")
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def values(self) -> dict[str, Any]:
        """What may be edited, by name."""
        return {name: getattr(self, name) for name in EDITABLE}

    @property
    def etag(self) -> str:
        """A strong HTTP entity tag, quotes included: the revision and a hash of the values, since revisions are counted anew after a restart."""
        digest = hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()
        return f'"{self.revision}-{digest[:8]}"'

    def generation_prompt(self, *, task: str) -> str:
        """The planner's prompt for ``task``, which is inserted as it is: the planner cleans tasks first (:func:`pi0.tokenizer.clean_task`)."""
        return self._generation_prompt.render(task=task)

    def action_prompt(self, *, task: str, subtask: str) -> str:
        """The prompt the action policy gets for ``task`` and the planner's ``subtask``."""
        return self._action_prompt.render(task=task, subtask=subtask)


EDITABLE: Final = ("generation_prompt_format", "action_prompt_template", "max_generation_tokens")
"""The names of :class:`PromptSettings` that may be edited."""


@dataclass(frozen=True)
class Revision:
    """One entry of the history.

    Attributes:
        settings: the values, with their revision.
        changed_at: when they came into force, ISO 8601 in UTC.
        source: ``start``, ``update`` or ``rollback to N``.
    """

    settings: PromptSettings
    changed_at: str
    source: str


class StaleSettingsError(TandemError):
    """An edit was meant for settings that are no longer in force; nothing has changed.

    Attributes:
        current: the settings in force.
    """

    def __init__(self, message: str, current: PromptSettings) -> None:
        super().__init__(message)
        self.current = current


class UnknownRevisionError(TandemError):
    """A revision is not, or no longer, in the history."""


class LiveSettings:
    """The prompt settings in force and their history. Readers take :attr:`current` once per request, so no reply can mix two revisions.

    Safe to use from any thread; reading never waits for a change, which with a ``file`` takes as long as the disk.

    Args:
        settings: the configuration's values.
        file: where changes are kept across restarts; what it holds wins over ``settings``. None: nowhere.
        clock: seconds since the epoch.

    Raises:
        ConfigError: ``file`` cannot be used.
    """

    def __init__(self, settings: PromptSettings, *, file: SettingsFile | None = None, clock: Callable[[], float] = time.time) -> None:
        self._file = file
        self._clock = clock
        self._updating = threading.Lock()
        kept = file.load() if file is not None else ()
        # One tuple holds both what is in force and how it came to be, so that a change is one assignment.
        self._revisions: tuple[Revision, ...] = kept or (Revision(settings, self._now(), "start"),)
        if file is not None and kept:
            _log_kept(kept[-1], settings, str(file.path))

    @property
    def current(self) -> PromptSettings:
        """The settings in force now, as one immutable value."""
        return self._revisions[-1].settings

    @property
    def history(self) -> tuple[Revision, ...]:
        """The last ``HISTORY`` revisions, the oldest first, the one in force last."""
        return self._revisions

    def update(
        self,
        *,
        generation_prompt_format: str | None = None,
        action_prompt_template: str | None = None,
        max_generation_tokens: int | None = None,
        expected: Set[str] | None = None,
    ) -> PromptSettings:
        """Change the values given (None leaves one as it is), all or none, and return the settings now in force.

        The revision grows only when a value differs. Every change is logged with the old and the new value.

        Args:
            expected: entity tags (:attr:`PromptSettings.etag`), one of which the settings in force must have; None: whatever is in force.

        Raises:
            ConfigError: a value is wrong; one ``field: problem`` line for each, and nothing has changed.
            StaleSettingsError: none of ``expected`` is in force.
            SettingsFileError: the change cannot be kept, and has not been made.
        """
        wanted = {
            "generation_prompt_format": generation_prompt_format,
            "action_prompt_template": action_prompt_template,
            "max_generation_tokens": max_generation_tokens,
        }
        with self._updating:
            self._check(expected)
            return self._change({name: value for name, value in wanted.items() if value is not None}, "update")

    def rollback(self, revision: int, *, expected: Set[str] | None = None) -> PromptSettings:
        """Make the values of an earlier ``revision`` the newest one, and return the settings now in force; otherwise as :meth:`update`.

        Raises:
            UnknownRevisionError: the history does not have it; says which it has.
            StaleSettingsError, SettingsFileError: as :meth:`update`.
        """
        with self._updating:
            self._check(expected)
            for entry in self._revisions:
                if entry.settings.revision == revision:
                    return self._change(entry.settings.values, f"rollback to {revision}")
            known = ", ".join(str(entry.settings.revision) for entry in self._revisions)
            raise UnknownRevisionError(f"revision: {revision} is not in the history, which has the last {HISTORY}; take one of {known}")

    def _check(self, expected: Set[str] | None) -> None:
        current = self.current
        if expected is not None and current.etag not in expected:
            raise StaleSettingsError(
                f"revision {current.revision} with the ETag {current.etag} is in force; read it again, then repeat the change",
                current,
            )

    def _change(self, values: Mapping[str, str | int], source: str) -> PromptSettings:
        old = self.current
        changes = {name: value for name, value in values.items() if value != getattr(old, name)}
        if not changes:
            return old
        new = dataclasses.replace(old, **changes, revision=old.revision + 1)  # type: ignore[arg-type]
        revisions = (*self._revisions, Revision(new, self._now(), source))[-HISTORY:]
        if self._file is not None:
            self._file.save(revisions)
        self._revisions = revisions
        how = "" if source == "update" else f", {source}"
        for name, value in changes.items():
            logger.info("prompt settings revision %d%s: %s changed from %r to %r", new.revision, how, name, getattr(old, name), value)
        return new

    def _now(self) -> str:
        return datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _log_kept(kept: Revision, configured: PromptSettings, path: str) -> None:
    logger.info("prompt settings revision %d of %s, kept in %s", kept.settings.revision, kept.changed_at, path)
    for name, value in kept.settings.values.items():
        if value != (other := getattr(configured, name)):
            logger.info("%s: %r from %s wins over %r from the configuration; delete that file to have the configuration's", name, value, path, other)
