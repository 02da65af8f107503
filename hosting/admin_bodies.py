"""JSON bodies of the admin API: bounded, strict, sent as what they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, Final, cast

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from hosting import strict_json
from hosting.config_problems import shown, validation_problems

MAX_BODY_BYTES: Final = 1 << 16
"""Room for both templates at their longest, every character escaped. A body is parsed on the event loop, while robots wait."""

BODY_TIMEOUT_S: Final = 10.0

_TOLD_PROBLEMS: Final = 20
_JSON: Final = "application/json"


class _StrictRequest(Request):
    async def stream(self) -> AsyncGenerator[bytes, None]:
        count = 0
        async for chunk in super().stream():
            count += len(chunk)
            if count > MAX_BODY_BYTES:
                raise HTTPException(413, f"body: has more than {MAX_BODY_BYTES} bytes; shorten it")
            yield chunk

    async def body(self) -> bytes:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await super().body()
        except TimeoutError:
            # The rest may still come, and is no next request.
            raise HTTPException(408, f"body: has not come within {BODY_TIMEOUT_S:g} s; send it again", {"Connection": "close"}) from None

    async def json(self) -> Any:
        body = await self.body()
        try:
            return strict_json.loads(body)
        except strict_json.StrictJSONError as error:
            raise HTTPException(422, str(error)) from None
        except UnicodeDecodeError as error:
            raise HTTPException(422, f"body: not UTF-8 text (byte {error.start}); send it as UTF-8") from None


class StrictRoute(APIRoute):
    """A route whose body, where it takes one, must say that it is JSON (415), be at most ``MAX_BODY_BYTES`` long (413), come within
    ``BODY_TIMEOUT_S`` (408) and give no name twice; what is wrong with a request is told in the words of the configuration's errors, one line
    per problem (422)."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        model = cast("type[BaseModel] | None", self.body_field.field_info.annotation if self.body_field else None)

        async def handle(request: Request) -> Response:
            content_type = request.headers.get("content-type", "")
            if model is not None and content_type.partition(";")[0].strip().lower() != _JSON:
                got = shown(content_type) if content_type else "none"
                raise HTTPException(415, f'body: send JSON with the header "Content-Type: {_JSON}", got {got}')
            try:
                return await handler(_StrictRequest(request.scope, request.receive))
            except RequestValidationError as error:
                raise HTTPException(422, "\n".join(_told(error.errors(), model))) from None

        return handle


def _told(details: Sequence[ErrorDetails], model: type[BaseModel] | None) -> list[str]:
    lines = [line for detail in details[:_TOLD_PROBLEMS] for line in _problems(detail, model)]
    return lines if len(details) <= _TOLD_PROBLEMS else [*lines, f"and {len(details) - _TOLD_PROBLEMS} more problems"]


def _problems(detail: ErrorDetails, model: type[BaseModel] | None) -> list[str]:
    where, *location = detail["loc"]
    if where != "body" or model is None:
        return [f"{location[0]}: {detail['msg'][:1].lower()}{detail['msg'][1:]}, got {shown(detail['input'])}"]
    if detail["type"] == "json_invalid":
        return [f"body: not valid JSON at character {location[0]}: {detail['ctx']['error']}"]
    if not location:
        got = "nothing" if detail["type"] == "missing" else shown(detail["input"])
        return [f"body: expected a JSON object with some of {', '.join(model.model_fields)}; got {got}"]
    if detail["type"] == "missing":
        return [f"{location[0]}: missing; send it in the body"]
    return validation_problems([{**detail, "loc": tuple(location)}], model, lambda _: None)
