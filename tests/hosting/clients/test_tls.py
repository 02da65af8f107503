"""Which servers are trusted over TLS."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from websockets.sync.server import ServerConnection

from hosting.clients.errors import AuthenticationError, ConnectError
from hosting.clients.tls import client_context
from hosting.clients.websocket import WebSocketLink
from tests.hosting.clients.scripted import echo, server


@dataclass(frozen=True)
class Certificate:
    file: Path
    context: ssl.SSLContext
    sha256: str


def make_certificate(directory: Path, name: str) -> Certificate:
    """A self-signed leaf for 127.0.0.1 and ``name``."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    certificate = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    certificate_file, key_file = directory / f"{name}.pem", directory / f"{name}.key"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_file, key_file)
    return Certificate(certificate_file, context, hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"), "robot.test")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"), "other.test")


def colons(digits: str) -> str:
    return ":".join(digits[at : at + 2] for at in range(0, 64, 2)).upper()


def test_who_is_trusted(certificate: Certificate) -> None:
    with server(echo, context=certificate.context) as url:
        for trusted in (
            {"pin": certificate.sha256},
            {"pin": colons(certificate.sha256)},
            {"cafile": str(certificate.file)},
            {"cafile": str(certificate.file), "server_name": "robot.test"},
            {"verify": False},
        ):
            link = WebSocketLink(url, **trusted)  # type: ignore[arg-type]
            assert not link.closed, trusted
            link.close()


def test_an_unknown_certificate_and_what_to_do(certificate: Certificate) -> None:
    with server(echo, context=certificate.context) as url, pytest.raises(AuthenticationError) as error:
        WebSocketLink(url)
    assert str(error.value).startswith(f"cannot trust {url}: ")
    assert str(error.value).endswith("; give pin=… (the server's log has its SHA-256) or cafile=…")


def test_a_certificate_for_another_host(certificate: Certificate) -> None:
    with server(echo, context=certificate.context) as url, pytest.raises(AuthenticationError, match=r"^cannot trust wss://.*elsewhere\.test"):
        WebSocketLink(url, cafile=str(certificate.file), server_name="elsewhere.test")


def test_another_certificate_than_the_pinned_one_is_not_shown_the_key(certificate: Certificate, other: Certificate) -> None:
    requests: list[object] = []

    def converse(connection: ServerConnection) -> None:
        requests.append(connection.request)

    with server(converse, context=certificate.context) as url, pytest.raises(AuthenticationError) as error:
        WebSocketLink(url, pin=other.sha256, api_key="secret")
    assert str(error.value) == f"the server's certificate has the SHA-256 {certificate.sha256}, expected the pinned {other.sha256}"
    assert not requests


@pytest.mark.parametrize("pin", ["", "abc", "x" * 64, "a" * 63, "a" * 65])
def test_a_pin_that_is_none(pin: str) -> None:
    with pytest.raises(ValueError, match=r"^pin: '.*' is no SHA-256 fingerprint; expected 64 hexadecimal digits"):
        client_context(pin=pin, cafile=None, verify=True)


def test_authorities_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for name in ("missing.pem", "ca.pem"):
        with pytest.raises(AuthenticationError, match=rf"^cafile: cannot read {tmp_path / name} \(.*\); expected certificates in PEM$"):
            client_context(pin=None, cafile=str(tmp_path / name), verify=True)


def test_a_plain_server_where_tls_was_expected() -> None:
    with server(echo) as url, pytest.raises(ConnectError, match=r"^cannot connect to wss://"):
        WebSocketLink(url.replace("ws:", "wss:"), verify=False)
