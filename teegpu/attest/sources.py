"""Where evidence comes from: the kernel's configfs-tsm (TDX, SEV-SNP), Gramine's files (SGX), or a simulation."""

from __future__ import annotations

import errno
import os
import secrets
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from teegpu.attest import amd, simulated
from teegpu.attest.binding import Binding
from teegpu.attest.evidence import MAX_QUOTE_BYTES, SGX, SIMULATED, SNP, TDX, Collateral, Evidence
from teegpu.errors import EvidenceError

ROOT: Final = Path("/")

_PROVIDERS: Final = {"tdx_guest": TDX, "sev_guest": SNP}
_REPORT_DATA_BYTES: Final = 64
_TRIES: Final = 5
"""A report for which somebody else wrote in between is asked for again, so often."""


@dataclass(frozen=True)
class Quoted:
    kind: str
    quote: bytes
    collateral: Collateral = field(default_factory=Collateral)


class Source(Protocol):
    """``describe`` is what a person calls it."""

    @property
    def describe(self) -> str: ...

    def quote(self, report_data: bytes) -> Quoted:
        """A quote over 64 bytes. Raises ``EvidenceError``."""


def find(root: Path = ROOT) -> Source | None:
    """The source of this machine; None outside of a TEE, or where it has none that is known."""
    if (root / "dev/attestation/attestation_type").exists():
        return Gramine(root / "dev/attestation")
    reports = root / "sys/kernel/config/tsm/report"
    return ConfigfsTsm(reports) if reports.is_dir() else None


class ConfigfsTsm:
    """``folder`` is the kernel's; each report has an entry of its own there, which nobody else writes to."""

    describe = "configfs-tsm"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def quote(self, report_data: bytes) -> Quoted:
        if len(report_data) != _REPORT_DATA_BYTES:
            raise ValueError(f"report data of {len(report_data)} bytes")
        entry = self._folder / f"teegpu-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self.make(entry)
        except OSError as error:
            raise EvidenceError(
                f"{self._folder}: no report can be asked for ({error.strerror or error}): is this user root, and a "
                "driver of the TEE loaded?"
            ) from None
        try:
            return self._quote(entry, report_data)
        except OSError as error:
            raise EvidenceError(f"{entry}: {_explained(error)}") from None
        finally:
            with suppress(OSError):
                entry.rmdir()

    def _quote(self, entry: Path, report_data: bytes) -> Quoted:
        provider = self.read(entry / "provider").decode("ascii", "replace").strip()
        kind = _PROVIDERS.get(provider)
        if kind is None:
            raise EvidenceError(f"configfs-tsm offers reports of {provider!r}, which are not known here")
        for _ in range(_TRIES):
            before = self._generation(entry)
            self.write(entry / "inblob", report_data)
            quote = self.read(entry / "outblob")
            table = self.read(entry / "auxblob") if kind == SNP else b""
            if self._generation(entry) == before + 1:
                break
        else:
            raise EvidenceError(f"{entry}: somebody else writes to it all the time")
        if not quote:
            raise EvidenceError(
                "configfs-tsm gave an empty report and no error: the service of the host that makes quotes is too old, "
                "or not there"
            )
        if len(quote) > MAX_QUOTE_BYTES:
            raise EvidenceError(f"configfs-tsm gave a report of {len(quote):,} bytes")
        return Quoted(kind, quote, Collateral(amd=amd.certificates(table)))

    def _generation(self, entry: Path) -> int:
        try:
            return int(self.read(entry / "generation"))
        except ValueError:
            raise EvidenceError(f"{entry}/generation is no number") from None

    # What the kernel does at these is its own; tests do it in its place.

    def make(self, entry: Path) -> None:
        entry.mkdir()

    def read(self, path: Path) -> bytes:
        return path.read_bytes() if path.exists() else b""

    def write(self, path: Path, content: bytes) -> None:
        with path.open("wb", buffering=0) as file:
            file.write(content)


def _explained(error: OSError) -> str:
    if error.errno == errno.EFAULT:
        return (
            "the kernel can't reach the TEE (EFAULT): guests whose TEE is behind a virtual TPM, as on Azure, have no "
            "report of their own, and teegpu does not read that TPM"
        )
    return f"no report could be had ({error.strerror or error})"


class Gramine:
    """Gramine's files within an enclave. They are one for the whole process, so one at a time uses them."""

    describe = "Gramine"
    _lock = threading.Lock()

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def quote(self, report_data: bytes) -> Quoted:
        if len(report_data) != _REPORT_DATA_BYTES:
            raise ValueError(f"report data of {len(report_data)} bytes")
        try:
            kind = (self._folder / "attestation_type").read_text().strip()
            if kind != "dcap":
                raise EvidenceError(
                    f'Gramine has attestation of type {kind!r}: set sgx.remote_attestation = "dcap" in its manifest'
                )
            with self._lock:
                (self._folder / "user_report_data").write_bytes(report_data)
                quote = (self._folder / "quote").read_bytes()
        except OSError as error:
            raise EvidenceError(f"{self._folder}: no quote could be had ({error.strerror or error})") from None
        if not 0 < len(quote) <= MAX_QUOTE_BYTES:
            raise EvidenceError(f"Gramine gave a quote of {len(quote):,} bytes")
        return Quoted(SGX, quote)


class Simulated:
    """Proves nothing, for demonstrations and tests."""

    describe = "a simulation, which proves nothing"

    def quote(self, report_data: bytes) -> Quoted:
        return Quoted(SIMULATED, simulated.quote(report_data))


def evidence(source: Source, binding: Binding, collateral: Collateral | None = None) -> Evidence:
    """What ``source`` says of ``binding``, with ``collateral`` beside it. Raises ``EvidenceError``."""
    quoted = source.quote(binding.report_data)
    beside = quoted.collateral if collateral is None else collateral.over(quoted.collateral)
    return Evidence(quoted.kind, quoted.quote, binding, beside)
