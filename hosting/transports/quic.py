"""The QUIC endpoint of a slot: a thread that does nothing but packets, and hands whole messages to the event loop that serves them.

Neither waits for the other: encrypting 600 KB does not delay a ping on the event loop, and a busy event loop does not delay acknowledgements.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import operator
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from hosting.answers import Answering, answer_of
from hosting.certificates import Certificate
from hosting.protocol.messages import Message, MessageType
from hosting.protocol.striping import Assembler
from hosting.quic import Arrived, Cancelled, Rejected
from hosting.quic_router import Peer, Router
from hosting.quic_settings import IDLE_TIMEOUT_S, server_configuration
from hosting.udp import Address, UdpSocket
from pi0.errors import ConfigError, MessageError

logger = logging.getLogger(__name__)

GREETING_BYTES = 64 * 1024
"""What a client may send at most before it has got its metadata."""
CLOSING_REASON = "the server is shutting down"
_DELIVERY_S = 0.5
_FAREWELL_S = 1.0

Stream = tuple[Peer, int]


class QuicTransport:
    """One UDP port.

    Args:
        converse: called on ``loop`` for each connection.
        loop: where messages are answered. :meth:`close_idle` and :meth:`close` must be called there.
        field: the configuration field that the port comes from, for the error message; no two ports with one certificate may share it.

    Attributes:
        failed: completes, with its exception, when the thread ends on an error of ours; else it never does.
    """

    def __init__(
        self,
        host: str,
        port: int,
        converse: Callable[[], Answering],
        *,
        certificate: Certificate,
        max_message_bytes: int,
        loop: asyncio.AbstractEventLoop,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        field: str = "quic_port",
    ) -> None:
        self._host, self._port, self._field = host, port, field
        self._converse = converse
        self._loop = loop
        self._max_message_bytes = max_message_bytes
        self._router = Router(
            server_configuration(certificate, idle_timeout_s=idle_timeout_s),
            reset_key=hmac.digest(certificate.key_pem, field.encode(), "sha256"),
            greeting_bytes=GREETING_BYTES,
        )
        self._parts: Assembler[Stream] = Assembler(max_message_bytes=max_message_bytes)
        self._socket: UdpSocket | None = None
        self._commands: deque[Callable[[float], None]] = deque()
        self._waker, self._wake_up = socket.socketpair()
        self._woken = False
        self._thread = threading.Thread(target=self._run, name=f"quic {field}", daemon=True)
        self._delivered: list[Answering] = []
        self._draining = False
        self._leave_at_s: float | None = None
        # The event loop's side.
        self._conversations: dict[Peer, Answering] = {}
        self._answers: dict[Stream, asyncio.Task[None]] = {}
        self._ended = asyncio.Event()
        self.failed: asyncio.Future[None] = loop.create_future()

    @property
    def address(self) -> Address:
        """Where the port is bound."""
        assert self._socket is not None, "bind() comes first"
        return self._socket.address

    def bind(self) -> None:
        """Take the port, so that early clients are kept waiting instead of refused.

        Raises:
            ConfigError: it cannot be had.
        """
        try:
            self._socket = UdpSocket.bind(self._host, self._port)
        except (OSError, UnicodeError) as error:  # the latter for a name that no host can have
            self._close_sockets()
            reason = getattr(error, "strerror", None) or error
            text = f"{self._field}: cannot listen on {self._host} UDP port {self._port} ({reason}); stop what uses it, or choose another port or host"
            raise ConfigError(text) from error
        receive, send = self._socket.buffer_bytes()
        batched = ["one by one", "in batches"]
        logger.info(
            "QUIC on %s port %d: socket buffers of %d KiB (receive) and %d KiB (send), datagrams received %s and sent %s",
            *self.address[:2],
            receive >> 10,
            send >> 10,
            *(batched[flag] for flag in self._socket.batched),
        )

    async def start(self) -> None:
        """Begin to serve. Answers may wait for as long as their conversation makes them."""
        assert self._socket is not None, "bind() comes first"
        self._thread.start()

    async def close_idle(self) -> None:
        """Close the connections that wait for no answer, and each other one when its last answer has arrived there."""
        drained = asyncio.Event()

        def drain(now: float) -> None:
            self._drain()
            self._call_loop(drained.set)

        if self._thread.is_alive():
            self._order(drain)
            await asyncio.wait(
                {self._loop.create_task(drained.wait()), self._loop.create_task(self._ended.wait())}, return_when=asyncio.FIRST_COMPLETED
            )

    async def close(self) -> None:
        """End the thread and close the port. Answers already made are delivered first, if that takes no longer than a second."""
        if self._thread.ident is None:
            self._close_sockets()
            return
        self._order(self._leave)
        await self._ended.wait()
        self._thread.join()

    # --- the thread: packets ---

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            logger.exception("the QUIC endpoint on %s failed", self._field)
            self._call_loop(self._fail, error)
        finally:
            self._call_loop(self._end)

    def _serve(self) -> None:
        assert self._socket is not None
        udp, router, poll = self._socket, self._router, select.poll()
        poll.register(self._waker, select.POLLIN)
        while True:
            now = time.monotonic()
            if self._leave_at_s is not None and (now >= self._leave_at_s or all(peer.gone for peer in router.peers)):
                break
            poll.register(udp, select.POLLIN | (select.POLLOUT if udp.wants_write else 0))
            ready = dict(poll.poll(self._pause_ms(now)))
            now = time.monotonic()
            if self._waker.fileno() in ready:
                self._waker.recv(4096)
                self._woken = False  # in this order: what is ordered from here on either is found below, or rings again
            while self._commands:
                self._commands.popleft()(now)
            try:
                for received in udp.receive():
                    for datagram in router.receive(received, now):
                        udp.send([datagram], received.address, received.source)
                udp.flush()
            except OSError as error:
                logger.debug("UDP: %s", error)
            router.handle_timers(now)
            for stream, text in self._parts.expire(now):
                self._reply(stream, Message(MessageType.ERROR, text.encode()), now)
            if self._draining:
                self._drain()
            for peer in router.touched():
                self._attend(peer, now)
            while self._delivered:
                self._call_loop(self._delivered.pop().sent)
        for peer in router.peers:
            peer.connection.close(CLOSING_REASON)
            self._transmit(peer, now)

    def _pause_ms(self, now: float) -> float | None:
        timers = [self._router.next_timer_s(), self._parts.next_deadline_s(), self._leave_at_s]
        if self._draining:
            waiting = [peer for peer in self._router.peers if peer.connection.established and peer.connection.ended is None]
            timers += [peer.answered_s + _DELIVERY_S for peer in waiting if not peer.connection.unanswered]
        due_s = min((timer for timer in timers if timer is not None), default=None)
        # poll() rounds up to whole milliseconds; the pacer's gaps are shorter.
        return None if due_s is None else max(0, round((due_s - now) * 1000))

    def _attend(self, peer: Peer, now: float) -> None:
        """One connection's events, then what it has to send."""
        for event in self._router.events(peer):
            match event:
                case Arrived(stream, message):
                    self._arrived(peer, stream, message, now)
                case Rejected(stream, text):
                    self._reply((peer, stream), Message(MessageType.ERROR, text.encode()), now)
                case Cancelled(stream):
                    self._parts.forget(partial(operator.eq, (peer, stream)))
                    self._call_loop(self._cancel, (peer, stream))
                case _:
                    pass
        connection = peer.connection
        if self._draining and connection.ended is None and self._is_finished(peer, now):
            connection.close(CLOSING_REASON)
        self._transmit(peer, now)
        if connection.ended is not None and not peer.gone:
            peer.gone = True
            self._parts.forget(lambda stream: stream[0] is peer)
            logger.debug("a QUIC connection ended: %s", connection.ended.text)
            self._call_loop(self._forget, peer)

    def _is_finished(self, peer: Peer, now: float) -> bool:
        """Whether a connection may be closed in a drain."""
        connection = peer.connection
        if self._leave_at_s is None and (not connection.established or (connection.unanswered and peer.greeted)):
            return False
        if not peer.greeted:
            return True  # it has not been let in, and will not be
        # A client that sleeps between requests does not acknowledge the last frames, which only are about stream limits.
        return connection.delivered or now >= peer.answered_s + _DELIVERY_S

    def _transmit(self, peer: Peer, now: float) -> None:
        assert self._socket is not None
        datagrams = self._router.settle(peer, now)
        start = 0
        for end in range(1, len(datagrams) + 1):
            if end == len(datagrams) or datagrams[end][1] != datagrams[start][1]:
                try:
                    self._socket.send([datagram for datagram, _ in datagrams[start:end]], datagrams[start][1], peer.source)
                except OSError as error:
                    logger.debug("UDP to %s: %s", datagrams[start][1], error)  # lost, as if on its way
                start = end

    def _arrived(self, peer: Peer, stream: int, message: Message, now: float) -> None:
        self._router.asked(peer)
        if message.type != MessageType.PART:
            self._call_loop(self._take, (peer, stream), message)
            return
        try:
            if not peer.greeted:
                raise MessageError("a part came before its connection's metadata was asked for; every connection begins with METADATA")
            taken = self._parts.add(message.body, (peer, stream), now)
        except MessageError as error:
            self._reply((peer, stream), Message(MessageType.ERROR, str(error).encode()), now)
            return
        if taken.index > 0:
            self._reply((peer, stream), Message(MessageType.PART_REPLY, b""), now)
        if taken.whole is not None:
            self._call_loop(self._take, *taken.whole)

    def _reply(self, stream: Stream, message: Message, now: float) -> None:
        peer, number = stream
        if not peer.greeted and message.type == MessageType.METADATA_REPLY:
            self._router.greet(peer)
            peer.connection.incoming.max_message_bytes = self._max_message_bytes
        elif not peer.greeted:
            self._router.refuse(peer, now)
        peer.connection.reply(number, message)
        peer.answered_s = now
        self._router.touch(peer)

    def _drain(self) -> None:
        self._draining = True
        for peer in self._router.peers:
            self._router.touch(peer)

    def _leave(self, now: float) -> None:
        self._drain()
        self._leave_at_s = now + _FAREWELL_S

    def _call_loop(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            # It was closed before this transport was; nobody is left to answer.
            self._leave_at_s = 0.0
            if function == self._end:
                self._close_sockets()

    def _close_sockets(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._waker.close()
        self._wake_up.close()

    # --- the event loop: messages ---

    def _order(self, command: Callable[[float], None]) -> None:
        """Have the thread do something, soon."""
        self._commands.append(command)
        if not self._woken and not self._ended.is_set():
            self._woken = True
            self._wake_up.send(b"!")

    def _take(self, stream: Stream, message: Message) -> None:
        peer = stream[0]
        if peer.gone:
            return
        conversation = self._conversations.get(peer)
        if conversation is None:
            conversation = self._conversations[peer] = self._converse()
        task = self._answers[stream] = self._loop.create_task(self._answer(stream, conversation, message))
        task.add_done_callback(lambda _: self._answers.pop(stream))

    async def _answer(self, stream: Stream, conversation: Answering, message: Message) -> None:
        answer = await answer_of(conversation, message)

        def send(now: float) -> None:
            self._reply(stream, answer, now)
            self._delivered.append(conversation)

        self._order(send)

    def _cancel(self, stream: Stream) -> None:
        if (task := self._answers.get(stream)) is not None:
            task.cancel()

    def _forget(self, peer: Peer) -> None:
        for stream, task in self._answers.items():
            if stream[0] is peer:
                task.cancel()
        if (conversation := self._conversations.pop(peer, None)) is not None:
            conversation.close()

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)

    def _end(self) -> None:
        for task in self._answers.values():
            task.cancel()
        while self._conversations:
            self._conversations.popitem()[1].close()
        self._close_sockets()
        self._ended.set()
