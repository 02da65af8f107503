"""One client's conversation with one slot: the protocol core on this side, the endpoint on the other. Every transport drives one of these.

A transport hands in each message and sends what comes back; that is all it knows of requests, modes, errors or images.
"""

from __future__ import annotations

import time
from typing import assert_never

from hosting.endpoint import Endpoint
from hosting.failures import failure
from hosting.policy import DrainingError
from hosting.protocol.connection import Call, Connection
from hosting.protocol.messages import Message
from hosting.protocol.requests import InferRequest, MetadataRequest, ResetRequest


class Conversation:
    """What one client asks of one slot, message by message.

    Args:
        endpoint: the slot.
        connection: a new one; its profile is the client's choice.
    """

    def __init__(self, endpoint: Endpoint, connection: Connection) -> None:
        self._endpoint = endpoint
        self._connection = connection

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
        call: Call | None = None
        try:
            call = self._connection.receive(message, arrived_s)
            match call.request:
                case InferRequest():
                    result, infer_ms = await self._endpoint.serve(call.request, arrived_s)
                    return self._connection.reply(call, result, infer_ms=infer_ms)
                case MetadataRequest():
                    return await self.hello()
                case ResetRequest():
                    return self._connection.reset_done(call)
                case _:
                    assert_never(call.request)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's alone; failure() logs it
            failed = failure(error, slot=self._endpoint.slot)
            return self._connection.failure(message, call, code=failed.code, text=failed.text)

    def sent(self) -> None:
        """The last answer has been handed to the network."""
        self._connection.sent(time.perf_counter())
