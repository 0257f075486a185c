"""Vendors of our own: a PKI in Intel's formats and one in AMD's, which sign any quote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

from teegpu.attest import amd
from teegpu.attest.evidence import Collateral
from teegpu.attest.verify import Roots

NOW = 1_800_000_000
DAY = 86400

FMSPC = bytes.fromhex("00906ea10000")
PPID = bytes(range(16))
CHIP = bytes(range(64))
MODULE_SIGNER = b"\x02" * 48
QE_SIGNER = b"\x03" * 32
PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def pem(*certificates: x509.Certificate) -> str:
    return "".join(each.public_bytes(serialization.Encoding.PEM).decode() for each in certificates)


# Just enough of DER for Intel's extension


def tlv(tag: int, content: bytes) -> bytes:
    length = len(content)
    head = bytes([length]) if length < 128 else bytes([0x82, length >> 8, length & 255])
    return bytes([tag]) + head + content


def sgx_oid(*parts: int) -> bytes:
    return tlv(6, bytes.fromhex("2a864886f84d010d01") + bytes(parts))


def entry(oid: tuple[int, ...], value: bytes) -> bytes:
    return tlv(0x30, sgx_oid(*oid) + value)


def integer(value: int) -> bytes:
    return tlv(2, value.to_bytes(1 + value.bit_length() // 8, "big"))


def sgx_extension(cpu_svn: bytes, pce_svn: int) -> bytes:
    levels = b"".join(entry((2, index + 1), integer(svn)) for index, svn in enumerate(cpu_svn))
    levels += entry((2, 17), integer(pce_svn)) + entry((2, 18), tlv(4, cpu_svn))
    return tlv(
        0x30,
        entry((1,), tlv(4, PPID))
        + entry((2,), tlv(0x30, levels))
        + entry((3,), tlv(4, b"\0\0"))
        + entry((4,), tlv(4, FMSPC))
        + entry((5,), tlv(0x0A, b"\0")),
    )


# Certificates


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def certificate(
    subject: str,
    key: Any,
    issuer: x509.Certificate | None,
    issuer_key: Any,
    *,
    ca: bool,
    extensions: Mapping[str, bytes] = {},
    pss: bool = False,
    not_after: float = NOW + 1000 * DAY,
    serial: int = 0,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(subject) if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(at(NOW - 1000 * DAY))
        .not_valid_after(at(not_after))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(
            x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False), critical=True
        )
    )  # fmt: skip
    for oid, value in extensions.items():
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False)
    if pss:
        return builder.sign(issuer_key, hashes.SHA384(), rsa_padding=PSS)
    return builder.sign(issuer_key, hashes.SHA256())


def crl(
    issuer: x509.Certificate,
    key: Any,
    revoked: tuple[int, ...] = (),
    *,
    pss: bool = False,
    begins: float = NOW - DAY,
    ends: float = NOW + 30 * DAY,
) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(at(begins))
        .next_update(at(ends))
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    for serial in revoked:
        each = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at(begins - DAY)).build()
        builder = builder.add_revoked_certificate(each)
    made = builder.sign(key, hashes.SHA384(), rsa_padding=PSS) if pss else builder.sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.DER)


def raw_signature(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def point(key: ec.EllipticCurvePrivateKey) -> bytes:
    numbers = key.public_key().public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


@dataclass
class Intel:
    """``cpu_svn``: of the platform; ``status``: what Intel says of it."""

    cpu_svn: bytes = bytes([5] * 16)
    status: str = "UpToDate"
    tcb_date: float = NOW - 100 * DAY
    issued: float = NOW - 2 * DAY
    expires: float = NOW + 28 * DAY
    pck_not_after: float = NOW + 1000 * DAY
    root: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        def new() -> ec.EllipticCurvePrivateKey:
            return ec.generate_private_key(ec.SECP256R1())

        self.pck_ca_key, self.pck_key, self.tcb_key, self.attestation_key = new(), new(), new(), new()
        self.root_cert = certificate("Intel SGX Root CA", self.root, None, self.root, ca=True)
        self.pck_ca = certificate("Intel SGX PCK Platform CA", self.pck_ca_key, self.root_cert, self.root, ca=True)
        self.pck = certificate(
            "Intel SGX PCK Certificate", self.pck_key, self.pck_ca, self.pck_ca_key, ca=False,
            extensions={"1.2.840.113741.1.13.1": sgx_extension(self.cpu_svn, 11)}, not_after=self.pck_not_after,
        )  # fmt: skip
        self.tcb = certificate("Intel SGX TCB Signing", self.tcb_key, self.root_cert, self.root, ca=False)

    @property
    def roots(self) -> Roots:
        return Roots(intel=der(self.root_cert))

    def collateral(self, kind: str, **changes: Any) -> Collateral:
        """``changes``: ``revoked_pck``, ``revoked_ca`` (whether they are), ``issued``, ``crl_issued``."""
        issued = changes.get("issued", self.issued)
        times = {"issueDate": stamp(issued), "nextUpdate": stamp(self.expires), "tcbEvaluationDataNumber": 17}
        levels = [
            {
                "tcb": {
                    "sgxtcbcomponents": [{"svn": svn} for svn in [5] * 16],
                    "pcesvn": 11,
                    **({"tdxtcbcomponents": [{"svn": svn} for svn in (3, 0, *[3] * 14)]} if kind == "tdx" else {}),
                },
                "tcbDate": stamp(self.tcb_date),
                "tcbStatus": self.status,
                "advisoryIDs": [] if self.status == "UpToDate" else ["INTEL-SA-00001"],
            }
        ]
        info: dict[str, Any] = {
            "id": "TDX" if kind == "tdx" else "SGX",
            "version": 3,
            **times,
            "fmspc": FMSPC.hex().upper(),
            "pceId": "0000",
            "tcbType": 0,
            "tcbLevels": levels,
        }
        if kind == "tdx":
            info["tdxModule"] = {"mrsigner": MODULE_SIGNER.hex(), "attributes": "00" * 8, "attributesMask": "ff" * 8}
        identity = {
            "id": "TD_QE" if kind == "tdx" else "QE",
            "version": 2,
            **times,
            "miscselect": "00000000",
            "miscselectMask": "ffffffff",
            "attributes": "11" + "00" * 15,
            "attributesMask": "fb" + "ff" * 7 + "00" * 8,
            "mrsigner": QE_SIGNER.hex(),
            "isvprodid": 2,
            "tcbLevels": [{"tcb": {"isvsvn": 4}, "tcbDate": stamp(self.tcb_date), "tcbStatus": "UpToDate"}],
        }
        tcb_info, qe_identity = json.dumps(info), json.dumps(identity)
        begins = changes.get("crl_issued", issued)
        revoked_pck = (self.pck.serial_number,) if changes.get("revoked_pck") else ()
        revoked_ca = (self.pck_ca.serial_number,) if changes.get("revoked_ca") else ()
        return Collateral(
            intel={
                "pck_crl_issuer_chain": pem(self.pck_ca, self.root_cert),
                "root_ca_crl": crl(self.root_cert, self.root, revoked_ca, begins=begins).hex(),
                "pck_crl": crl(self.pck_ca, self.pck_ca_key, revoked_pck, begins=begins).hex(),
                "tcb_info_issuer_chain": pem(self.tcb, self.root_cert),
                "tcb_info": tcb_info,
                "tcb_info_signature": raw_signature(self.tcb_key, tcb_info.encode()).hex(),
                "qe_identity_issuer_chain": pem(self.tcb, self.root_cert),
                "qe_identity": qe_identity,
                "qe_identity_signature": raw_signature(self.tcb_key, qe_identity.encode()).hex(),
            }
        )

    def quote(self, kind: str, body: bytes) -> bytes:
        """Any body, signed."""
        tdx = kind == "tdx"
        head = (4 if tdx else 3).to_bytes(2, "little") + b"\2\0" + (0x81 if tdx else 0).to_bytes(4, "little")
        head += bytes(4) + bytes.fromhex("939a7233f79c4ca9940a0db3957f0607") + bytes(20)
        signed = head + body
        extra = bytes(32)
        key = point(self.attestation_key)
        qe = enclave_report(
            signer=QE_SIGNER, attributes=b"\x11" + bytes(15), product=2, svn=4,
            report_data=hashlib.sha256(key + extra).digest() + bytes(32),
        )  # fmt: skip
        chain = pem(self.pck, self.pck_ca, self.root_cert).encode()
        qe_part = qe + raw_signature(self.pck_key, qe) + sized(extra, 2) + b"\5\0" + sized(chain, 4)
        auth = raw_signature(self.attestation_key, signed) + key
        auth += b"\6\0" + sized(qe_part, 4) if tdx else qe_part
        return signed + sized(auth, 4)


def stamp(seconds: float) -> str:
    return at(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


def sized(data: bytes, width: int) -> bytes:
    return len(data).to_bytes(width, "little") + data


def enclave_report(
    *,
    enclave: bytes = b"\x0e" * 32,
    signer: bytes = b"\x0f" * 32,
    attributes: bytes = b"\x05" + bytes(15),
    product: int = 1,
    svn: int = 3,
    report_data: bytes,
) -> bytes:
    return (
        bytes([5] * 16) + bytes(32) + attributes + enclave + bytes(32) + signer + bytes(96)
        + product.to_bytes(2, "little") + svn.to_bytes(2, "little") + bytes(60) + report_data
    )  # fmt: skip


def td_report(
    *,
    mrtd: bytes = b"\xa0" * 48,
    rtmrs: tuple[bytes, ...] = tuple(bytes([0xB0 + number]) * 48 for number in range(4)),
    attributes: bytes = b"\0\0\0\x10\0\0\0\0",
    report_data: bytes,
) -> bytes:
    return (
        b"\3\0" + bytes([3] * 14) + b"\xc0" * 48 + MODULE_SIGNER + bytes(8) + attributes + bytes(8) + mrtd
        + bytes(3 * 48) + b"".join(rtmrs) + report_data
    )  # fmt: skip


@dataclass
class Amd:
    tcb: tuple[int, int, int, int] = (3, 0, 20, 209)
    chip: bytes = CHIP
    vcek_tcb: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        self.ark_key, self.ask_key = rsa_keys()
        self.vcek_key = ec.generate_private_key(ec.SECP384R1())
        self.ark = certificate("ARK-Milan", self.ark_key, None, self.ark_key, ca=True, pss=True)
        self.ask = certificate("SEV-Milan", self.ask_key, self.ark, self.ark_key, ca=True, pss=True)
        prefix = "1.3.6.1.4.1.3704.1."
        levels = zip(("3.1", "3.2", "3.3", "3.8"), self.vcek_tcb or self.tcb, strict=True)
        extensions = {prefix + suffix: integer(level) for suffix, level in levels} | {prefix + "4": self.chip}
        self.vcek = certificate(
            "SEV-VCEK", self.vcek_key, self.ask, self.ask_key, ca=False, extensions=extensions, pss=True
        )

    @property
    def roots(self) -> Roots:
        return Roots(amd={amd.key_digest(self.ark): "Milan"})

    def collateral(self, *, revoked: bool = False, begins: float = NOW - DAY) -> Collateral:
        serials = (self.ask.serial_number,) if revoked else ()
        listed = crl(self.ark, self.ark_key, serials, pss=True, begins=begins)
        return Collateral(amd={"vcek": der(self.vcek), "ask": der(self.ask), "ark": der(self.ark), "crl": listed})

    def report(
        self,
        *,
        report_data: bytes,
        measurement: bytes = b"\xd0" * 48,
        policy: int = 0x30000,
        vmpl: int = 0,
        chip: bytes = CHIP,
        version: int = 2,
        signing: int = 0,
    ) -> bytes:
        body = bytearray(amd.SIGNED_BYTES)
        body[0:4] = version.to_bytes(4, "little")
        body[0x08:0x10] = policy.to_bytes(8, "little")
        body[0x30:0x34] = vmpl.to_bytes(4, "little")
        body[0x34] = 1
        body[0x48] = signing << 2
        body[0x50:0x90] = report_data
        body[0x90:0xC0] = measurement
        body[0x1A0:0x1E0] = chip
        for place, level in zip((0, 1, 6, 7), self.tcb, strict=True):
            body[0x180 + place] = level
        r, s = decode_dss_signature(self.vcek_key.sign(bytes(body), ec.ECDSA(hashes.SHA384())))
        signature = r.to_bytes(72, "little") + s.to_bytes(72, "little")
        return bytes(body) + signature + bytes(amd.REPORT_BYTES - amd.SIGNED_BYTES - 144)


@cache
def rsa_keys() -> tuple[rsa.RSAPrivateKey, rsa.RSAPrivateKey]:
    """Of two authorities; as short as can be signed with, since making keys is what takes time here."""
    first, second = (rsa.generate_private_key(65537, 2048) for _ in range(2))
    return first, second


@cache
def intel() -> Intel:
    return Intel()


@cache
def amd_vendor() -> Amd:
    return Amd()


def changed(collateral: Collateral, **parts: str) -> Collateral:
    """With other parts of Intel's."""
    return replace(collateral, intel={**collateral.intel, **parts})
