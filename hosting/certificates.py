"""The server's certificate: loaded from PEM files, or made at the first start and kept, so that clients can pin it.

Clients trust a certificate through a CA or through its SHA-256 (a *pin*). The one made here is a leaf (``CA:FALSE``: verifiers refuse a
self-signed certificate that claims to be a CA when it is used as a server's own) without an extended key usage (qh3 takes no certificate
that has one into its trust store) and with an ECDSA P-256 key, which every QUIC stack offers.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pi0.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

logger = logging.getLogger(__name__)

CERTIFICATE_FILE = "tandem-cert.pem"
KEY_FILE = "tandem-key.pem"
_VALID_FOR = timedelta(days=3653)
_NOT_BEFORE = datetime(2026, 1, 1, tzinfo=UTC)
_CURVES = {"secp256r1", "secp384r1"}


@dataclass(frozen=True)
class Certificate:
    """A server's certificate and key.

    Attributes:
        chain_pem: the leaf and what its issuers sent with it, PEM, and nothing else.
        key_pem: the leaf's private key, PEM (PKCS #8, unencrypted).
        sha256: of the leaf's DER form, lower-case hexadecimal: what a client pins.
    """

    chain_pem: bytes
    key_pem: bytes
    sha256: str

    def __repr__(self) -> str:
        return f"Certificate(sha256={self.sha256!r})"


def normalize_sha256(text: str) -> str:
    """A fingerprint as this package writes it: 64 lower-case hexadecimal digits. Colons, spaces and upper case are accepted.

    Raises:
        ValueError: the text is no SHA-256.
    """
    digits = text.strip().lower().removeprefix("sha256:").replace(":", "").replace(" ", "")
    if len(digits) != 64 or not set(digits) <= set("0123456789abcdef"):
        raise ValueError(f"pin: {text!r} is no SHA-256 fingerprint; expected 64 hexadecimal digits, as the server's log shows them")
    return digits


def load_certificate(cert_file: Path, key_file: Path, *, cert_field: str = "cert_file", key_field: str = "key_file") -> Certificate:
    """A certificate chain (leaf first) and its key from PEM files.

    Args:
        cert_field, key_field: the configuration fields the paths come from, for the error messages.

    Raises:
        ConfigError: a file cannot be read or parsed, the two do not belong together, the certificate has expired or no QUIC client would take it.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    raw_chain, raw_key = _read(cert_field, cert_file), _read(key_field, key_file)
    try:
        chain = x509.load_pem_x509_certificates(raw_chain)
    except ValueError as error:
        raise ConfigError(f"{cert_field}: {cert_file} holds no PEM certificate; expected a -----BEGIN CERTIFICATE----- block, leaf first") from error
    try:
        key = serialization.load_pem_private_key(raw_key, password=None)
    except TypeError as error:
        raise ConfigError(f"{key_field}: {key_file} is encrypted; store the key without a passphrase, readable by this user only") from error
    except ValueError as error:
        raise ConfigError(f"{key_field}: {key_file} holds no PEM private key; expected a -----BEGIN PRIVATE KEY----- block") from error
    if not (isinstance(key, rsa.RSAPrivateKey) or (isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES)):
        kind = f"ECDSA key on {key.curve.name}" if isinstance(key, ec.EllipticCurvePrivateKey) else type(key).__name__
        raise ConfigError(f"{key_field}: {key_file} is an {kind}; clients expect an ECDSA (P-256 or P-384) or RSA key")
    leaf = chain[0]
    if _public_bytes(key.public_key()) != _public_bytes(leaf.public_key()):
        raise ConfigError(f"{key_field}: {key_file} is not the key of {cert_field} {cert_file}; give the key that the certificate was made for")
    if leaf.not_valid_after_utc < datetime.now(UTC):
        raise ConfigError(
            f"{cert_field}: {cert_file} expired on {leaf.not_valid_after_utc:%Y-%m-%d}; renew it, or if this server made it, delete it and its key"
        )
    key_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    chain_pem = b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in chain)
    return Certificate(chain_pem, key_pem, leaf.fingerprint(hashes.SHA256()).hex())


def local_certificate(directory: Path, *, field: str = "certificate_dir") -> Certificate:
    """The self-signed certificate kept in ``directory``; made there when there is none, so that its pin survives restarts.

    Good for ``localhost``, ``127.0.0.1``, ``::1`` and this machine's name, for ten years.

    Raises:
        ConfigError: the directory cannot be written, or what it holds is unusable.
    """
    from filelock import FileLock

    cert_file, key_file = directory / CERTIFICATE_FILE, directory / KEY_FILE
    try:
        if not (cert_file.exists() and key_file.exists()):  # with both, the directory may be read-only
            directory.mkdir(parents=True, exist_ok=True)
            with FileLock(directory / ".tandem-certificate.lock"):
                if not cert_file.exists() and not key_file.exists():
                    _make(cert_file, key_file)
    except OSError as error:
        raise ConfigError(
            f"{field}: cannot keep a certificate in {directory} ({error.strerror or error}); choose a directory this user can write"
        ) from error
    if not (cert_file.exists() and key_file.exists()):
        missing, left = (key_file, cert_file) if cert_file.exists() else (cert_file, key_file)
        raise ConfigError(
            f"{field}: {missing} is missing beside {left.name}; restore it, or delete {left.name} to have a new certificate made (its pin changes)"
        )
    return load_certificate(cert_file, key_file, cert_field=field, key_field=field)


def _make(cert_file: Path, key_file: Path) -> None:
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _self_signed(key)
    key_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write(key_file, key_pem, 0o600)
    _write(cert_file, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    logger.info("made a self-signed certificate in %s, sha256 %s", cert_file.parent, certificate.fingerprint(hashes.SHA256()).hex())


def _self_signed(key: EllipticCurvePrivateKey) -> x509.Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    # Whatever the machine calls itself must be a DNS name to be put into a certificate.
    names = ["localhost"]
    hostname = socket.gethostname().lower()
    if hostname not in names and all(part.isascii() and part.replace("-", "").isalnum() for part in hostname.split(".")):
        names.append(hostname)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tandem")])
    # A client whose clock lags must be able to connect on the first day. A computer without a battery for its clock begins in 1970.
    start = max(datetime.now(UTC) - timedelta(days=1), _NOT_BEFORE)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + _VALID_FOR)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([*map(x509.DNSName, names), *_loopback_addresses()]), critical=False)
        .sign(key, hashes.SHA256())
    )


def _loopback_addresses() -> list[x509.IPAddress]:
    from ipaddress import ip_address

    from cryptography import x509

    return [x509.IPAddress(ip_address(address)) for address in ("127.0.0.1", "::1")]


def _public_bytes(key: object) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined, no-any-return]


def _read(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{field}: cannot read {path} ({error.strerror or error})") from error


def _write(path: Path, content: bytes, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # a robot is switched off without being asked; an empty key would be there for good
    temporary.replace(path)
