"""SEV-SNP: reports as AMD's processors sign them, verified with ``cryptography``.

A report is signed by its chip's VCEK, a key for one chip at one level of firmware, whose certificate chains to AMD's
root for the line of processors. That root is known here by the digest of its key."""

from __future__ import annotations

import hashlib
import struct
import uuid
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.utils import CryptographyDeprecationWarning

from teegpu.attest.claims import Claims
from teegpu.attest.evidence import SNP, Collateral
from teegpu.errors import EvidenceError, refusal

REPORT_BYTES: Final = 0x4A0
SIGNED_BYTES: Final = 0x2A0

ROOTS: Final = {
    "9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9": "Milan",
    "429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831": "Genoa",
}
"""SHA-256 of the public keys (DER) of AMD's roots → line of processors. Turin counts its firmware otherwise, and is not
known here."""

TCB: Final = ("bootloader", "tee", "snp", "microcode")
"""The parts of a level of firmware, as policies name them."""

_TCB_BYTES: Final = dict(zip(TCB, (0, 1, 6, 7), strict=True))
_EXTENSION: Final = "1.3.6.1.4.1.3704.1."
_TCB_EXTENSIONS: Final = dict(zip(TCB, ("3.1", "3.2", "3.3", "3.8"), strict=True))

_DEBUG: Final = 1 << 19
_MIGRATION: Final = 1 << 18

_UNREADABLE: Final = (
    *(ValueError, TypeError, OverflowError, InvalidSignature, UnsupportedAlgorithm),
    *(x509.ExtensionNotFound, x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType),
)
"""What ``cryptography`` raises for certificates that are none, most of them only when a part is looked at."""

_CERTIFICATES: Final = {
    uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd"): "vcek",
    uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782"): "ask",
    uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae"): "ark",
}


def verify(report: bytes, collateral: Collateral, now: int, roots: Mapping[str, str] = ROOTS) -> Claims:
    """What ``report`` proves at ``now`` (Unix time). Raises ``AttestationError``."""
    _check_form(report)
    guest_policy = int.from_bytes(report[0x08:0x10], "little")
    if guest_policy & _DEBUG:
        raise refusal("debug", "the guest allows debugging: its host reads its memory")
    if guest_policy & _MIGRATION:
        raise refusal("migration", "the guest may be moved by a migration agent, which would have its memory")
    missing = [name for name in ("vcek", "ask", "ark", "crl") if name not in collateral.amd]
    if missing:
        raise refusal(
            "collateral",
            f"there is no {' and no '.join(missing)} to check the report with: get them with 'teegpu attest "
            "collateral' and give them with --collateral",
        )
    at = datetime.fromtimestamp(now, UTC)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)  # AMD numbers VCEKs 0, which X.509 forbids
        tcb = {name: report[0x180 + place] for name, place in _TCB_BYTES.items()}
        try:
            vcek, ask, ark = (x509.load_der_x509_certificate(collateral.amd[name]) for name in ("vcek", "ask", "ark"))
            _check_chain(vcek, ask, ark, at, roots)
            crl_at = _check_revocation(collateral.amd["crl"], ask, ark, at)
            _check_signature(report, vcek)
            _check_chip(report, vcek, tcb)
        except _UNREADABLE:
            raise refusal(
                "quote", "the certificates can't be read, or do not lead from AMD's root to the report's key"
            ) from None
    return Claims(
        kind=SNP,
        report_data=report[0x50:0x90],
        measurements={"measurement": report[0x90:0xC0].hex()},
        numbers={"vmpl": int.from_bytes(report[0x30:0x34], "little"), **tcb},
        platform=report[0x1A0:0x1E0].hex(),
        collateral_at=crl_at,
    )


def certificates(table: bytes) -> dict[str, bytes]:
    """The certificates in what the kernel calls auxblob: AMD's table of entries with GUID, offset and length. Raises
    ``EvidenceError``."""
    found: dict[str, bytes] = {}
    for start in range(0, len(table), 24):
        entry = table[start : start + 24]
        if not any(entry):
            break
        if len(entry) < 24:
            raise EvidenceError("the table of certificates beside the report ends within an entry")
        offset, length = struct.unpack("<II", entry[16:])
        if offset + length > len(table):
            raise EvidenceError("a certificate beside the report ends behind its table")
        if name := _CERTIFICATES.get(uuid.UUID(bytes_le=entry[:16])):
            found[name] = table[offset : offset + length]
    return found


