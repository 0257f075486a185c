"""Evidence from the kernel's folder, and from Gramine's: what they may do, and what is made of it."""

from __future__ import annotations

import errno
import os
import struct
import uuid
from pathlib import Path

import pytest

from teegpu.attest import amd, simulated, sources
from teegpu.attest.evidence import SGX, SNP, TDX
from teegpu.attest.sources import ConfigfsTsm, Gramine, Simulated, find
from teegpu.errors import EvidenceError

DATA = bytes(range(64))
VCEK = uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd")


class Kernel(ConfigfsTsm):
    """Does in a folder what the kernel does. ``races``: how many others write in between."""

    def __init__(self, folder: Path, provider: str = "tdx_guest", races: int = 0) -> None:
        super().__init__(folder)
        self.provider, self.races = provider, races
        self.report: bytes | OSError = b"quote of " + DATA
        self.table = b""
        self.written: list[bytes] = []
        self.left: list[Path] = []

    def make(self, entry: Path) -> None:
        super().make(entry)
        (entry / "provider").write_text(self.provider + "\n")
        (entry / "generation").write_text("4\n")
        (entry / "auxblob").write_bytes(self.table)
        self.left.append(entry)

    def write(self, path: Path, content: bytes) -> None:
        super().write(path, content)
        self.written.append(content)
        generation = int((path.parent / "generation").read_text()) + 1 + (self.races > 0)
        self.races -= 1
        (path.parent / "generation").write_text(f"{generation}\n")

    def read(self, path: Path) -> bytes:
        if path.name == "outblob":
            if isinstance(self.report, OSError):
                raise self.report
            return self.report
        return super().read(path)


def told(source: sources.Source) -> str:
    with pytest.raises(EvidenceError) as refused:
        source.quote(DATA)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(("provider", "kind"), [("tdx_guest", TDX), ("sev_guest", SNP)])
def test_a_report_of_the_kernel(tmp_path: Path, provider: str, kind: str) -> None:
    kernel = Kernel(tmp_path, provider)
    quoted = kernel.quote(DATA)
    assert (quoted.kind, quoted.quote, kernel.written) == (kind, b"quote of " + DATA, [DATA])
    with pytest.raises(ValueError, match="63 bytes"):
        kernel.quote(DATA[:63])


def test_a_writer_in_between_is_seen_and_the_report_asked_for_again(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, races=2)
    assert kernel.quote(DATA).quote
    assert kernel.written == [DATA] * 3
    assert "somebody else writes to it all the time" in told(Kernel(tmp_path, races=99))


def test_what_can_be_wrong_with_the_kernel_is_told(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    kernel.report = b""
    assert "the service of the host that makes quotes is too old" in told(kernel)
    kernel.report = OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    assert "behind a virtual TPM" in told(kernel)
    kernel.report = OSError(errno.EIO, os.strerror(errno.EIO))
    assert "Input/output error" in told(kernel)
    kernel.report = bytes(40_000)
    assert "40,000 bytes" in told(kernel)
    assert "'arm_cca_guest'" in told(Kernel(tmp_path, "arm_cca_guest"))
    assert "is this user root" in told(Kernel(tmp_path / "none"))


def test_certificates_come_beside_a_report(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "sev_guest")
    kernel.table = VCEK.bytes_le + struct.pack("<II", 48, 3) + bytes(24) + b"key"
    assert kernel.quote(DATA).collateral.amd == {"vcek": b"key"}
    kernel.table = VCEK.bytes_le + struct.pack("<II", 48, 4) + bytes(24) + b"key"
    assert "ends behind its table" in told(kernel)
    for end in range(1, 24):
        with pytest.raises(EvidenceError):
            amd.certificates(kernel.table[:end])


def test_gramine(tmp_path: Path) -> None:
    folder = tmp_path / "dev/attestation"
    folder.mkdir(parents=True)
    assert find(tmp_path) is None
    (folder / "attestation_type").write_text("none")
    source = find(tmp_path)
    assert isinstance(source, Gramine)
    assert 'sgx.remote_attestation = "dcap"' in told(source)
    (folder / "attestation_type").write_text("dcap\n")
    assert "no quote could be had" in told(source)
    (folder / "quote").write_bytes(b"")
    assert "0 bytes" in told(source)
    (folder / "quote").write_bytes(b"quote")
    assert source.quote(DATA).kind == SGX
    assert (folder / "user_report_data").read_bytes() == DATA


def test_what_there_is_is_found(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    (tmp_path / "sys/kernel/config/tsm/report").mkdir(parents=True)
    assert isinstance(find(tmp_path), ConfigfsTsm)


def test_a_simulation_calls_itself_one() -> None:
    assert simulated.verify(Simulated().quote(DATA).quote).report_data == DATA
    assert "proves nothing" in Simulated().describe
