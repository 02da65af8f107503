"""Which of the planner's subtasks say that nothing is left to do (``planner.done_subtasks``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pi0.errors import ConfigError


class DoneSubtasks:
    """The texts that end a task. False where there are none: then no subtask is flagged.

    A planner writes as its training texts were written, and a person writes the setting from memory: so case, outer whitespace and one final full
    stop do not count, on either side. Anything else does.

    Args:
        texts: as ``planner.done_subtasks``.

    Raises:
        ConfigError: one of them is blank, or the same as another.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        known: dict[str, str] = {}
        for index, text in enumerate(texts):
            plain = _plain(text)
            if not plain:
                raise ConfigError(f"[{index}] is blank ({text!r}); write what the planner says when nothing is left to do, or leave it out")
            if plain in known:
                raise ConfigError(
                    f"{known[plain]!r} and {text!r} are the same, as case, outer spaces and a final full stop do not count; keep one of them"
                )
            known[plain] = text
        self._known = frozenset(known)

    def __bool__(self) -> bool:
        return bool(self._known)

    def says(self, subtask: Any) -> bool:
        """Whether ``subtask`` (a reply's map, with its ``text``) says so. An empty text never does: it is what stands in for a plan that failed."""
        text = subtask.get("text") if isinstance(subtask, Mapping) else None
        return isinstance(text, str) and _plain(text) in self._known

    def flag(self, subtask: Any) -> dict[str, bool]:
        """What a reply's ``subtask`` says of it: ``done``, true or false; nothing where there are no such texts."""
        return {"done": self.says(subtask)} if self else {}


def done_rows(reply: Mapping[str, Any]) -> dict[int, str]:
    """The rows of a reply whose subtask is flagged done, and what it says; a reply that is not batched is row 0."""
    subtasks = reply.get("subtask")
    rows = subtasks if isinstance(subtasks, list) else [subtasks]
    return {index: str(row.get("text")) for index, row in enumerate(rows) if isinstance(row, Mapping) and row.get("done") is True}


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().casefold()
