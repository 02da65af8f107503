"""The admin API: whether the service is well, what it has loaded and whom it serves, and the prompt settings (:mod:`hosting.admin_prompts`).

Every refusal is JSON whose ``detail`` is plain text, one line per problem, in the words of the configuration file's errors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, FastAPI, HTTPException, Query, Response, Security
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field

from hosting.admin_access import AccessMiddleware
from hosting.admin_bodies import StrictRoute
from hosting.admin_page import FILES, Page, add_page_routes
from hosting.admin_prompts import Refusal, add_prompt_routes, add_refusals
from hosting.calls import Slot
from hosting.policy import PromptPreview
from hosting.templates import LiveSettings

_DESCRIPTION = """Edit what the planner is asked and what the action policy is told, while robots are connected.
A change is in force from the next request on; a request that is running keeps the settings it started with."""

DEFAULT_SESSIONS: Final = 100
MAX_SESSIONS: Final = 10_000

SlotState = Literal["loading", "warming", "ready", "stuck", "draining"]


class Health(BaseModel):
    """The process runs; how far it is, and with what."""

    status: Literal["ok", "starting", "stuck", "draining"] = Field(
        description="`starting` until every slot is loaded and warmed up; `stuck`: a model call does not come back."
    )
    mode: str = Field(examples=["combined"])
    slots: list[str] = Field(examples=[["action", "planner"]])


class Readiness(BaseModel):
    """What is served, and where."""

    ready: bool = Field(description="Whether requests are taken; the status code is 503 where not.")
    mode: str = Field(examples=["combined"])
    slots: dict[str, SlotState] = Field(examples=[{"action": "ready", "planner": "loading"}])
    addresses: dict[str, str] = Field(examples=[{"action": "ws://127.0.0.1:8000"}])
    quic_certificate_sha256: str | None = Field(description="What QUIC clients pin; null where QUIC is not served.")


class ServerLive(BaseModel):
    """KServe's liveness."""

    live: Literal[True] = True


class ServerReady(BaseModel):
    """KServe's readiness."""

    ready: bool


class Sessions(BaseModel):
    """What is remembered of robots between their requests."""

    count: int = Field(description="How many there are.", examples=[1])
    limit: int = Field(description="How many are listed at most.", examples=[DEFAULT_SESSIONS])
    sessions: list[dict[str, Any]]


def create_admin_app(
    settings: LiveSettings | None,
    *,
    mode: str,
    slots: Sequence[Slot],
    status: Callable[[], Mapping[str, Any]],
    version: str,
    api_key: str | None = None,
    metrics: Callable[[], tuple[bytes, str]] | None = None,
    slot_details: Callable[[], Mapping[str, Any]] = dict,
    sessions: Callable[[int], tuple[int, Sequence[Mapping[str, Any]]]] = lambda limit: (0, ()),
    previews: Callable[[], Mapping[Slot, PromptPreview]] = dict,
    page: Page | None = None,
) -> FastAPI:
    """The admin API as an ASGI application. All callables are called on the event loop.

    Args:
        settings: the settings that ``/config`` edits; None: there is no planner, and nothing to edit.
        mode: ``combined``, ``action_only`` or ``planner_only``.
        slots: the slots that are configured.
        status: the fields of :class:`Readiness` at the time of the call.
        version: the version of Tandem, shown in the API's description.
        api_key: what everything but health and readiness needs; None: nothing does, but requests must name a loopback host.
        metrics: the body of ``GET /metrics`` and its content type; None: there is no such page.
        slot_details: slot → what ``GET /slots`` tells of it; JSON.
        sessions: limit → how many sessions there are, and what ``GET /sessions`` tells of at most so many; JSON.
        previews: slot → its policy, of those that are loaded and can preview a prompt.
        page: what ``/`` shows; None: there is no such page.
    """
    app = FastAPI(title="Tandem admin", version=version, description=_DESCRIPTION, redoc_url=None)
    app.add_middleware(AccessMiddleware, api_key=api_key, public=FILES if page is not None else ())
    add_refusals(app)

    def is_ready(response: Response) -> Mapping[str, Any]:
        found = status()
        response.status_code = 200 if found["ready"] else 503
        return found

    @app.get("/health", summary="Is it up, and with what; 200 as long as the process runs")
    async def health() -> Health:
        found = status()
        return Health(status="ok" if found["ready"] else _unready(found["slots"].values()), mode=mode, slots=list(slots))

    @app.get("/ready", summary="What is served, and whether it is ready", responses={503: {"model": Readiness}})
    async def ready(response: Response) -> Readiness:
        return Readiness(**is_ready(response))

    @app.get("/v2/health/live", summary="KServe's name of /health")
    async def live_v2() -> ServerLive:
        return ServerLive()

    @app.get("/v2/health/ready", summary="KServe's name of /ready", responses={503: {"model": ServerReady}})
    async def ready_v2(response: Response) -> ServerReady:
        return ServerReady(ready=is_ready(response)["ready"])

    guarded = APIRouter(route_class=StrictRoute)
    if api_key is not None:
        # AccessMiddleware asks for the key, and before routing; this is for the OpenAPI page to say so.
        scheme = HTTPBearer(description="`admin.api_key`; `Authorization: Api-Key KEY` and `X-API-Key: KEY` do as well.", auto_error=False)
        guarded = APIRouter(
            route_class=StrictRoute,
            dependencies=[Security(scheme)],
            responses={401: {"model": Refusal, "description": "The API key is missing or wrong."}},
        )

    if metrics is not None:

        @guarded.get("/metrics", summary="Counters, gauges and histograms for Prometheus", response_class=PlainTextResponse)
        async def get_metrics() -> Response:
            body, content_type = metrics()
            return Response(body, headers={"Content-Type": content_type})

    @guarded.get("/slots", summary="What is loaded, and how it is doing")
    async def get_slots() -> dict[str, Any]:
        return dict(slot_details())

    @guarded.get("/sessions", summary="Whom it serves", responses={422: {"model": Refusal}})
    async def get_sessions(
        limit: Annotated[int, Query(ge=1, le=MAX_SESSIONS, description="How many to list.")] = DEFAULT_SESSIONS,
    ) -> Sessions:
        count, listed = sessions(limit)
        return Sessions(count=count, limit=limit, sessions=[dict(session) for session in listed])

    if settings is not None:
        add_prompt_routes(guarded, settings, combined="action" in slots, slot_states=lambda: status()["slots"], previews=previews)
    else:

        @guarded.api_route("/config{rest:path}", methods=["GET", "PATCH", "POST"], include_in_schema=False)
        async def no_planner(rest: str) -> None:
            raise HTTPException(404, "no planner is configured; there is nothing to edit")

    if page is not None:
        add_page_routes(guarded, page, settings, version=version, status=status, slot_details=slot_details)

    app.include_router(guarded)
    return app


def _unready(states: Collection[str]) -> Literal["starting", "stuck", "draining"]:
    if "stuck" in states:
        return "stuck"
    return "draining" if "draining" in states else "starting"
