"""The TLS key of an attested endpoint: made at its start, held in memory, gone with it."""

from __future__ import annotations

import hashlib
import os
import secrets
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAYS: Final = 3650
"""How long the certificate says that it is good: nothing rests on that. Its key lives as long as its process."""


@dataclass(frozen=True)
class Identity:
    """``context`` is for a server; ``key`` is the SHA-256 of its public key, as ``key_digest`` has it."""

    context: ssl.SSLContext
    key: bytes


def new() -> Identity:
    """A key and a certificate that says nothing but the key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "teegpu, attested")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=_DAYS))
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # OpenSSL reads keys from files alone: what the file holds is encrypted, with a password that is in memory alone.
    password = secrets.token_bytes(32)
    sealed = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password),
    )
    with _file(certificate.public_bytes(serialization.Encoding.PEM) + sealed) as path:
        context.load_cert_chain(path, password=password)
    return Identity(context, key_digest(certificate.public_bytes(serialization.Encoding.DER)))


def key_digest(certificate: bytes) -> bytes:
    """The SHA-256 of the public key of a certificate (both in DER). Raises ``ValueError``."""
    key = x509.load_der_x509_certificate(certificate).public_key()
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(*form)).digest()


@contextmanager
def _file(content: bytes) -> Iterator[str]:
    """The path of a file with ``content``: in memory where the system has such files, as Gramine has not."""
    try:
        number = os.memfd_create("teegpu-tls")
    except (AttributeError, OSError):
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            yield file.name
        return
    with os.fdopen(number, "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{number}"
