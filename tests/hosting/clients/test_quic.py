"""The QUIC link against a live server: whom it trusts, what it says when it cannot connect, and how it gets over pauses and lost connections."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
import time
from pathlib import Path

import msgpack
import pytest

from hosting import quic_settings
from hosting.certificates import local_certificate
from hosting.clients.errors import AuthenticationError, ConnectError, ConnectionLostError, InferenceError, ReplyTimeoutError
from hosting.clients.quic import QuicLink
from hosting.clients.quic_channel import PING_AFTER_S
from hosting.protocol.messages import Message, MessageType
from hosting.udp import UdpSocket
from tests.hosting.quic_support import LIMIT, EchoConversation, LiveServer, certificate, digest, serving

TIMEOUT_S = 20.0


def link_to(server: LiveServer, **options) -> QuicLink:
    return QuicLink(server.host, server.port, **{"pin": certificate().sha256, **options})


def ask(link: QuicLink, body: bytes = b"x", timeout_s: float | None = TIMEOUT_S) -> bytes:
    answer = link.exchange(MessageType.INFER, [body], timeout_s)
    assert answer.type == MessageType.REPLY, bytes(answer.body[:200])
    return bytes(answer.body)


@pytest.fixture(scope="module")
def server():
    with serving() as made:
        yield made


@pytest.fixture
def cafile(tmp_path: Path) -> str:
    path = tmp_path / "server.pem"
    path.write_bytes(certificate().chain_pem)
    return str(path)


def refusal(server: LiveServer, error: type[ConnectError] = ConnectError, **options) -> str:
    with pytest.raises(error) as caught:
        link_to(server, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- whom it trusts ---


def test_the_metadata_comes_with_the_link(server):
    link = link_to(server)
    assert link.hello.type == MessageType.METADATA_REPLY
    assert set(msgpack.unpackb(link.hello.body)) == {"conversation"}
    assert not link.closed
    link.close()
    assert link.closed
    link.close()


@pytest.mark.parametrize("spelling", [str.upper, lambda pin: ":".join(pin[i : i + 2] for i in range(0, 64, 2))])
def test_a_pin(server, spelling):
    link = link_to(server, pin=spelling(certificate().sha256))
    assert ask(link) == digest(b"x")
    link.close()


def test_a_wrong_pin_says_both(server):
    text = refusal(server, AuthenticationError, pin="ab" * 32)
    assert f"expected sha256 {'ab' * 32}, got {certificate().sha256}" in text


def test_a_pin_that_is_none(server):
    with pytest.raises(ValueError, match="no SHA-256 fingerprint"):
        link_to(server, pin="abc")


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_ca(server, cafile, name):
    link = QuicLink(name, server.port, cafile=cafile)
    assert ask(link) == digest(b"x")
    link.close()


def test_a_ca_and_another_name(server, cafile):
    text = refusal(server, AuthenticationError, pin=None, cafile=cafile, server_name="robot.example")
    assert "not trusted for 'robot.example'" in text
    assert "localhost" in text and "127.0.0.1" in text, "what it is for"
    link = link_to(server, pin=None, cafile=cafile, server_name="localhost")
    link.close()


def test_a_ca_of_someone_else(server, tmp_path):
    local_certificate(tmp_path)
    assert "not trusted for '127.0.0.1'" in refusal(server, AuthenticationError, pin=None, cafile=str(tmp_path / "tandem-cert.pem"))


def test_by_default_the_system_decides_and_the_error_says_how_to_pin(server):
    text = refusal(server, AuthenticationError, pin=None)
    assert f"connect with pin='{certificate().sha256}'" in text


def test_not_verifying_must_be_asked_for(server):
    link = link_to(server, pin=None, verify=False)
    assert ask(link) == digest(b"x")
    link.close()


def test_a_ca_file_that_is_not_there(server):
    assert "cafile: there is no file /no/such.pem" in refusal(server, pin=None, cafile="/no/such.pem")


def test_a_ca_file_that_holds_no_certificates(server, tmp_path):
    (tmp_path / "empty.pem").write_text("nothing")
    text = refusal(server, ConnectError, pin=None, cafile=str(tmp_path / "empty.pem"))
    assert "cafile" in text or "not trusted" in text


def test_api_keys():
    with serving(api_key="sésame") as server:
        for wrong in (None, "open"):
            text = refusal(server, AuthenticationError, api_key=wrong)
            assert text.endswith("unauthorized: the API key is wrong")
        link = link_to(server, api_key="sésame", connections=2)
        assert ask(link, bytes(100_000)) == digest(bytes(100_000))
        link.close()


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (Message(MessageType.ERROR, b"the server is shutting down"), ConnectError, "the server is shutting down"),
        (Message(MessageType.FAILURE, msgpack.packb({"type": "error", "message": "unauthorized: no"})), AuthenticationError, "unauthorized: no"),
        (Message(MessageType.FAILURE, msgpack.packb({"type": "error", "message": "not now"})), ConnectError, "not now"),
    ],
)
def test_a_greeting_that_is_refused(monkeypatch, answer, error, words):
    async def refuse(self, message):
        return answer

    monkeypatch.setattr(EchoConversation, "answer", refuse)
    with serving() as server, pytest.raises(ConnectError, match=words) as caught:
        link_to(server)
    assert type(caught.value) is error


# --- what it says when it cannot connect ---


def test_nothing_listens():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(ConnectError, match=rf"^127.0.0.1:{port}: nothing listens there for UDP"):
        QuicLink("127.0.0.1", port, verify=False)


def test_the_connection_that_failed_is_spoken_of_not_one_that_was_still_waiting(monkeypatch):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mute, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        mute.bind(("127.0.0.1", 0))
        taken.bind(("127.0.0.1", 0))
        ports = [mute.getsockname(), taken.getsockname()]
        taken.close()
        connect = UdpSocket.connect
        monkeypatch.setattr(UdpSocket, "connect", lambda family, address: connect(family, ports.pop(0)))
        with pytest.raises(ConnectError, match="nothing listens there for UDP"):
            QuicLink("127.0.0.1", 1, verify=False, connections=2)


def test_nothing_answers():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mute:
        mute.bind(("127.0.0.1", 0))
        port = mute.getsockname()[1]
        with pytest.raises(ConnectError, match=rf"^nothing answered at 127.0.0.1:{port} over UDP within 0.2 s; is it the QUIC port"):
            QuicLink("127.0.0.1", port, verify=False, connect_timeout_s=0.2)


def test_a_host_without_address():
    with pytest.raises(ConnectError, match=r"^no.such.host.invalid:1: the host name cannot be resolved"):
        QuicLink("no.such.host.invalid", 1)


def test_another_protocol(server, monkeypatch):
    monkeypatch.setattr("hosting.quic_settings.ALPN", "h3")
    assert "the two sides have no application protocol in common" in refusal(server)


def test_a_name_with_several_addresses_tries_them_all(server, monkeypatch):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        closed = taken.getsockname()[1]
    found = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", port)) for port in (closed, server.port)]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)
    link = QuicLink("robot.local", 1, pin=certificate().sha256)
    assert ask(link) == digest(b"x")
    link.close()


@pytest.mark.parametrize("connections", [0, 65])
def test_a_number_of_connections_out_of_range(server, connections):
    with pytest.raises(ValueError, match=rf"connections: {connections} is out of range"):
        link_to(server, connections=connections)


def test_a_server_that_is_loading_is_waited_for_or_not():
    with serving() as server:
        server.call(server.ready.clear)
        assert "connected, but the server was not ready within 0." in refusal(server, ready_timeout_s=0.1)
        links: list[QuicLink] = []
        thread = threading.Thread(target=lambda: links.append(link_to(server)))
        thread.start()
        while len(server.conversations) < 2:
            threading.Event().wait(0.001)
        assert not links
        server.call(server.ready.set)
        thread.join(TIMEOUT_S)
        assert ask(links[0]) == digest(b"x")
        links[0].close()


# --- requests ---


def test_a_body_in_parts_of_several_kinds(server):
    link = link_to(server)
    parts = [b"abc", bytearray(b"def"), memoryview(os.urandom(100_000)), memoryview(b"ghijkl")[::1], b""]
    answer = link.exchange(MessageType.INFER, parts, TIMEOUT_S)
    assert bytes(answer.body) == digest(b"".join(parts))
    link.close()


def test_an_answer_that_is_too_large(server):
    link = link_to(server, max_message_bytes=70_000)
    with pytest.raises(InferenceError, match="raise max_message_bytes"):
        ask(link, b"large 80000")
    assert ask(link, b"large 70000") == bytes(70_000)
    link.close()


def test_the_late_answer_of_a_request_that_timed_out_is_nobodys(server):
    link = link_to(server)
    for _ in range(5):
        with pytest.raises(ReplyTimeoutError):
            ask(link, b"large 900000", timeout_s=0.0)
        body = os.urandom(1000)
        assert ask(link, body) == digest(body)
    link.close()


def test_a_timeout_is_a_timeout_error(server):
    link = link_to(server)
    with pytest.raises(TimeoutError):
        ask(link, b"x", timeout_s=0.0)
    link.close()


def test_a_link_that_was_closed(server):
    link = link_to(server)
    link.close()
    with pytest.raises(ConnectionLostError, match="is closed; open a new one"):
        ask(link)


@pytest.mark.parametrize("connections", [1, 3])
def test_lost_datagrams_are_sent_again(server, monkeypatch, connections):
    chance = random.Random(3)
    send = UdpSocket.send
    dropped = 0

    def lossy(self, datagrams, *where):
        nonlocal dropped
        kept = [datagram for datagram in datagrams if chance.random() > 0.03]
        dropped += len(datagrams) - len(kept)
        send(self, kept, *where)

    link = link_to(server, connections=connections)
    monkeypatch.setattr(UdpSocket, "send", lossy)
    for _ in range(15):
        body = os.urandom(150_000)
        assert ask(link, body) == digest(body)
    link.close()
    assert dropped > 10


# --- pauses, moves and lost connections ---


def test_the_link_goes_on_from_another_address(server):
    conversations = len(server.conversations)
    link = link_to(server)
    (channel,) = link._channels
    addresses = set()
    for _ in range(4):
        body = os.urandom(100_000)
        assert ask(link, body) == digest(body)
        addresses.add(channel._udp.address)
        channel._rebind(OSError("another network"))
    assert len(addresses) == 4
    assert len(server.conversations) == conversations + 1, "all of it was one connection"
    link.close()


def test_a_network_that_goes_away_while_sending(server, monkeypatch):
    link = link_to(server)
    (channel,) = link._channels
    old = channel._udp

    def unreachable(datagrams, address):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(old, "send", unreachable)
    assert ask(link, bytes(50_000)) == digest(bytes(50_000))
    assert channel._udp is not old
    link.close()


def test_no_way_back_yet(server, monkeypatch):
    link = link_to(server)
    (channel,) = link._channels
    old = channel._udp
    failures = 3

    def unreachable(datagrams, address):
        raise OSError(101, "Network is unreachable")

    connect = UdpSocket.connect

    def reconnect(family, address):
        nonlocal failures
        failures -= 1
        if failures > 0:
            raise OSError(101, "Network is unreachable")
        return connect(family, address)

    monkeypatch.setattr(old, "send", unreachable)
    monkeypatch.setattr(UdpSocket, "connect", reconnect)
    assert ask(link, b"x") == digest(b"x")
    assert failures <= 0
    link.close()


@pytest.mark.parametrize("connections", [1, 3])
def test_after_an_idle_timeout_the_link_is_opened_anew(connections):
    with serving(idle_timeout_s=600.0) as server:
        link = link_to(server, connections=connections, idle_timeout_s=0.2)
        assert ask(link) == digest(b"x")
        deadline_s = time.monotonic() + TIMEOUT_S
        while not all(channel.lost for channel in link._channels):
            assert time.monotonic() < deadline_s
            for channel in link._channels:
                channel.advance(time.monotonic())
        first = link.hello
        assert ask(link, bytes(100_000)) == digest(bytes(100_000))
        assert link.hello != first, "the metadata is that of the new conversation"
        assert len(server.conversations) == 2 * connections
        link.close()


class Relay:
    """A UDP port that stands before servers and can be pointed at another one, as when a server is restarted on its port."""

    def __init__(self, server: LiveServer) -> None:
        self.target: tuple[str, int] | None = (server.host, server.port)
        self._front = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._front.bind(("127.0.0.1", 0))
        self.port = self._front.getsockname()[1]
        self._back = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._back.bind(("127.0.0.1", 0))
        self._client: tuple[str, int] | None = None
        self._threads = [threading.Thread(target=self._forward), threading.Thread(target=self._return)]
        for thread in self._threads:
            thread.start()

    def _forward(self) -> None:
        while (received := self._front.recvfrom(65_536))[0]:
            data, self._client = received
            if self.target is not None:
                self._back.sendto(data, self.target)

    def _return(self) -> None:
        while data := self._back.recv(65_536):
            if self.target is not None and self._client is not None:
                self._front.sendto(data, self._client)

    def close(self) -> None:
        for sock in (self._front, self._back):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stop:
                stop.sendto(b"", sock.getsockname())
        for thread in self._threads:
            thread.join()
        self._front.close()
        self._back.close()


@pytest.fixture
def relay(server):
    made = Relay(server)
    yield made
    made.close()


def rest(link: QuicLink) -> None:
    """As if nothing had been heard for longer than a link trusts its connection."""
    for channel in link._channels:
        channel.advance(time.monotonic())
        channel.heard_s -= 2 * PING_AFTER_S


def test_after_a_pause_a_connection_that_still_lives_is_used(server, relay):
    link = QuicLink("127.0.0.1", relay.port, pin=certificate().sha256)
    conversations = len(server.conversations)
    rest(link)
    heard_s = link._channels[0].heard_s
    assert ask(link) == digest(b"x")
    assert link._channels[0].heard_s > heard_s
    assert len(server.conversations) == conversations
    link.close()


def test_after_a_pause_a_server_that_was_restarted_is_noticed_before_anything_is_sent(server, relay, monkeypatch):
    monkeypatch.setattr("hosting.clients.quic._PROBE_S", 0.2)
    with serving() as first:
        relay.target = (first.host, first.port)
        link = QuicLink("127.0.0.1", relay.port, pin=certificate().sha256)
        assert ask(link) == digest(b"x")
        rest(link)
        relay.target = None
    relay.target = (server.host, server.port)
    assert ask(link, b"again") == digest(b"again")
    assert not link.closed
    link.close()


def test_a_server_that_left_is_reported_when_it_is_not_back(server):
    with serving() as leaving:
        link = link_to(leaving)
    with pytest.raises(ConnectError, match="nothing listens there"):
        ask(link)
    assert link.closed


def test_a_connection_that_breaks_after_the_request_was_sent():
    with serving() as server:
        link = link_to(server)
        failures: list[Exception] = []

        def wait() -> None:
            try:
                ask(link, b"hold")
            except ConnectionLostError as error:
                failures.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        assert server.holding.wait(TIMEOUT_S)
        server.wait(server.transport.close())
        thread.join(TIMEOUT_S)
        assert "broke while a reply was awaited" in str(failures[0])
        assert link.closed


def test_a_server_that_was_restarted_says_that_it_does_not_know_the_connection(server, relay, monkeypatch):
    monkeypatch.setattr("hosting.clients.quic_channel.LOST_AFTER_S", 1e9)
    with serving() as first:
        relay.target = (first.host, first.port)
        link = QuicLink("127.0.0.1", relay.port, pin=certificate().sha256)
        assert ask(link) == digest(b"x")
        relay.target = (server.host, server.port)
        with pytest.raises(ConnectionLostError, match="does not know it"):
            ask(link)
    assert link.closed


class Way:
    """The way to a server that is not on this machine: datagrams above ``mtu`` bytes are lost, or refused where the first link is that narrow."""

    def __init__(self, monkeypatch, mtu: int) -> None:
        self.mtu, self.first_link_is_narrow = mtu, False
        self.lost = 0
        configuration = quic_settings.client_configuration
        monkeypatch.setattr(
            "hosting.clients.quic.client_configuration", lambda *name, **options: configuration(*name, **{**options, "loopback": False})
        )
        send, path = UdpSocket._send_run, self

        def carry(udp, run, *where):
            if max(map(len, run)) <= path.mtu:
                send(udp, run, *where)
            elif len(run) > 1 or path.first_link_is_narrow:
                raise OSError(errno.EMSGSIZE, "Message too long")
            else:
                path.lost += 1

        monkeypatch.setattr(UdpSocket, "_send_run", carry)


def test_a_path_that_carries_no_more_than_every_path_must(server, monkeypatch):
    path = Way(monkeypatch, 1200)
    link = link_to(server)
    for _ in range(3):
        body = os.urandom(200_000)
        assert ask(link, body) == digest(body)
    assert path.lost, "larger datagrams were tried"
    link.close()


@pytest.mark.parametrize("timeout_s", [TIMEOUT_S, 0.2])
def test_a_path_that_has_become_narrower(server, monkeypatch, timeout_s):
    """As when a VPN comes up: small datagrams get through, so that the server is heard, and large ones never again."""
    path = Way(monkeypatch, 1500)
    monkeypatch.setattr("hosting.clients.quic_channel.STUCK_AFTER_S", 0.6)
    monkeypatch.setattr("hosting.clients.quic_channel.PING_AFTER_S", 0.2)
    link = link_to(server)
    for _ in range(5):
        ask(link, os.urandom(200_000))
    path.mtu = 1300

    def ask_again_and_again() -> None:
        while True:
            try:
                ask(link, os.urandom(20_000), timeout_s)
            except ReplyTimeoutError:
                assert timeout_s < TIMEOUT_S

    with pytest.raises(ConnectionLostError, match="the server is there, but no request has got through"):
        ask_again_and_again()
    assert path.lost


def test_a_first_link_that_has_become_narrower_is_noticed_at_once(server, monkeypatch):
    path = Way(monkeypatch, 1500)
    link = link_to(server)
    for _ in range(5):
        ask(link, os.urandom(200_000))
    path.mtu, path.first_link_is_narrow = 1300, True
    with pytest.raises(ConnectionLostError, match="the network takes only smaller datagrams than before"):
        ask(link, os.urandom(20_000))
    link = link_to(server)
    assert ask(link, bytes(200_000)) == digest(bytes(200_000))
    link.close()


def test_what_a_router_says_of_a_probe_does_not_move_the_link(server, monkeypatch):
    link = link_to(server)
    (channel,) = link._channels
    udp, said = channel._udp, []

    def receive(limit=64):
        if not said:
            said.append(True)
            raise OSError(errno.EMSGSIZE, "Message too long")
        return UdpSocket.receive(udp, limit)

    monkeypatch.setattr(udp, "receive", receive)
    assert ask(link) == digest(b"x")
    assert said and channel._udp is udp
    link.close()


def test_a_server_that_falls_silent_is_given_up(server, relay, monkeypatch):
    monkeypatch.setattr("hosting.clients.quic_channel.LOST_AFTER_S", 0.3)
    monkeypatch.setattr("hosting.clients.quic_channel.PING_AFTER_S", 0.1)
    link = QuicLink("127.0.0.1", relay.port, pin=certificate().sha256)
    relay.target = None
    with pytest.raises(ConnectionLostError, match=r"nothing was heard from the server for 0.3 s"):
        ask(link)
    assert link.closed


def test_a_server_that_thinks_for_long_is_asked_for_signs_of_life(server, monkeypatch):
    monkeypatch.setattr("hosting.clients.quic_channel.LOST_AFTER_S", 0.3)
    monkeypatch.setattr("hosting.clients.quic_channel.STUCK_AFTER_S", 0.3)
    monkeypatch.setattr("hosting.clients.quic_channel.PING_AFTER_S", 0.05)
    with serving() as thinking:
        link = link_to(thinking)
        answers: list[bytes] = []
        thread = threading.Thread(target=lambda: answers.append(ask(link, b"hold")))
        thread.start()
        thread.join(0.8)  # much longer than a silent server is waited for
        assert thread.is_alive() and not answers
        thinking.call(thinking.gate.set)
        thread.join(TIMEOUT_S)
        assert answers == [digest(b"hold")]
        link.close()


def test_an_exchange_that_is_interrupted_leaves_a_link_that_can_go_on(server, monkeypatch):
    link = link_to(server)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hosting.clients.quic._settled", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ask(link, b"x")
    assert ask(link, b"y") == digest(b"y")
    link.close()


def test_sixty_megabytes():
    with serving(max_message_bytes=60 << 20) as server:
        link = link_to(server, max_message_bytes=LIMIT)
        body = os.urandom(1 << 20) * 60
        assert ask(link, body) == digest(body)
        link.close()
