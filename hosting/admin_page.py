"""The page of the admin port: what each robot sees, is told and does, live, and a person's word to it. Only with ``admin.page``.

The files in ``hosting/page`` have no data in them. What they show comes over the routes below ``/page``, which are the page's own: they may
change with any version, unlike the rest of the admin API.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any, Final

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import AfterValidator, BaseModel, ConfigDict

from hosting import page_images
from hosting.combined import MAX_TASK_CHARS
from hosting.config_problems import shown
from hosting.failures import client_text
from hosting.policy import Observation, Reply, RequestError, UnavailableError
from hosting.recent import Recent, plain
from hosting.sessions import Session, SessionStore
from hosting.templates import LONE_SURROGATE, LiveSettings
from pi0.cameras import CLIENT_CAMERAS

logger = logging.getLogger(__name__)

FILES: Final[Mapping[str, tuple[str, str]]] = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/plots.js": ("plots.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path → file in ``hosting/page`` and its type. A browser may load them without the key: it cannot send one before there is a page to ask for it."""

MAX_UPLOAD_BYTES: Final = 16 << 20
UPLOAD_TIMEOUT_S: Final = 30.0

_UPLOADS = 2
"""Pictures that are received and decoded at once."""

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_DATA_HEADERS: Final = {**_HEADERS, "Cache-Control": "no-store"}

Ask = Callable[[Observation], Awaitable[tuple[Reply, float]]]


@dataclass(frozen=True)
class Page:
    """What the page is made of.

    Attributes:
        recent: what it shows of robots.
        sessions: whom an instruction can be for.
        ask: puts one observation to the planner, gives its reply and the ms it took; None: there is no planner.
    """

    recent: Recent
    sessions: SessionStore
    ask: Ask | None


