"""Evidence for demonstrations and tests. It proves nothing: whoever likes to makes it."""

from __future__ import annotations

import hashlib
from typing import Final

from teegpu import __version__
from teegpu.attest.claims import Claims
from teegpu.attest.evidence import SIMULATED
from teegpu.errors import refusal

_MAGIC: Final = b"teegpu-simulated-quote/1"
MEASUREMENT: Final = hashlib.sha384(f"teegpu {__version__}".encode()).digest()


def quote(report_data: bytes, *, measurement: bytes = MEASUREMENT, debug: bool = False) -> bytes:
    return _MAGIC + bytes([debug]) + measurement + report_data


def verify(raw: bytes) -> Claims:
    """Raises ``AttestationError``."""
    if len(raw) != len(_MAGIC) + 1 + 48 + 64 or not raw.startswith(_MAGIC) or raw[len(_MAGIC)] > 1:
        raise refusal("quote", "this is no simulated quote")
    body = raw[len(_MAGIC) :]
    if body[0]:
        raise refusal("debug", "the simulated TEE runs in debug mode")
    return Claims(SIMULATED, report_data=body[49:], measurements={"measurement": body[1:49].hex()})
