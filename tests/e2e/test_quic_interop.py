"""Our two ends of QUIC against aioquic's: the wire is QUIC's and our page's, not one library's.

A known weakness of qh3 2.1 as a server: aioquic's first flight sometimes makes its handshake take a second or more. It does complete.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from pathlib import Path

import msgpack
import pytest
from aioquic.asyncio import QuicConnectionProtocol, connect, serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import StreamDataReceived, StreamReset

from hosting.clients.errors import ReplyTimeoutError
from hosting.clients.quic import QuicLink
from hosting.protocol.messages import MessageType
from hosting.quic_settings import ALPN
from tests.hosting.quic_support import certificate, digest, serving

TIMEOUT_S = 20.0


async def exchange(client: QuicConnectionProtocol, type: int, body: bytes) -> bytes:
    reader, writer = await client.create_stream()
    writer.write(bytes((type,)) + body)
    writer.write_eof()
    return await asyncio.wait_for(reader.read(), TIMEOUT_S)


async def test_an_aioquic_client_is_served():
    configuration = QuicConfiguration(is_client=True, alpn_protocols=[ALPN], verify_mode=ssl.CERT_NONE)
    with serving(api_key="secret") as server:
        async with connect(server.host, server.port, configuration=configuration) as client:
            answer = await exchange(client, MessageType.METADATA, msgpack.packb({"api_key": "secret"}))
            assert answer[0] == MessageType.METADATA_REPLY
            for size in (0, 10_000, 300_000):
                body = os.urandom(size)
                assert await exchange(client, MessageType.INFER, body) == bytes((MessageType.REPLY,)) + digest(body)
            both = await asyncio.gather(*(exchange(client, MessageType.INFER, bytes([number]) * 50_000) for number in range(8)))
            assert both == [bytes((MessageType.REPLY,)) + digest(bytes([number]) * 50_000) for number in range(8)]
            assert (
                await exchange(client, MessageType.INFER, bytes(2 << 20)) == bytes((MessageType.ERROR,)) + b"the message has more than 1048576 bytes"
            )
            assert await exchange(client, MessageType.INFER, b"large 500000") == bytes((MessageType.REPLY,)) + bytes(500_000)


async def test_an_aioquic_client_of_another_protocol_is_refused():
    configuration = QuicConfiguration(is_client=True, alpn_protocols=["h3"], verify_mode=ssl.CERT_NONE)
    with serving() as server:
        with pytest.raises(ConnectionError):
            async with connect(server.host, server.port, configuration=configuration):
                pass
        link = QuicLink(server.host, server.port, pin=certificate().sha256)
        link.close()


async def test_an_aioquic_client_cancels():
    configuration = QuicConfiguration(is_client=True, alpn_protocols=[ALPN], verify_mode=ssl.CERT_NONE)
    with serving() as server:
        async with connect(server.host, server.port, configuration=configuration) as client:
            await exchange(client, MessageType.METADATA, b"")
            _, writer = await client.create_stream()
            writer.write(bytes((MessageType.INFER,)) + b"hold")
            writer.write_eof()
            assert await asyncio.to_thread(server.holding.wait, TIMEOUT_S)
            client._quic.stop_stream(writer.get_extra_info("stream_id"), 1)
            client.transmit()
            assert await asyncio.to_thread(server.cancelled.wait, TIMEOUT_S)
            assert (await exchange(client, MessageType.INFER, b"next"))[1:] == digest(b"next")


class Echo(QuicConnectionProtocol):
    """A server of our wire on aioquic: answers METADATA with an empty map and INFER with a digest, but never one that begins with ``hold``."""

    resets: list[int]

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._bodies: dict[int, bytes] = {}

    def quic_event_received(self, event) -> None:
        match event:
            case StreamDataReceived():
                self._bodies[event.stream_id] = self._bodies.get(event.stream_id, b"") + event.data
                if event.end_stream:
                    self._answer(event.stream_id, self._bodies.pop(event.stream_id))
            case StreamReset():
                Echo.resets.append(event.stream_id)
            case _:
                pass

    def _answer(self, stream: int, request: bytes) -> None:
        if request[0] == MessageType.METADATA:
            answer = bytes((MessageType.METADATA_REPLY,)) + msgpack.packb({})
        elif request[1:5] == b"hold":
            return
        else:
            answer = bytes((MessageType.REPLY,)) + digest(request[1:])
        self._quic.send_stream_data(stream, answer, end_stream=True)
        self.transmit()


async def test_our_client_and_an_aioquic_server(tmp_path: Path):
    cert_file, key_file = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert_file.write_bytes(certificate().chain_pem)
    key_file.write_bytes(certificate().key_pem)
    configuration = QuicConfiguration(is_client=False, alpn_protocols=[ALPN])
    configuration.load_cert_chain(cert_file, key_file)
    Echo.resets = []
    server = await serve("127.0.0.1", 0, configuration=configuration, create_protocol=Echo)
    port = server._transport.get_extra_info("sockname")[1]

    def drive() -> None:
        for options in ({"pin": certificate().sha256}, {"cafile": str(cert_file)}):
            link = QuicLink("127.0.0.1", port, **options)
            assert msgpack.unpackb(link.hello.body) == {}
            for size in (0, 1_000, 45_000, 600_000):
                body = os.urandom(size)
                assert link.exchange(MessageType.INFER, [body], TIMEOUT_S).body == digest(body)
            with pytest.raises(ReplyTimeoutError):
                link.exchange(MessageType.INFER, [b"hold" + bytes(40_000)], 0.2)
            assert link.exchange(MessageType.INFER, [b"next"], TIMEOUT_S).body == digest(b"next")
            link.close()

    try:
        await asyncio.to_thread(drive)
    finally:
        server.close()