def _instruction(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank; write what the robot is to do, or DELETE the instruction")
    if len(text) > MAX_TASK_CHARS:
        raise ValueError(f"has {len(text)} characters, expected at most {MAX_TASK_CHARS}; shorten it")
    if unpaired := LONE_SURROGATE.search(text):
        raise ValueError(f"has half a character (a lone surrogate) at character {unpaired.start() + 1}; remove it")
    return text


class Instruction(BaseModel):
    """What an operator tells a robot."""

    model_config = ConfigDict(extra="forbid")

    text: Annotated[str, AfterValidator(_instruction)]


def add_page_routes(
    router: APIRouter,
    page: Page,
    settings: LiveSettings | None,
    *,
    version: str,
    status: Callable[[], Mapping[str, Any]],
    slot_details: Callable[[], Mapping[str, Any]],
) -> None:
    """Serve ``/`` and what is below ``/page``.

    Args:
        router: its routes check bodies (:class:`hosting.admin_bodies.StrictRoute`).
        settings: those in force; None: there is no planner.
        status, slot_details: as for :func:`hosting.admin.create_admin_app`.
    """
    process = secrets.token_hex(4)
    uploads = asyncio.Semaphore(_UPLOADS)
    encoded: dict[tuple[int, str], tuple[int, bytes]] = {}

    for path, (name, content_type) in FILES.items():
        router.add_api_route(path, _file(name, content_type), methods=["GET"], include_in_schema=False)

    def session_of(key: int) -> Session:
        session = page.sessions.by_key(key)
        if session is None:
            raise HTTPException(404, f"session {key}: is not remembered, or no longer; choose one that is")
        return session

    @router.get("/page/state", include_in_schema=False)
    async def state(session: int | None = None, since: int | None = None) -> Response:
        found = status()
        slots = {
            slot: {name: value for name, value in details.items() if name in ("state", "queued", "running", "running_s", "max_queue", "max_batch")}
            for slot, details in slot_details().items()
        }
        current = settings.current if settings is not None else None
        document = {
            "process": process,
            "version": version,
            "mode": found["mode"],
            "ready": found["ready"],
            "addresses": dict(found["addresses"]),
            "slots": slots,
            "settings": current and {"revision": current.revision, "etag": current.etag},
            **page.recent.overview(),
            "session": page.recent.details(session, since) if session is not None else None,
        }
        for kept in [kept for kept in encoded if page.recent.image(*kept) is None]:
            del encoded[kept]
        return Response(await run_in_threadpool(_encoded, document), media_type="application/json", headers=_DATA_HEADERS)

    @router.get("/page/sessions/{key}/images/{camera:path}", include_in_schema=False)
    async def image(key: int, camera: str) -> Response:
        found = page.recent.image(key, camera)
        if found is None:
            raise HTTPException(404, f"session {key} has no picture of {shown(camera)} now")
        version, array = found
        kept = encoded.get((key, camera))
        if kept is None or kept[0] != version:
            kept = encoded[key, camera] = (version, await run_in_threadpool(page_images.to_jpeg, array))
        return Response(kept[1], media_type="image/jpeg", headers=_DATA_HEADERS)

    @router.put("/page/sessions/{key}/instruction", include_in_schema=False)
    async def instruct(key: int, body: Instruction) -> dict[str, Any]:
        session = session_of(key)
        session.instruction = body.text
        logger.info("%s: an operator's instruction takes the place of its prompt: %r", _name(session), body.text)
        return {"key": key, "instruction": session.instruction}

    @router.delete("/page/sessions/{key}/instruction", include_in_schema=False)
    async def withdraw(key: int) -> dict[str, Any]:
        session = session_of(key)
        if session.instruction is not None:
            logger.info("%s: the operator's instruction was withdrawn; it follows its own prompt", _name(session))
        session.instruction = None
        return {"key": key, "instruction": None}

    @router.post("/page/plan", include_in_schema=False)
    async def plan(
        request: Request,
        task: Annotated[str, Query(min_length=1, max_length=MAX_TASK_CHARS)],
        camera: str = "base_0_rgb",
    ) -> dict[str, Any]:
        if page.ask is None or settings is None:
            raise HTTPException(404, "no planner is configured; there is nothing to try out")
        if not task.strip():
            raise HTTPException(422, "task: is blank; write what a robot would send as its prompt")
        if camera not in CLIENT_CAMERAS:
            raise HTTPException(422, f"camera: got {shown(camera)}, expected one of {', '.join(CLIENT_CAMERAS)}")
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type not in ("image/jpeg", "image/png"):
            raise HTTPException(415, f"body: send a picture as image/jpeg or image/png, got {shown(content_type) if content_type else 'none'}")
        try:
            async with uploads:
                picture = await run_in_threadpool(page_images.from_upload, await _upload(request))
            reply, ms = await page.ask({camera: picture, "prompt": task})
        except RequestError as error:
            raise HTTPException(422, str(error)) from None
        except UnavailableError as error:
            raise HTTPException(503, str(error)) from None
        except HTTPException:
            raise
        except Exception as error:  # noqa: BLE001 - as for a robot: an id for the person, the traceback for the log
            raise HTTPException(500, client_text(error, slot="planner")) from None
        subtask = reply.get("subtask")
        if not isinstance(subtask, Mapping):
            raise HTTPException(500, "the planner's reply has no subtask")
        return {
            "text": str(subtask.get("text", "")),
            "done": subtask.get("done") is True,
            "planner_ms": _milliseconds(subtask.get("ms")),
            "ms": round(ms, 1),
            "width": picture.shape[1],
            "height": picture.shape[0],
        }


def _encoded(document: dict[str, Any]) -> bytes:
    """As JSON; with all that is remembered of a session it takes milliseconds, which robots need not wait."""
    session = document["session"]
    return json.dumps({**document, "session": session and plain(session)}, allow_nan=False, separators=(",", ":")).encode()


def _file(name: str, content_type: str) -> Callable[[Request], Awaitable[Response]]:
    """What answers with a file of the package, and with 304 where the browser has it."""
    body = resources.files("hosting").joinpath("page", name).read_bytes()
    etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
    headers = {**_HEADERS, "Cache-Control": "no-cache", "ETag": etag}

    async def get(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=content_type, headers=headers)

    return get


async def _upload(request: Request) -> bytes:
    """The body, which may be longer than the JSON ones."""
    chunks: list[bytes] = []
    count = 0
    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT_S):
            async for chunk in Request(request.scope, request.receive).stream():
                count += len(chunk)
                if count > MAX_UPLOAD_BYTES:
                    raise HTTPException(413, f"body: has more than {MAX_UPLOAD_BYTES >> 20} MiB; send a smaller picture")
                chunks.append(chunk)
    except TimeoutError:
        text = f"body: has not come within {UPLOAD_TIMEOUT_S:g} s; send a smaller picture"
        raise HTTPException(408, text, {"Connection": "close"}) from None
    if not count:
        raise HTTPException(422, "body: is empty; send a JPEG or PNG file")
    return b"".join(chunks)


def _name(session: Session) -> str:
    return f"session {session.id!r}" if session.id is not None else f"session #{session.key} (anonymous)"


def _milliseconds(value: Any) -> float | None:
    return round(float(value), 1) if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9 else None
