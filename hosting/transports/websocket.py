"""A slot's WebSocket endpoint as one Starlette app: openpi's protocol in the dialect that path and query choose.

``/healthz`` and ``/ready`` are beside it.

The app can be mounted elsewhere; whoever serves it must not compress frames and must let messages of 64 MiB and more pass.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from hosting.answers import MAX_UNFINISHED, Answers
from hosting.api_keys import CHALLENGE, UNAUTHORIZED_TEXT, authorized, sent_key
from hosting.conversation import Conversation
from hosting.endpoint import Endpoint
from hosting.failures import client_text
from hosting.policy import RequestError
from hosting.protocol.connection import Connection
from hosting.protocol.messages import Message as ProtocolMessage
from hosting.protocol.messages import MessageType
from hosting.protocol.profiles import Profile, ProfileName, ReplyShape, choose_profile

logger = logging.getLogger(__name__)

GOING_AWAY = 1001
INTERNAL_ERROR = 1011

_CLOSE_TIMEOUT_S = 2.0
"""How long a client that does not take what it was sent may delay its own closing."""

_TEXT_TYPES = frozenset({MessageType.ERROR, MessageType.RESET_REPLY})


class _IdleError(Exception):
    """A client has sent no request for too long. No TimeoutError: a network's own is one, too, and is the client's departure."""


class WebSocketTransport:
    """All WebSocket conversations of one endpoint.

    Args:
        endpoint: the slot.
        api_key: refuse upgrades without it with 401; as ``Authorization: Api-Key …`` or ``Bearer …``, or ``X-API-Key``. None: no key is asked for.
        profile: the dialect of addresses that do not choose one.
        reply: the shape of their replies; None: the profile's.
        idle_timeout_s: seconds without a request until a connection is closed; None: it never is.
        status: what ``GET /ready`` answers, with 200 where its ``ready`` is true and 503 where not; None: there is no such page.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        api_key: str | None = None,
        profile: ProfileName = "openpi",
        reply: ReplyShape | None = None,
        idle_timeout_s: float | None = None,
        status: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._idle_timeout_s = idle_timeout_s
        self._status = status
        self._api_key = api_key
        self._profile: ProfileName = profile
        self._reply: ReplyShape | None = reply
        self._clients: set[_Client] = set()
        self.app = Starlette(
            routes=[
                Route("/healthz", self._health),
                *([Route("/ready", self._ready)] if status is not None else []),
                Route("/{path:path}", self._upgrade_required),
                WebSocketRoute("/{path:path}", self._converse),
            ]
        )

    async def close_idle(self) -> None:
        """Close the conversations that wait for a request (the endpoint must be draining); the others close after their answers."""
        await asyncio.gather(*[_close(client.websocket) for client in self._clients if client.idle])

    async def _health(self, request: HTTPRequest) -> PlainTextResponse:
        if self._endpoint.ready:
            return PlainTextResponse("OK\n")
        return PlainTextResponse("shutting down\n" if self._endpoint.draining else "starting\n", status_code=503)

    async def _ready(self, request: HTTPRequest) -> JSONResponse:
        assert self._status is not None
        status = self._status()
        return JSONResponse(status, status_code=200 if status["ready"] else 503)

    async def _upgrade_required(self, request: HTTPRequest) -> PlainTextResponse:
        headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
        return PlainTextResponse("This is a WebSocket endpoint; the health check is at /healthz.\n", status_code=426, headers=headers)

    async def _converse(self, websocket: WebSocket) -> None:
        if not authorized(websocket.headers, self._api_key):
            logger.info("%s: refused a connection: it brought %s API key", self._endpoint.slot, "a wrong" if sent_key(websocket.headers) else "no")
            await websocket.send_denial_response(PlainTextResponse(f"{UNAUTHORIZED_TEXT}\n", status_code=401, headers=CHALLENGE))
            return
        try:
            profile = choose_profile(
                websocket.scope["path"], websocket.scope["query_string"].decode("latin-1"), default=self._profile, reply=self._reply
            )
        except RequestError as error:
            text = client_text(error, slot=self._endpoint.slot)
            await websocket.send_denial_response(PlainTextResponse(f"{text}\n", status_code=400))
            return
        await websocket.accept()
        client = _Client(websocket, self._endpoint, profile, self._idle_timeout_s)
        self._clients.add(client)
        try:
            await client.converse()
        finally:
            self._clients.discard(client)
            if self._endpoint.draining:
                await _close(websocket)


