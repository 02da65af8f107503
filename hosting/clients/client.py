"""The blocking client: one class over every transport, with reconnecting, time limits and images made small."""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, TypedDict, Unpack

from hosting.clients.conversation import Conversation, Request
from hosting.clients.dialing import DialOptions, dial
from hosting.clients.errors import AuthenticationError, ConnectError, ConnectionLostError, ReplyTimeoutError
from hosting.clients.retry import Deadline, Reconnect
from hosting.clients.tls import check_trust
from hosting.protocol import msgpack_numpy
from hosting.protocol.messages import MessageType

logger = logging.getLogger(__name__)

Observation = Mapping[str, Any]
Reply = dict[str, Any]

_WAIT_PAUSE_S = 5.0
"""Between attempts to reach a server that has yet to be started; openpi's."""


class ClientOptions(TypedDict, total=False):
    """The keyword arguments of :class:`Client`, for those who pass them on."""

    api_key: str | None
    timeout_s: float | None
    session_id: str | None
    seed: int | None
    resize: Literal["metadata"] | None
    encode: Literal["jpeg"] | None
    jpeg_quality: int
    pin: str | None
    cafile: str | None
    verify: bool
    server_name: str | None
    connections: int
    congestion_control: str | None
    quic_deadline_s: float
    connect_timeout_s: float
    ready_timeout_s: float | None
    wait_s: float
    retry_lost: bool
    reconnect: Reconnect


