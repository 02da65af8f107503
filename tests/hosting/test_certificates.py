"""Certificates: made once and kept, loaded from files, and every way in which the files can be wrong."""

from __future__ import annotations

import errno
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from hosting.certificates import CERTIFICATE_FILE, KEY_FILE, load_certificate, local_certificate, normalize_sha256
from hosting.quic_settings import server_configuration
from pi0.errors import ConfigError


def write_pair(
    directory: Path, key, *, days: int = 30, password: bytes | None = None, key_format=serialization.PrivateFormat.PKCS8
) -> tuple[Path, Path]:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "robot")])
    now = datetime.now(UTC)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=60))
        .not_valid_after(now + timedelta(days=days))
        .sign(key, algorithm)
    )
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    cert_file, key_file = directory / "cert.pem", directory / "key.pem"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, key_format, encryption))
    return cert_file, key_file


@pytest.fixture(scope="module")
def p256():
    return ec.generate_private_key(ec.SECP256R1())


def test_a_certificate_is_made_once_and_kept(tmp_path):
    first = local_certificate(tmp_path / "new")
    again = local_certificate(tmp_path / "new")
    assert first == again
    assert (tmp_path / "new" / KEY_FILE).stat().st_mode & 0o777 == 0o600
    leaf = x509.load_pem_x509_certificate(first.chain_pem)
    assert leaf.fingerprint(hashes.SHA256()).hex() == first.sha256
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "localhost" in names.get_values_for_type(x509.DNSName)
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert leaf.not_valid_after_utc - datetime.now(UTC) > timedelta(days=3600)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {CERTIFICATE_FILE, KEY_FILE, ".tandem-certificate.lock"}


def test_the_key_is_not_in_the_repr(tmp_path):
    assert "PRIVATE" not in repr(local_certificate(tmp_path))


