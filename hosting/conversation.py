"""One client's conversation with one slot: the protocol core on this side, the endpoint on the other. Every transport drives one of these.

A transport hands in each message and sends what comes back; that is all it knows of requests, modes, errors or images. What every
conversation leaves in the log and in the metrics is left here.
"""

from __future__ import annotations

import time
from typing import Literal, assert_never

from hosting.calls import Served
from hosting.endpoint import Endpoint
from hosting.failures import failure
from hosting.policy import DrainingError
from hosting.protocol.connection import Call, Connection
from hosting.protocol.messages import Message
from hosting.protocol.requests import InferRequest, MetadataRequest, ResetRequest
from hosting.request_log import log_request

Transport = Literal["websocket", "quic", "unix"]


class Conversation:
    """What one client asks of one slot, message by message.

    Args:
        endpoint: the slot.
        connection: a new one; its profile is the client's choice.
        transport: what carries it.
    """

    def __init__(self, endpoint: Endpoint, connection: Connection, *, transport: Transport = "websocket") -> None:
        self._endpoint = endpoint
        self._connection = connection
        self._transport = transport
        self._sessions = endpoint.sessions.client()

    async def hello(self) -> Message:
        """The greeting, as soon as the slot is ready.

        Raises:
            DrainingError: it never will be.
            RequestError: the client's profile cannot be served.
        """
        await self._endpoint.opened()
        if self._endpoint.draining:
            raise DrainingError(f"the server is shutting down; the {self._endpoint.slot} endpoint takes no new requests")
        return self._connection.hello(self._endpoint.metadata)

    async def answer(self, message: Message) -> Message:
        """The answer to one message of the client; failures are answers too. Safe to call again while an answer is under way."""
        arrived_s = time.perf_counter()
        endpoint, observer = self._endpoint, self._endpoint.observer
        observer.received(endpoint.slot, self._transport, len(message.body))
        call: Call | None = None
        served: list[Served] = []
        outcome, detail = "cancelled", None
        try:
            try:
                call = self._connection.receive(message, arrived_s)
                answer = await self._respond(call, served)
                outcome = "ok"
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's alone; failure() logs it
                failed = failure(error, slot=endpoint.slot)
                outcome, detail = failed.code, failed.text
                answer = self._connection.failure(message, call, code=failed.code, text=failed.text)
        finally:
            self._note(call, served, time.perf_counter() - arrived_s, outcome, detail)
        observer.sent(endpoint.slot, self._transport, len(answer.body))
        return answer

    def sent(self) -> None:
        """The last answer has been handed to the network."""
        self._connection.sent(time.perf_counter())

    def close(self) -> None:
        """The connection has ended."""
        self._sessions.close()

    async def _respond(self, call: Call, served: list[Served]) -> Message:
        match call.request:
            case InferRequest():
                result, infer_ms = await self._endpoint.serve(call.request, call.arrived_s, self._sessions, served)
                return self._connection.reply(call, result, infer_ms=infer_ms, acting=self._endpoint.slot == "action")
            case MetadataRequest():
                return await self.hello()
            case ResetRequest():
                self._sessions.reset(call.request.session_ids)
                return self._connection.reset_done(call)
            case _:
                assert_never(call.request)

    def _note(self, call: Call | None, served: list[Served], total_s: float, outcome: str, detail: str | None) -> None:
        mode, session, request_id = "unknown", None, None
        match call and call.request:
            case InferRequest(rows=(row, *_), batched=batched):
                asked = row.observation.get("mode")
                mode = asked if isinstance(asked, str) and asked else "default" if asked is None or isinstance(asked, str) else "unknown"
                session, request_id = (None, None) if batched else (row.session_id, row.echo.get("request_id"))
            case MetadataRequest():
                mode = "metadata"
            case ResetRequest():
                mode = "reset"
        slot = self._endpoint.slot
        self._endpoint.observer.request(slot, mode, outcome, total_s)
        log_request(
            slot=slot,
            mode=mode,
            session=session,
            transport=self._transport,
            served=served,
            total_s=total_s,
            outcome=outcome,
            detail=detail,
            request_id=request_id,
        )