def chain(pem: bytes) -> dict[str, bytes]:
    """``ask`` and ``ark`` of what AMD calls a certificate chain. Raises ``ValueError``."""
    found = x509.load_pem_x509_certificates(pem)
    if len(found) != 2:
        raise ValueError("a chain of certificates that are not two")
    return {
        name: each.public_bytes(serialization.Encoding.DER) for name, each in zip(("ask", "ark"), found, strict=True)
    }


def _check_form(report: bytes) -> None:
    if len(report) != REPORT_BYTES:
        raise refusal("quote", f"a report of {len(report)} bytes, and one has {REPORT_BYTES}")
    version, algorithm = (int.from_bytes(report[at : at + 4], "little") for at in (0, 0x34))
    if not 2 <= version <= 5 or algorithm != 1:
        raise refusal("quote", f"a report of version {version} and algorithm {algorithm} is not known")
    if report[0x48] >> 2 & 7:
        raise refusal("quote", "the report is not signed by a VCEK (but by a VLEK, or by none)")
    # r and s have 48 bytes each, in fields of 72; nothing stands behind them
    rest = report[SIGNED_BYTES + 48 : SIGNED_BYTES + 72] + report[SIGNED_BYTES + 120 :]
    if any(rest):
        raise refusal("quote", "there is something behind the report's signature")


def key_digest(certificate: x509.Certificate) -> str:
    """The SHA-256 of its public key in DER."""
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(certificate.public_key().public_bytes(*form)).hexdigest()


def _check_chain(
    vcek: x509.Certificate, ask: x509.Certificate, ark: x509.Certificate, at: datetime, roots: Mapping[str, str]
) -> None:
    if key_digest(ark) not in roots:
        raise refusal("quote", "the report's root is none of AMD's that are known here (Milan, Genoa)")
    for name, certificate, issuer in (("ark", ark, ark), ("ask", ask, ark), ("vcek", vcek, ask)):
        certificate.verify_directly_issued_by(issuer)
        if not certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc:
            raise refusal("quote", f"the certificate {name} is expired, or of the future")
    if not ask.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
        raise refusal("quote", "the certificate ask may not sign others")


def _check_revocation(raw: bytes, ask: x509.Certificate, ark: x509.Certificate, at: datetime) -> int:
    """When AMD's list of revoked certificates was made."""
    crl = x509.load_der_x509_crl(raw)
    if crl.issuer != ark.subject or not crl.is_signature_valid(ark.public_key()):  # type: ignore[arg-type]
        raise refusal("collateral", "the list of revoked certificates is not signed by AMD's root")
    begins, ends = crl.last_update_utc, crl.next_update_utc
    if ends is None or not begins <= at <= ends:
        raise refusal("collateral", "the list of revoked certificates is expired, or of the future")
    if crl.get_revoked_certificate_by_serial_number(ask.serial_number) is not None:
        raise refusal("quote", "the certificate ask has been revoked")
    return int(begins.timestamp())


def _check_signature(report: bytes, vcek: x509.Certificate) -> None:
    r, s = (int.from_bytes(report[at : at + 48], "little") for at in (SIGNED_BYTES, SIGNED_BYTES + 72))
    key = vcek.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise refusal("quote", "the report's key is not of the kind that AMD's chips have")
    key.verify(encode_dss_signature(r, s), report[:SIGNED_BYTES], ec.ECDSA(hashes.SHA384()))


def _check_chip(report: bytes, vcek: x509.Certificate, tcb: Mapping[str, int]) -> None:
    """The key is this chip's at this level of firmware."""
    chip = _extension(vcek, "4")
    if chip.removeprefix(b"\x04\x40") != report[0x1A0:0x1E0]:
        raise refusal("quote", "the report's key belongs to another chip")
    for name, suffix in _TCB_EXTENSIONS.items():
        found = _extension(vcek, suffix)
        # an INTEGER of one byte, or of two where the first bit of the value would be a sign
        if found[:1] != b"\x02" or len(found) not in (3, 4) or int.from_bytes(found[2:], "big") != tcb[name]:
            raise refusal("quote", f"the report's key is for another level of firmware ({name})")


def _extension(certificate: x509.Certificate, suffix: str) -> bytes:
    oid = x509.ObjectIdentifier(_EXTENSION + suffix)
    return certificate.extensions.get_extension_for_oid(oid).value.public_bytes()