class Client:
    """A policy server, seen from the robot. Threads may share it: their requests take turns.

    A connection that is lost is made again by the next call. A call whose request may have been sent when the connection broke is
    sent once more over a new one (``retry_lost``): computing a chunk twice harms nobody, and a robot wants the next action
    rather than an exception. A call that took too long is never repeated. ``timeout_s`` bounds a whole call, reconnecting included.

    Args:
        url: ``ws://host:port`` or ``wss://…`` with any path, ``quic://host[:5555]``, ``unix:///path``, or ``auto://host[:8000]``:
            QUIC if it answers within ``quic_deadline_s``, else ``wss``, else ``ws`` (not beyond this machine when ``api_key``, ``pin``
            or ``cafile`` is given). The choice is remembered for the life of the process. ``?quic=PORT`` names a QUIC port that
            is not the usual one of that WebSocket port.
        api_key: the server's key.
        timeout_s: of every call that does not say otherwise; None waits for ever.
        session_id: sent with every observation that has none, but for those of :meth:`infer_batch`.
        seed: likewise; the same action noise every time.
        resize: ``"metadata"`` resizes cameras to the server's ``image_specs`` before they are sent (the numbers are the server's
            own, see :mod:`hosting.clients.images`); None sends them as they are.
        encode: ``"jpeg"`` sends the cameras of ``image_specs`` as JPEG: lossy, about a tenth of the bytes.
        jpeg_quality: 1 to 100; below 95 with 4:2:0 chroma subsampling.
        pin: SHA-256 of the certificate that the server must have (QUIC, WSS). Refused where no certificate comes, as is ``cafile``.
        cafile: PEM of the authorities that are trusted instead of the system's (QUIC, WSS).
        verify: False trusts any server (QUIC, WSS).
        server_name: whom the certificate must name, if not the host of ``url`` (QUIC, WSS).
        connections: over how many connections a large request is spread (QUIC); more help on lossy links.
        congestion_control: TCP's, where the kernel lets us choose; None keeps the kernel's.
        connect_timeout_s: how long one attempt to connect may take.
        ready_timeout_s: how long a server that took the connection may load before it greets; None waits for ever.
        wait_s: how long to wait, when the client is made, for a server that refuses connections; ``math.inf`` waits for ever.
        retry_lost: see above; False raises instead.
        reconnect: how often, and with which pauses.

    Raises:
        AuthenticationError: the server wants another API key, or has another certificate.
        ConnectError: the server cannot be reached, is no policy server, or cannot do what ``encode`` asks for.
        ValueError: an option has no meaning.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float | None = None,
        session_id: str | None = None,
        seed: int | None = None,
        resize: Literal["metadata"] | None = "metadata",
        encode: Literal["jpeg"] | None = None,
        jpeg_quality: int = 90,
        pin: str | None = None,
        cafile: str | None = None,
        verify: bool = True,
        server_name: str | None = None,
        connections: int = 1,
        congestion_control: str | None = "bbr",
        quic_deadline_s: float = 1.5,
        connect_timeout_s: float = 10.0,
        ready_timeout_s: float | None = None,
        wait_s: float = 0.0,
        retry_lost: bool = True,
        reconnect: Reconnect | None = None,
    ) -> None:
        _check_choice("resize", resize, "metadata")
        _check_choice("encode", encode, "jpeg")
        if not 1 <= jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality: got {jpeg_quality}, expected 1 to 100")
        if not 0 < connect_timeout_s < math.inf:
            raise ValueError(f"connect_timeout_s: got {connect_timeout_s}, expected a number of seconds above 0")
        check_trust(url, pin=pin, cafile=cafile)
        self.url = url
        self._timeout_s = timeout_s
        self._defaults = {key: value for key, value in (("session_id", session_id), ("seed", seed)) if value is not None}
        self._resize = resize == "metadata"
        self._encode = encode
        self._jpeg_quality = jpeg_quality
        self._dial_options = DialOptions(
            api_key=api_key,
            pin=pin,
            cafile=cafile,
            verify=verify,
            server_name=server_name,
            connections=connections,
            congestion_control=congestion_control,
            quic_deadline_s=quic_deadline_s,
        )
        self._connect_timeout_s = connect_timeout_s
        self._ready_timeout_s = ready_timeout_s
        self._retry_lost = retry_lost
        self._reconnect = reconnect or Reconnect()
        # Ids must differ between clients too, or a crossing of two of them would go unseen.
        self._request_ids = (f"{prefix}-{n}" for prefix, n in zip(itertools.repeat(secrets.token_hex(4)), itertools.count(1), strict=False))
        self._lock = threading.Lock()
        self._closed = False
        self._conversation = self._first_conversation(wait_s)

    def infer(
        self,
        obs: Observation,
        *,
        timeout_s: float | None = None,
        deadline_ms: float | None = None,
        seed: int | None = None,
        session_id: str | None = None,
    ) -> Reply:
        """One observation → the server's reply, ``actions`` ``[H, A]`` and what else it has. ``obs`` is left as it is.

        Its arrays are sent from where they lie: they must not change until the call returns.

        Args:
            timeout_s: of this call; None: the client's.
            deadline_ms: after so long the server no longer begins to work on it.
            seed: of the action noise.
            session_id: the robot's session, if not the client's.

        Raises:
            InferenceError: the server refused or failed the request; the connection is still good.
            ReplyTimeoutError: it took longer than ``timeout_s``.
            ConnectionLostError: the connection broke, and again when the request was repeated.
            ConnectError: it broke earlier and cannot be made again.
            CrossedReplyError: the reply belongs to another request.
            ValueError, TypeError, OverflowError: the observation holds something that cannot be sent; nothing was.
        """
        given = {"deadline_ms": deadline_ms, "seed": seed, "session_id": session_id}
        own = {key: value for key, value in given.items() if value is not None}

        def build(conversation: Conversation) -> Request:
            message, request_id = self._identified({**self._defaults, **self._prepared(obs, conversation), **own}, conversation)
            return Request(MessageType.INFER, msgpack_numpy.pack_parts(message), request_id)

        return _without_own_ids(self._call(build, timeout_s), obs)

    def infer_batch(self, observations: Sequence[Observation], *, timeout_s: float | None = None) -> Reply:
        """Several observations → one reply with ``actions`` ``[B, H, A]``. Needs a server that takes batches, as ours does.

        Rows are sent as they are: ``session_id``, ``seed`` and ``deadline_ms`` are theirs alone.

        Raises:
            ValueError: there are none.
            Exception: as :meth:`infer`; one bad row fails them all.
        """
        if not observations:
            raise ValueError("infer_batch: got no observations, expected at least one")

        def build(conversation: Conversation) -> Request:
            identified = [self._identified(dict(self._prepared(obs, conversation)), conversation) for obs in observations]
            body = msgpack_numpy.pack_parts({"batch": [row for row, _ in identified]})
            request_ids = [request_id for _, request_id in identified] if conversation.is_ours else None
            return Request(MessageType.INFER, body, request_ids)

        return _without_own_ids(self._call(build, timeout_s), *observations)

    def reset(self, *, timeout_s: float | None = None) -> None:
        """A new episode begins: the server forgets the session. Servers that know no reset, as openpi's, are not asked.

        Raises:
            Exception: as :meth:`infer`.
        """

        def build(conversation: Conversation) -> Request | None:
            if not conversation.takes_resets:
                return None
            fields = {key: value for key, value in self._defaults.items() if key == "session_id"}
            return Request(MessageType.RESET, [msgpack_numpy.pack(fields)] if fields else [])

        self._call(build, timeout_s)

    def get_server_metadata(self) -> dict[str, Any]:
        """What the server said when the present connection was made."""
        return self._conversation.metadata

    @property
    def address(self) -> str:
        """Where the present connection leads: for ``auto://``, what was chosen."""
        return self._conversation.url

    def close(self) -> None:
        """End the conversation. Another thread's request under way is finished first, without being waited for."""
        self._closed = True
        self._close_if_idle()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _call(self, build: Callable[[Conversation], Request | None], timeout_s: float | None) -> Reply:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = Deadline(timeout_s, self._reconnect.clock)
        left_s = deadline.left_s()
        if not self._lock.acquire(timeout=-1 if left_s is None else min(left_s, threading.TIMEOUT_MAX)):
            raise ReplyTimeoutError(f"the requests of other threads took more than {timeout_s} s; this one was not sent")
        try:
            conversation = self._open(deadline)
            try:
                return self._exchange(conversation, build, deadline)
            except AuthenticationError:
                raise
            except (ConnectError, ConnectionLostError) as error:
                # A link that connects anew by itself says ConnectError: then nothing was sent.
                if isinstance(error, ConnectionLostError) and not self._retry_lost:
                    raise
                logger.info("%s; sending the request once more", error)
            return self._exchange(self._open(deadline), build, deadline)
        finally:
            self._lock.release()
            if self._closed:
                self._close_if_idle()

    def _exchange(self, conversation: Conversation, build: Callable[[Conversation], Request | None], deadline: Deadline) -> Reply:
        request = build(conversation)
        if request is None:
            return {}
        if not deadline.allows(0.0):
            raise ReplyTimeoutError("the time for this request was over before it could be sent")
        return conversation.exchange(request, deadline.left_s())

    def _open(self, deadline: Deadline) -> Conversation:
        """The conversation, begun anew if it has ended."""
        if self._closed:
            raise ConnectionLostError("this client has been closed; make a new one")
        if not self._conversation.link.closed:
            return self._conversation
        last: ConnectError | None = None
        for pause_s in self._reconnect.pauses_s():
            if last is not None and not deadline.allows(pause_s):
                break
            if pause_s:
                self._reconnect.sleep(pause_s)
            try:
                self._conversation = self._dial(deadline)
            except AuthenticationError:
                raise
            except ConnectError as error:
                # An attempt that the deadline cut short says less of the server than the one before it.
                if last is None or deadline.allows(0.0):
                    last = error
            else:
                logger.info("connected again to %s", self._conversation.url)
                return self._conversation
        assert last is not None
        raise last

    def _first_conversation(self, wait_s: float) -> Conversation:
        waiting = Deadline(wait_s, self._reconnect.clock)
        while True:
            try:
                return self._dial(Deadline(None, self._reconnect.clock))
            except ConnectError as error:
                pause_s = waiting.within(_WAIT_PAUSE_S)
                if not pause_s or not _refused(error):
                    raise
                logger.info("waiting for the server: %s", error)
            self._reconnect.sleep(pause_s)

    def _dial(self, deadline: Deadline) -> Conversation:
        connect_timeout_s = deadline.within(self._connect_timeout_s)
        assert connect_timeout_s is not None
        conversation = Conversation(*dial(self.url, self._dial_options, connect_timeout_s, deadline.within(self._ready_timeout_s)))
        if self._encode and not (conversation.is_ours and conversation.metadata.get("image_specs")):
            conversation.link.close()
            reason = "names no image_specs, so what is a camera is not known" if conversation.is_ours else "is none of ours, which take JPEG"
            raise ConnectError(f"encode={self._encode!r}: the server at {conversation.url} {reason}; leave encode out")
        return conversation

    def _prepared(self, obs: Observation, conversation: Conversation) -> Observation:
        specs = conversation.metadata.get("image_specs")
        if not specs or not (self._resize or self._encode):
            return obs
        from hosting.clients.images import prepare

        return prepare(obs, specs, resize=self._resize, encode=self._encode, quality=self._jpeg_quality)

    def _identified(self, message: dict[str, Any], conversation: Conversation) -> tuple[dict[str, Any], Any]:
        """``message`` with an id that its reply must carry, and that id; servers that would not repeat it are not sent one."""
        if not conversation.is_ours:
            return message, None
        message.setdefault("request_id", next(self._request_ids))
        return message, message["request_id"]

    def _close_if_idle(self) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self._conversation.link.close()
            finally:
                self._lock.release()


def connect(url: str, **options: Unpack[ClientOptions]) -> Client:
    """A :class:`Client` of the server at ``url``; see there for the options and what is raised."""
    return Client(url, **options)


def _without_own_ids(reply: Reply, *observations: Observation) -> Reply:
    """``reply`` as it would be had the client added no ids of its own."""
    if not any("request_id" in obs for obs in observations):
        reply.pop("request_id", None)
    return reply


def _refused(error: BaseException | None) -> bool:
    """Whether nobody listened, as a server that has not been started yet."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError | FileNotFoundError):
            return True
        error = error.__cause__
    return False


def _check_choice(name: str, value: str | None, choice: str) -> None:
    if value not in (None, choice):
        raise ValueError(f"{name}: got {value!r}, expected {choice!r} or None")
