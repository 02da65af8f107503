"""The task of an observation, and the settings of a planner's prompt that configuration and planner share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pi0.errors import ObservationError

DEFAULT_GENERATION_PROMPT_FORMAT: Final = "Task: {task}. Subtask: "
"""The planner's prompt (openpi-flash's default)."""

DEFAULT_MAX_GENERATION_TOKENS: Final = 20
MAX_GENERATION_TOKENS: Final = 256
"""Most tokens a subtask may be allowed to have; the planner's key-value buffer has as many slots."""
DEFAULT_DRAFTS: Final = 2
"""Guesses of its answer that the planner checks: what it said last, and what followed that the last time."""
MAX_DRAFTS: Final = 8


SEND_OR_SET_DEFAULT: Final = "send the task as text, or set action.default_prompt on the server"
"""What to do about a missing prompt where an action policy's default would help."""


def prompt_text(observation: Mapping[str, Any], default: str | None = None, *, remedy: str = "send the task as text") -> str:
    """The task in ``observation["prompt"]``: a str, a string array without axes, or UTF-8 bytes; ``default`` where the key is absent.

    ``remedy`` is what the error says to do when neither is there.

    Raises:
        ObservationError: neither is there, or the value is not text.
    """
    if "prompt" not in observation:
        if default is None:
            raise ObservationError(f"prompt: missing, and there is no default; {remedy}")
        return default
    value = observation["prompt"]
    # Duck-typed, so that configuration alone does not pull in numpy.
    if getattr(value, "ndim", None) == 0 and value.dtype.kind in "US":
        try:
            value = value.item()
        except (ValueError, SystemError) as error:  # numpy lets the interpreter's own error through
            raise ObservationError("prompt: a string array with values that are no Unicode characters, expected text") from error
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ObservationError(f"prompt: {len(value)} bytes that are not UTF-8 (at byte {error.start}), expected text") from error
    if not isinstance(value, str):
        what = f"an array of shape {list(value.shape)} and dtype {value.dtype}" if hasattr(value, "dtype") else type(value).__name__
        raise ObservationError(f"prompt: got {what}, expected text (str, 0-d string array or UTF-8 bytes)")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ObservationError(f"prompt: holds a lone surrogate (at character {error.start}), which is not text; send valid Unicode") from error
    return str(value)
