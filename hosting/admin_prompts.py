"""``/config`` of the admin API: the prompt settings, editable while the service runs, their history, and what becomes of a prompt."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

from fastapi import APIRouter, FastAPI, Header, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hosting.calls import Slot
from hosting.config import ActionPromptTemplate, GenerationPromptFormat, MaxGenerationTokens, Text
from hosting.policy import PromptPreview
from hosting.settings_file import SettingsFileError
from hosting.templates import (
    DEFAULT_ACTION_PROMPT_TEMPLATE,
    HISTORY,
    LONE_SURROGATE,
    LiveSettings,
    PromptSettings,
    Revision,
    StaleSettingsError,
    UnknownRevisionError,
)
from pi0.errors import ConfigError
from pi0.prompt import DEFAULT_GENERATION_PROMPT_FORMAT, DEFAULT_MAX_GENERATION_TOKENS
from pi0.tokenizer import clean_task

logger = logging.getLogger(__name__)

_ETAG: Final = re.compile(r'(?:W/)?"[^"]*"')
_UNLOADED: Final = frozenset({"loading", "warming"})


def _unicode(text: str) -> str:
    if LONE_SURROGATE.search(text):
        raise ValueError("has half a character (a lone surrogate); remove it")
    return text


_GenerationPromptFormat = Annotated[
    GenerationPromptFormat,
    Field(
        description="The planner's prompt. Must have `{task}` and no other placeholder; `{{` and `}}` are literal braces.",
        examples=[DEFAULT_GENERATION_PROMPT_FORMAT],
    ),
]
_ActionPromptTemplate = Annotated[
    ActionPromptTemplate,
    Field(
        description="The action policy's prompt in combined mode. Must have `{subtask}`, may have `{task}`. "
        "In planner-only mode it is kept but has no effect.",
        examples=[DEFAULT_ACTION_PROMPT_TEMPLATE, "{subtask}"],
    ),
]
_MaxGenerationTokens = Annotated[MaxGenerationTokens, Field(description="Longest subtask, in tokens.", examples=[DEFAULT_MAX_GENERATION_TOKENS])]


class PromptConfig(BaseModel):
    """The prompt settings in force."""

    generation_prompt_format: _GenerationPromptFormat
    action_prompt_template: _ActionPromptTemplate
    max_generation_tokens: _MaxGenerationTokens
    revision: int = Field(description="1 at the first start, one more with every change.", examples=[1])


class PromptConfigChange(BaseModel):
    """The settings to change; those left out stay as they are."""

    # The factories keep the fields optional without inviting null or showing a default that is none.
    model_config = ConfigDict(extra="forbid")

    generation_prompt_format: _GenerationPromptFormat = Field(default_factory=str)
    action_prompt_template: _ActionPromptTemplate = Field(default_factory=str)
    max_generation_tokens: _MaxGenerationTokens = Field(default_factory=int)


class PromptConfigRevision(PromptConfig):
    """The prompt settings as of one revision."""

    changed_at: str = Field(description="When it came into force, ISO 8601 in UTC.", examples=["2026-01-31T12:00:00.000Z"])
    source: str = Field(description="`start`, `update` or `rollback to N`.", examples=["update"])


class PromptHistory(BaseModel):
    """The revisions that are remembered."""

    revisions: list[PromptConfigRevision] = Field(description=f"The newest first; at most {HISTORY}.")


class PreviewRequest(PromptConfigChange):
    """A task, and settings to try on it without setting them; those left out are as in force."""

    task: Annotated[str, AfterValidator(_unicode)] = Field(description="What a robot would send as `prompt`.", examples=["tidy the table"])
    subtask: Text = Field(
        default_factory=str, description="What the planner might answer, for the action policy's prompt.", examples=["pick up the cup"]
    )


class SlotPreview(BaseModel):
    """What one slot would get."""

    prompt: str | None = Field(description="The template with its placeholders filled in; null where `subtask` is needed for that.")
    text: str | None = Field(default=None, description="What is tokenized: the prompt as the model's own format changes it.")
    token_ids: list[int] | None = None
    tokens: int | None = Field(default=None, description="How many tokens the prompt has; null: `reason` says why it is not known.")
    max_tokens: int | None = Field(default=None, description="How many the model takes.")
    not_fitting: str | None = Field(default=None, description="The end of the prompt for which there is no room; empty where all of it fits.")
    reason: str | None = Field(default=None, description="Why there are no tokens.")


class Preview(BaseModel):
    """What becomes of a task. Nothing is changed, and no model is called."""

    revision: int = Field(description="The revision in force, which settings that were not given are of.")
    planner: SlotPreview
    action: SlotPreview | None = Field(description="Null in planner-only mode.")


class Refusal(BaseModel):
    """Why nothing was changed."""

    detail: str = Field(
        description="One line per problem, the field first.",
        examples=["generation_prompt_format: has no {task}; put it where that text belongs"],
    )


_ETAG_HEADER: Final[dict[str, Any]] = {"ETag": {"description": "Names these settings, for `If-Match`.", "schema": {"type": "string"}}}
_OK: Final[dict[int | str, dict[str, Any]]] = {200: {"headers": _ETAG_HEADER}}
_BAD_BODY: Final[dict[int | str, dict[str, Any]]] = {
    408: {"model": Refusal, "description": "The body does not come."},
    413: {"model": Refusal, "description": "The body is too long."},
    415: {"model": Refusal, "description": "The body does not say that it is JSON."},
    422: {"model": Refusal, "description": "The body, or a value in it, is wrong."},
}
_CHANGES: Final[dict[int | str, dict[str, Any]]] = {
    403: {"model": Refusal, "description": "A page of another site asked for it."},
    412: {"model": Refusal, "description": "Other settings than those that `If-Match` names are in force.", "headers": _ETAG_HEADER},
    500: {"model": Refusal, "description": "The change could not be kept in `admin.settings_file`, and was not made."},
}

_IfMatch = Annotated[
    str | None,
    Header(description="The `ETag` of the settings that the change is meant for; `*`, or none: whatever is in force.", examples=['"1-5b1c2d3e"']),
]
_IfNoneMatch = Annotated[str | None, Header(description="The `ETag` of settings that are known already.")]


def add_prompt_routes(
    router: APIRouter,
    settings: LiveSettings,
    *,
    combined: bool,
    slot_states: Callable[[], Mapping[str, str]],
    previews: Callable[[], Mapping[Slot, PromptPreview]],
) -> None:
    """Serve ``/config`` and what is below it.

    Args:
        router: its routes check bodies (:class:`hosting.admin_bodies.StrictRoute`).
        combined: whether there is an action slot whose prompt is rewritten.
        slot_states: slot → its state at the time of the call.
        previews: the loaded policies that can preview a prompt, by slot.
    """

    @router.get(
        "/config",
        summary="The prompt settings in force",
        response_model=PromptConfig,
        responses={**_OK, 304: {"description": "They are those that `If-None-Match` names."}},
    )
    async def get_config(response: Response, if_none_match: _IfNoneMatch = None) -> PromptConfig | Response:
        current = settings.current
        if if_none_match is not None and _known(if_none_match, current.etag):
            return Response(status_code=304, headers={"ETag": current.etag})
        return _reply(current, response)

    # Changes wait for one another and for the disk, so they are made on a thread: the event loop serves robots.

    @router.patch("/config", summary="Change prompt settings, all of those given or none", responses={**_OK, **_CHANGES, **_BAD_BODY})
    async def patch_config(change: PromptConfigChange, response: Response, if_match: _IfMatch = None) -> PromptConfig:
        given = change.model_dump(include=change.model_fields_set)
        if not given:
            raise ConfigError(f"body: names no setting; send at least one of {', '.join(PromptConfigChange.model_fields)}")
        return _reply(await run_in_threadpool(settings.update, **given, expected=_expected(if_match)), response)

    @router.get("/config/history", summary="The last revisions")
    async def get_history() -> PromptHistory:
        return PromptHistory(revisions=[_historic(revision) for revision in reversed(settings.history)])

    @router.post(
        "/config/rollback/{revision}",
        summary="Make the values of an earlier revision the newest one",
        responses={**_OK, **_CHANGES, 404: {"model": Refusal, "description": "The history does not have it."}, 422: _BAD_BODY[422]},
    )
    async def rollback(
        revision: Annotated[int, Path(description="One that `/config/history` lists.")], response: Response, if_match: _IfMatch = None
    ) -> PromptConfig:
        return _reply(await run_in_threadpool(settings.rollback, revision, expected=_expected(if_match)), response)

    @router.post("/config/preview", summary="What the models would read, with these settings or others", responses={403: _CHANGES[403], **_BAD_BODY})
    async def preview(body: PreviewRequest) -> Preview:
        current = settings.current
        tried = dataclasses.replace(current, **body.model_dump(include=body.model_fields_set - {"task", "subtask"}))
        loaded, states = previews(), slot_states()

        def slot_preview(slot: Slot, prompt: str) -> SlotPreview:
            policy = loaded.get(slot)
            if policy is not None:
                return SlotPreview(prompt=prompt, **policy.preview_prompt(prompt))
            if states[slot] in _UNLOADED:
                return SlotPreview(prompt=prompt, reason=f"the {slot} slot is {states[slot]}; ask again when it is ready")
            return SlotPreview(prompt=prompt, reason=f"the policy of the {slot} slot does not tell its tokens")

        planner = await run_in_threadpool(slot_preview, "planner", tried.generation_prompt(task=clean_task(body.task)))
        action = None
        if combined and body.subtask:
            action = await run_in_threadpool(slot_preview, "action", tried.action_prompt(task=body.task, subtask=body.subtask))
        elif combined:
            action = SlotPreview(prompt=None, reason="no subtask was given; send an example to see what the action policy would get")
        return Preview(revision=current.revision, planner=planner, action=action)


def add_refusals(app: FastAPI) -> None:
    """Answer the errors that a change may end with."""

    @app.exception_handler(ConfigError)
    async def wrong(request: Request, error: ConfigError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(UnknownRevisionError)
    async def unknown(request: Request, error: UnknownRevisionError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 404)

    @app.exception_handler(StaleSettingsError)
    async def stale(request: Request, error: StaleSettingsError) -> JSONResponse:
        return JSONResponse({"detail": f"If-Match: got {request.headers['if-match'] or 'nothing'}; {error}"}, 412, {"ETag": error.current.etag})

    @app.exception_handler(SettingsFileError)
    async def not_kept(request: Request, error: SettingsFileError) -> JSONResponse:
        logger.error("prompt settings were not changed: %s", error)
        return JSONResponse({"detail": f"admin.settings_file: {error}"}, 500)


def _expected(if_match: str | None) -> frozenset[str] | None:
    """The entity tags of an ``If-Match``, of which weak ones never match; None where it sets no condition."""
    return None if if_match is None or if_match.strip() == "*" else frozenset(_ETAG.findall(if_match))


def _known(if_none_match: str, etag: str) -> bool:
    """Whether an ``If-None-Match`` names ``etag``, as a strong or a weak one."""
    return if_none_match.strip() == "*" or etag in {tag.removeprefix("W/") for tag in _ETAG.findall(if_none_match)}


def _reply(settings: PromptSettings, response: Response) -> PromptConfig:
    response.headers["ETag"] = settings.etag
    return PromptConfig(**settings.values, revision=settings.revision)


def _historic(revision: Revision) -> PromptConfigRevision:
    values = {**revision.settings.values, "revision": revision.settings.revision}
    return PromptConfigRevision(**values, changed_at=revision.changed_at, source=revision.source)
