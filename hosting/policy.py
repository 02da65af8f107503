"""The contract that every policy fulfils, and the error tree that crosses it.

A policy maps one observation to one reply, both plain maps of strings to arrays, numbers, strings or maps
(reference/wire.md §1.4–1.5). It may block; the scheduler calls it on its slot's own thread. It raises the errors of
:mod:`pi0.errors`, which this module re-exports:

- :class:`RequestError` – the client's fault; the message goes back to the client word for word;
- :class:`UnavailableError` – it cannot be served now; the message goes back as well;
- :class:`CheckpointError`, :class:`ConfigError` – start-up fails with the message;
- anything else – the server's fault; the client gets an id, the log gets the traceback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from pi0.errors import (
    CheckpointError,
    ConfigError,
    DeadlineError,
    DoneError,
    DownloadError,
    DrainingError,
    MessageError,
    ModeError,
    ObservationError,
    OverloadedError,
    PlannerError,
    PolicyError,
    PromptTooLongError,
    RequestError,
    SupersededError,
    TandemError,
    UnauthorizedError,
    UnavailableError,
)

__all__ = [
    "BatchPlannerPolicy",
    "BatchPolicy",
    "CheckpointError",
    "ConfigError",
    "DeadlineError",
    "DoneError",
    "DownloadError",
    "DrainingError",
    "MessageError",
    "ModeError",
    "Observation",
    "ObservationError",
    "OverloadedError",
    "PlannerError",
    "PlannerPolicy",
    "Policy",
    "PolicyError",
    "PromptPreview",
    "PromptTooLongError",
    "Reply",
    "RequestError",
    "SupersededError",
    "TandemError",
    "UnauthorizedError",
    "UnavailableError",
    "Warmable",
]

Observation = Mapping[str, Any]
Reply = dict[str, Any]


@runtime_checkable
class Policy(Protocol):
    """The action slot's policy, and any policy behind an endpoint.

    ``metadata`` is what a client gets when it connects: numbers, strings, lists and maps, no arrays.
    """

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def infer(self, obs: Observation, /) -> Reply:
        """One observation → one reply; every array in it has the action horizon as its first axis.

        A policy that draws random numbers takes ``seed: int`` by keyword as well.
        """
        ...


@runtime_checkable
class BatchPolicy(Policy, Protocol):
    """A policy that serves several observations in one model call."""

    def infer_batch(self, observations: Sequence[Observation], /, *, seeds: Sequence[int | None] | None = None) -> list[Reply]:
        """What :meth:`infer` gives for each; ``seeds`` one per observation, None for fresh noise."""
        ...


@runtime_checkable
class PlannerPolicy(Protocol):
    """The planner slot's policy. Its prompt settings can be edited live, so they come with the request.

    What it answers depends on the prompt, the camera images and these settings alone; equal questions in flight are asked once. A planner that
    makes use of what it said last to the same robot, for its speed, takes ``previous: str | None`` by keyword as well (``infer_batch``: one per
    observation).
    """

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def infer(self, obs: Observation, /, *, generation_prompt_format: str | None = None, max_generation_tokens: int | None = None) -> Reply:
        """One observation → ``{"subtask": {"text": str, "ms": float, …}}``; None keeps the value the planner was loaded with."""
        ...


@runtime_checkable
class BatchPlannerPolicy(PlannerPolicy, Protocol):
    """A planner that serves several observations in one model call."""

    def infer_batch(
        self, observations: Sequence[Observation], /, *, generation_prompt_format: str | None = None, max_generation_tokens: int | None = None
    ) -> list[Reply]:
        """What :meth:`infer` gives for each."""
        ...


@runtime_checkable
class PromptPreview(Protocol):
    """A policy that can tell what becomes of a prompt, for whoever edits templates. Unlike the rest, it may be called on any thread."""

    def preview_prompt(self, prompt: str) -> dict[str, Any]:
        """A finished prompt (no placeholders) → ``{"text": str, "token_ids": list[int], "tokens": int, "max_tokens": int, "not_fitting": str}``.

        ``text`` is what is tokenized, with what the model's format adds; ``not_fitting`` the end of the prompt that has no room, empty where all of
        it fits.
        """
        ...


@runtime_checkable
class Warmable(Protocol):
    """A policy that has something to compile before it serves."""

    def warmup(self, *, max_batch: int = 1) -> None:
        """After it no call with up to ``max_batch`` observations compiles anything."""
        ...