class _Client:
    """One client. Several lanes read a message and answer it, over and over; while some answer, one reads.

    Args:
        idle_timeout_s: seconds without a request, while none is under way, until it is given up; None: it never is.
    """

    def __init__(self, websocket: WebSocket, endpoint: Endpoint, profile: Profile, idle_timeout_s: float | None) -> None:
        self.websocket = websocket
        self._endpoint = endpoint
        self._profile = profile
        self._idle_timeout_s = idle_timeout_s
        self._loop = asyncio.get_running_loop()
        # Begun while the client is held, so that one that leaves before the slot is ready is forgotten at once.
        self._receiving: asyncio.Task[Message] | None = self._loop.create_task(websocket.receive())
        self._answers: Answers | None = None
        self._turn = asyncio.Lock()  # to read
        self._moved = asyncio.Event()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether it has got all its answers."""
        return self._answers is None or not self._answers.unsent

    async def converse(self) -> None:
        """From the upgrade on; returns when the connection is closed, or has to be."""
        try:
            if await self._opened():
                conversation = Conversation(self._endpoint, Connection(self._profile), transport="websocket")
                try:
                    if await self._greeted(conversation):
                        await self._serve(Answers(conversation, self._send, self._moved.set))
                finally:
                    conversation.close()
        except _IdleError as idle:
            logger.info("%s: closing an idle connection: %s", self._endpoint.slot, idle)
            await _close(self.websocket, str(idle))
        except (WebSocketDisconnect, OSError):
            logger.debug("%s: a client left while it was being answered", self._endpoint.slot)
        finally:
            if self._receiving is not None:
                self._receiving.cancel()

    async def _opened(self) -> bool:
        """Wait for the slot; returns whether there is one to talk to and the client is still there."""
        assert self._receiving is not None
        opening = asyncio.create_task(self._endpoint.opened())
        try:
            await asyncio.wait([opening, self._receiving], return_when=asyncio.FIRST_COMPLETED)
            if self._receiving.done() and self._receiving.result()["type"] == "websocket.disconnect":
                return False
            await opening
        finally:
            opening.cancel()
        return not self._endpoint.draining

    async def _greeted(self, conversation: Conversation) -> bool:
        try:
            await _send(self.websocket, await conversation.hello())
        except RequestError as error:
            await self.websocket.send_text(client_text(error, slot=self._endpoint.slot))
            await self.websocket.close(INTERNAL_ERROR, "this profile cannot be served; the reason is in the previous frame")
            return False
        return True

    async def _serve(self, answers: Answers) -> None:
        """Read and answer until there is no more to answer.

        Raises:
            _IdleError: no request came in time.
            WebSocketDisconnect, OSError: the client left while it was being answered.
        """
        self._answers = answers
        self._wait_for_request()
        # One lane for each request that may be under way, and one to read meanwhile. Less per request than a task for each.
        lanes = [self._loop.create_task(self._lane(answers)) for _ in range(MAX_UNFINISHED + 1)]
        try:
            await self._ended
        finally:
            for lane in lanes:
                lane.cancel()
            if self._timer is not None:
                self._timer.cancel()

    async def _lane(self, answers: Answers) -> None:
        try:
            while True:
                async with self._turn:
                    message = await self._receive()
                    if message["type"] != "websocket.receive":
                        self._end()
                        return
                    while not answers.room:
                        self._moved.clear()
                        await self._moved.wait()
                    if self._endpoint.draining:
                        if not self.idle:
                            continue
                        self._end()  # it came just as close_idle() closes its connection
                        return
                    if self._timer is not None:
                        self._timer.cancel()
                    answering = answers.begin(_received(message))
                    del message  # an observation is not kept until the next one comes
                await answering
        except Exception as error:  # noqa: BLE001 - _serve() raises it
            self._end(error)

    async def _receive(self) -> Message:
        if self._receiving is None:
            return await self.websocket.receive()
        # Its result is that of this call alone: an observation is not kept as long as its connection.
        receiving, self._receiving = self._receiving, None
        return await receiving

    async def _send(self, answer: ProtocolMessage) -> None:
        await _send(self.websocket, answer)
        assert self._answers is not None
        if self._answers.unsent > 1:
            return
        if self._endpoint.draining:
            await _close(self.websocket)
        else:
            self._wait_for_request()

    def _wait_for_request(self) -> None:
        if self._idle_timeout_s is not None:
            idle = _IdleError(f"no request came for {self._idle_timeout_s:g} s")
            self._timer = self._loop.call_later(self._idle_timeout_s, self._end, idle)

    def _end(self, error: Exception | None = None) -> None:
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)


def _received(message: Message) -> ProtocolMessage:
    payload = message.get("bytes")
    if payload is None:
        return ProtocolMessage(MessageType.TEXT, message["text"].encode())
    return ProtocolMessage(MessageType.INFER, payload)


async def _send(websocket: WebSocket, message: ProtocolMessage) -> None:
    if message.type in _TEXT_TYPES:
        await websocket.send_text(bytes(message.body).decode())
    else:
        await websocket.send_bytes(message.body)  # type: ignore[arg-type]


async def _close(websocket: WebSocket, reason: str = "the server is shutting down") -> None:
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await websocket.close(GOING_AWAY, reason)
    except TimeoutError:  # before OSError, which it is
        logger.info("a client does not read what it was sent; its connection ends without a close frame")
    except (RuntimeError, WebSocketDisconnect, OSError):
        logger.debug("a client had closed its connection before the server could")