def test_servers_that_start_together_agree(tmp_path):
    made = []
    threads = [threading.Thread(target=lambda: made.append(local_certificate(tmp_path).sha256)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 6 and len(set(made)) == 1


def test_a_directory_that_has_both_may_be_read_only(tmp_path, monkeypatch):
    first = local_certificate(tmp_path)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)  # chmod does not stop root, whom tests may run as
    assert local_certificate(tmp_path) == first


def test_a_clock_that_has_never_been_set_does_not_make_a_certificate_of_the_past(tmp_path, monkeypatch):
    class Unset(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(1970, 1, 1, tzinfo=tz)

    with monkeypatch.context() as patch:
        patch.setattr("hosting.certificates.datetime", Unset)
        made = local_certificate(tmp_path)
    assert local_certificate(tmp_path) == made
    leaf = x509.load_pem_x509_certificate(made.chain_pem)
    assert leaf.not_valid_before_utc < datetime.now(UTC) < leaf.not_valid_after_utc


@pytest.mark.parametrize("gone", [CERTIFICATE_FILE, KEY_FILE])
def test_half_of_a_pair_is_not_replaced(tmp_path, gone):
    local_certificate(tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(ConfigError, match=rf"^certificate_dir: .*{gone} is missing beside"):
        local_certificate(tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match=r"^tls\.dir: cannot keep a certificate in .*; choose a directory"):
        local_certificate(blocked / "below", field="tls.dir")


def test_a_machine_whose_name_is_no_dns_name(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "My Robot_Ü!")
    leaf = x509.load_pem_x509_certificate(local_certificate(tmp_path).chain_pem)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]


@pytest.mark.parametrize("key_format", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL])
def test_files_are_loaded_in_a_form_that_the_quic_library_takes(tmp_path, p256, key_format):
    certificate = load_certificate(*write_pair(tmp_path, p256, key_format=key_format))
    assert certificate.key_pem.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert server_configuration(certificate).private_key is not None


def test_an_rsa_key_is_fine(tmp_path):
    certificate = load_certificate(*write_pair(tmp_path, rsa.generate_private_key(65537, 2048)))
    assert server_configuration(certificate).private_key is not None


def failing(cert_file: Path, key_file: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_certificate(cert_file, key_file, cert_field="tls.cert", key_field="tls.key")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_files(tmp_path, p256):
    cert_file, key_file = write_pair(tmp_path, p256)
    assert failing(tmp_path / "no.pem", key_file).startswith(f"tls.cert: cannot read {tmp_path}/no.pem (No such file")
    assert failing(cert_file, tmp_path / "no.pem").startswith(f"tls.key: cannot read {tmp_path}/no.pem (No such file")
    assert failing(tmp_path, key_file).startswith(f"tls.cert: cannot read {tmp_path} (Is a directory")


def test_an_unreadable_key(tmp_path, p256, monkeypatch):
    cert_file, key_file = write_pair(tmp_path, p256)
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == key_file:
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)  # chmod does not stop root, whom tests may run as
    assert failing(cert_file, key_file) == f"tls.key: cannot read {key_file} (Permission denied)"


def test_files_that_hold_something_else(tmp_path, p256):
    cert_file, key_file = write_pair(tmp_path, p256)
    assert failing(key_file, key_file).startswith("tls.cert: ") and "no PEM certificate" in failing(key_file, key_file)
    assert "no PEM private key" in failing(cert_file, cert_file)
    cert_file.write_bytes(b"\x00\xff")
    assert "no PEM certificate" in failing(cert_file, key_file)


def test_an_encrypted_key(tmp_path, p256):
    assert "is encrypted" in failing(*write_pair(tmp_path, p256, password=b"secret"))


def test_a_key_of_another_certificate(tmp_path, p256):
    cert_file, key_file = write_pair(tmp_path, p256)
    other = tmp_path / "other"
    other.mkdir()
    _, other_key = write_pair(other, ec.generate_private_key(ec.SECP256R1()))
    assert f"{other_key} is not the key of tls.cert {cert_file}" in failing(cert_file, other_key)
    assert load_certificate(cert_file, key_file)


def test_an_expired_certificate(tmp_path, p256):
    assert "expired on" in failing(*write_pair(tmp_path, p256, days=-1))


def test_a_kind_of_key_that_clients_do_not_offer(tmp_path):
    assert "expect an ECDSA (P-256 or P-384) or RSA key" in failing(*write_pair(tmp_path, ed25519.Ed25519PrivateKey.generate()))


@pytest.mark.parametrize("curve", [ec.SECP521R1(), ec.SECP256K1()])
def test_a_curve_that_clients_do_not_offer(tmp_path, curve):
    text = failing(*write_pair(tmp_path, ec.generate_private_key(curve)))
    assert f"is an ECDSA key on {curve.name}; clients expect" in text


def test_the_other_curve_is_fine(tmp_path):
    assert server_configuration(load_certificate(*write_pair(tmp_path, ec.generate_private_key(ec.SECP384R1())))).private_key is not None


@pytest.mark.parametrize("key_first", [True, False])
def test_one_file_may_hold_both(tmp_path, p256, key_first):
    cert_file, key_file = write_pair(tmp_path, p256)
    pieces = [b"Bag Attributes\n", cert_file.read_bytes(), key_file.read_bytes()]
    both = tmp_path / "both.pem"
    both.write_bytes(b"".join(reversed(pieces) if key_first else pieces))
    certificate = load_certificate(both, both)
    assert b"PRIVATE" not in certificate.chain_pem
    assert server_configuration(certificate).private_key is not None


@pytest.mark.parametrize(
    "write", [str.upper, str.lower, lambda text: ":".join(text[i : i + 2] for i in range(0, 64, 2)), lambda text: f" sha256:{text}\n"]
)
def test_fingerprints_are_taken_as_people_write_them(write):
    assert normalize_sha256(write("0123456789abcdef" * 4)) == "0123456789abcdef" * 4


@pytest.mark.parametrize("text", ["", "abc", "g" * 64, "0" * 63, "0" * 65, "0x" + "0" * 62])
def test_what_is_no_fingerprint(text):
    with pytest.raises(ValueError, match=r"^pin: .* is no SHA-256 fingerprint; expected 64 hexadecimal digits"):
        normalize_sha256(text)
