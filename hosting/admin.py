"""The admin API: what is loaded, and the prompt settings, editable while the service runs.

Every refusal is a 422 whose ``detail`` is plain text, one line per problem, in the words of the configuration file's errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import ErrorDetails

from hosting.config import ActionPromptTemplate, GenerationPromptFormat, MaxGenerationTokens
from hosting.config_problems import validation_problems
from hosting.templates import (
    DEFAULT_ACTION_PROMPT_TEMPLATE,
    LiveSettings,
    PromptSettings,
)
from pi0.errors import ConfigError
from pi0.prompt import DEFAULT_GENERATION_PROMPT_FORMAT, DEFAULT_MAX_GENERATION_TOKENS

_DESCRIPTION = """Edit what the planner is asked and what the action policy is told, while robots are connected.
A change is in force from the next request on; a request that is running keeps the settings it started with."""

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


class Health(BaseModel):
    """Whether the service takes requests, and what it has loaded."""

    status: Literal["ok", "starting"] = Field(description="`starting` until every slot is loaded and warmed up.")
    mode: str = Field(examples=["combined"])
    slots: list[str] = Field(examples=[["action", "planner"]])


class Readiness(BaseModel):
    """What is served, and where."""

    ready: bool = Field(description="Whether requests are taken; the status code is 503 where not.")
    mode: str = Field(examples=["combined"])
    slots: dict[str, str] = Field(description="`loading`, `ready` or `draining`.", examples=[{"action": "ready", "planner": "loading"}])
    addresses: dict[str, str] = Field(examples=[{"action": "ws://127.0.0.1:8000"}])
    quic_certificate_sha256: str | None = Field(description="What QUIC clients pin; null where QUIC is not served.")


class PromptConfig(BaseModel):
    """The prompt settings in force."""

    generation_prompt_format: _GenerationPromptFormat
    action_prompt_template: _ActionPromptTemplate
    max_generation_tokens: _MaxGenerationTokens
    revision: int = Field(description="1 at start, one more with every change.", examples=[1])


class PromptConfigChange(BaseModel):
    """The settings to change; those left out stay as they are."""

    # The factories keep the fields optional without inviting null or showing a default that is none.
    model_config = ConfigDict(extra="forbid")

    generation_prompt_format: _GenerationPromptFormat = Field(default_factory=str)
    action_prompt_template: _ActionPromptTemplate = Field(default_factory=str)
    max_generation_tokens: _MaxGenerationTokens = Field(default_factory=int)


class Refusal(BaseModel):
    """Why nothing was changed."""

    detail: str = Field(
        description="One line per problem, the field first.",
        examples=["generation_prompt_format: has no {task}; put it where that text belongs"],
    )


def create_admin_app(settings: LiveSettings, *, mode: str, slots: Sequence[str], status: Callable[[], Mapping[str, Any]], version: str) -> FastAPI:
    """The admin API as an ASGI application.

    Args:
        settings: the settings that ``PATCH /config`` edits.
        mode: ``combined``, ``action_only`` or ``planner_only``.
        slots: the slots that are configured.
        status: the fields of :class:`Readiness` at the time of the call.
        version: the version of Tandem, shown in the API's description.
    """
    app = FastAPI(title="Tandem admin", version=version, description=_DESCRIPTION, redoc_url=None)

    @app.get("/health", summary="Is it up, and with what")
    async def health() -> Health:
        return Health(status="ok" if status()["ready"] else "starting", mode=mode, slots=list(slots))

    @app.get("/ready", summary="What is served, and whether it is ready", responses={503: {"model": Readiness}})
    async def ready(response: Response) -> Readiness:
        readiness = Readiness(**status())
        response.status_code = 200 if readiness.ready else 503
        return readiness

    @app.get("/config", summary="The prompt settings in force")
    async def get_config() -> PromptConfig:
        return _reply(settings.current)

    @app.patch("/config", summary="Change prompt settings, all of those given or none", responses={422: {"model": Refusal}})
    async def patch_config(change: PromptConfigChange) -> PromptConfig:
        given = change.model_dump(include=change.model_fields_set)
        if not given:
            raise ConfigError(f"body: names no setting; send at least one of {', '.join(PromptConfigChange.model_fields)}")
        return _reply(settings.update(**given))

    @app.exception_handler(ConfigError)
    async def refuse(request: Request, error: ConfigError) -> JSONResponse:
        return _refusal([str(error)])

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError) -> JSONResponse:
        return _refusal([line for detail in error.errors() for line in _body_problems(detail)])

    return app


def _body_problems(detail: ErrorDetails) -> list[str]:
    location = detail["loc"][1:]  # after "body"
    if detail["type"] == "json_invalid":
        return [f"body: not valid JSON at character {location[0]}: {detail['ctx']['error']}"]
    if not location:
        return [
            'body: expected a JSON object, sent with the header "Content-Type: application/json", '
            f"that has at least one of {', '.join(PromptConfigChange.model_fields)}"
        ]
    return validation_problems([{**detail, "loc": location}], PromptConfigChange, lambda _: None)


def _refusal(lines: list[str]) -> JSONResponse:
    return JSONResponse({"detail": "\n".join(lines)}, status_code=422)


def _reply(settings: PromptSettings) -> PromptConfig:
    return PromptConfig(
        generation_prompt_format=settings.generation_prompt_format,
        action_prompt_template=settings.action_prompt_template,
        max_generation_tokens=settings.max_generation_tokens,
        revision=settings.revision,
    )
