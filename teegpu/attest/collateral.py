"""What vendors sign about their processors, got from them. The one part of this package that uses a network."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

from teegpu.attest import amd, intel
from teegpu.attest.evidence import MAX_BYTES, SIMULATED, SNP, Collateral, Evidence, read_json
from teegpu.errors import ConfigError, ConnectionFailedError, EvidenceError
from teegpu.units import one_line

INTEL_URL: Final = "https://api.trustedservices.intel.com"
AMD_URL: Final = "https://kdsintf.amd.com"
TIMEOUT_SECONDS: Final = 60.0


def read(path: Path) -> Collateral:
    """Raises ``ConfigError`` and ``EvidenceError``."""
    try:
        return Collateral.from_json(read_json(path.read_bytes()))
    except OSError as error:
        raise ConfigError(f"--collateral {path}: can't be read: {error.strerror}") from None


def fetch(evidence: Evidence, url: str = "") -> Collateral:
    """What the vendor, or who answers at ``url`` in its place, says now of the processor of ``evidence``. Nothing of it
    is believed before it is verified. Raises ``ConnectionFailedError`` and ``EvidenceError``."""
    if evidence.kind == SIMULATED:
        return Collateral()
    if evidence.kind == SNP:
        return _amd(evidence.quote, evidence.collateral, (url or AMD_URL).rstrip("/"))
    return _intel(evidence.quote, url or INTEL_URL)


def _intel(quote: bytes, url: str) -> Collateral:
    qvl = intel.dcap_qvl()

    async def get() -> str:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            found: str = (await qvl.get_collateral(url, quote)).to_json()
            return found

    try:
        return Collateral(intel=json.loads(asyncio.run(get())))
    except TimeoutError:
        raise ConnectionFailedError(f"{url} did not answer within {TIMEOUT_SECONDS:g} s") from None
    except (ValueError, RuntimeError) as error:
        raise ConnectionFailedError(f"{url} has no collateral for this quote: {one_line(error, 300)}") from None


def _amd(report: bytes, beside: Collateral, url: str) -> Collateral:
    """The certificates as far as they are not ``beside`` the report, and the list of revoked ones."""
    if len(report) != amd.REPORT_BYTES:
        raise EvidenceError(f"a report of {len(report)} bytes, and one has {amd.REPORT_BYTES}")
    known = dict(beside.amd)
    tcb = [report[0x180 + place] for place in (0, 1, 6, 7)]
    for line in amd.ROOTS.values():
        base = f"{url}/vcek/v1/{line}"
        try:
            if "vcek" not in known:
                levels = "blSPL={}&teeSPL={}&snpSPL={}&ucodeSPL={}".format(*tcb)
                known["vcek"] = _get(f"{base}/{report[0x1A0:0x1E0].hex()}?{levels}")
            chain = amd.chain(_get(f"{base}/cert_chain"))
            if "ask" in known and known["ask"] != chain["ask"]:
                continue  # the report's chip is of another line
            return Collateral(amd={**known, **chain, "crl": _get(f"{base}/crl")})
        except urllib.error.HTTPError:
            continue  # it does not know the chip in this line
        except (OSError, ValueError) as error:
            raise ConnectionFailedError(f"{url} can't be asked: {one_line(error, 300)}") from None
    raise ConnectionFailedError(f"{url} does not know the chip of this report")


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as reply:
        body: bytes = reply.read(MAX_BYTES + 1)
    if len(body) > MAX_BYTES:
        raise ValueError("an answer that is longer than any should be")
    return body
