"""A slot's WebSocket endpoint as one Starlette app: openpi's protocol on any path, ``/healthz`` beside it.

The app can be mounted elsewhere; whoever serves it must not compress frames and must let messages of 64 MiB and more pass.
"""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.applications import Starlette
from starlette.requests import Request as HTTPRequest
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from hosting.endpoint import Endpoint
from hosting.failures import client_text
from hosting.protocol.connection import Connection

logger = logging.getLogger(__name__)

GOING_AWAY = 1001


class WebSocketTransport:
    """All WebSocket conversations of one endpoint."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        # Connection → whether it has an answer under way, which is sent before the connection is closed.
        self._busy: dict[WebSocket, bool] = {}
        self.app = Starlette(
            routes=[
                Route("/healthz", self._health),
                Route("/{path:path}", self._upgrade_required),
                WebSocketRoute("/{path:path}", self._converse),
            ]
        )

    async def close_idle(self) -> None:
        """Close the conversations that wait for a request (the endpoint must be draining); the others close after their answer."""
        for websocket in [websocket for websocket, busy in self._busy.items() if not busy]:
            await _close(websocket)

    async def _health(self, request: HTTPRequest) -> PlainTextResponse:
        if self._endpoint.ready:
            return PlainTextResponse("OK\n")
        return PlainTextResponse("shutting down\n" if self._endpoint.draining else "starting\n", status_code=503)

    async def _upgrade_required(self, request: HTTPRequest) -> PlainTextResponse:
        headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
        return PlainTextResponse("This is a WebSocket endpoint; the health check is at /healthz.\n", status_code=426, headers=headers)

    async def _converse(self, websocket: WebSocket) -> None:
        await websocket.accept()
        self._busy[websocket] = False
        # Begun while the client is held, so that one that leaves before the slot is ready is forgotten at once.
        receiving = asyncio.create_task(websocket.receive())
        try:
            if not await self._opened(receiving):
                return
            connection = Connection()
            await websocket.send_bytes(connection.hello(self._endpoint.metadata))
            message = await receiving
            # A request that comes just as close_idle() closes its connection can no longer be answered.
            while message["type"] == "websocket.receive" and not self._endpoint.draining:
                self._busy[websocket] = True
                await self._answer(websocket, connection, message)
                self._busy[websocket] = False
                if not self._endpoint.draining:
                    message = await websocket.receive()
        except (WebSocketDisconnect, OSError):
            logger.debug("%s: a client left while it was being answered", self._endpoint.slot)
        finally:
            receiving.cancel()
            del self._busy[websocket]
            if self._endpoint.draining:
                await _close(websocket)

    async def _opened(self, receiving: asyncio.Task[Message]) -> bool:
        """Wait for the slot; returns whether there is one to talk to and the client is still there."""
        opening = asyncio.create_task(self._endpoint.opened())
        try:
            await asyncio.wait([opening, receiving], return_when=asyncio.FIRST_COMPLETED)
            if receiving.done() and receiving.result()["type"] == "websocket.disconnect":
                return False
            await opening
        finally:
            opening.cancel()
        return not self._endpoint.draining

    async def _answer(self, websocket: WebSocket, connection: Connection, message: Message) -> None:
        arrived_s = time.perf_counter()
        payload = message.get("bytes")
        try:
            request = connection.receive(payload if payload is not None else message["text"], arrived_s)
            result, infer_ms = await self._endpoint.infer(request.observation)
            frame = connection.reply(result, infer_ms=infer_ms)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's alone; client_text() logs it
            await websocket.send_text(client_text(error, slot=self._endpoint.slot))
            return
        await websocket.send_bytes(frame)
        connection.sent(request, time.perf_counter())


async def _close(websocket: WebSocket) -> None:
    try:
        await websocket.close(GOING_AWAY, "the server is shutting down")
    except (RuntimeError, WebSocketDisconnect, OSError):
        logger.debug("a client had closed its connection before the server could")
