"""The document that carries evidence: a quote, its preimage, and what is needed to check it. Read strictly."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from teegpu.attest.binding import Binding
from teegpu.errors import EvidenceError

FORMAT: Final = "teegpu.evidence/1"

TDX: Final = "tdx"
SNP: Final = "sev-snp"
SGX: Final = "sgx"
SIMULATED: Final = "simulated"
KINDS: Final = (TDX, SNP, SGX, SIMULATED)
"""All kinds of evidence. ``simulated`` proves nothing: whoever likes to makes it."""

MAX_BYTES: Final = 256 * 1024
"""Of a document of evidence or of collateral: vendors' are below 32 KiB."""

MAX_QUOTE_BYTES: Final = 32 * 1024
"""What the kernel gives at most."""


@dataclass(frozen=True)
class Collateral:
    """What vendors sign about their processors: it may come from anybody, and ages. ``intel`` is what dcap-qvl calls
    collateral; ``amd`` has certificates and the revocation list in DER: ``vcek``, ``ask``, ``ark``, ``crl``."""

    intel: Mapping[str, str] = field(default_factory=dict)
    amd: Mapping[str, bytes] = field(default_factory=dict)

    def over(self, other: Collateral) -> Collateral:
        """What is here, and of ``other`` what is missing here."""
        return Collateral(self.intel or other.intel, {**other.amd, **self.amd})

    def __bool__(self) -> bool:
        return bool(self.intel or self.amd)

    def to_json(self) -> dict[str, Any]:
        amd = {name: base64.b64encode(part).decode() for name, part in self.amd.items()}
        return {"intel": dict(self.intel), "amd": amd}

    @classmethod
    def from_json(cls, raw: Any) -> Collateral:
        """Raises ``EvidenceError``."""
        if not isinstance(raw, dict) or set(raw) != {"intel", "amd"}:
            raise EvidenceError("the collateral is not what 'teegpu attest collateral' writes: intel and amd")
        intel, amd = raw["intel"], raw["amd"]
        if not isinstance(intel, dict) or not isinstance(amd, dict) or not set(amd) <= {"vcek", "ask", "ark", "crl"}:
            raise EvidenceError("the collateral has parts that are not known")
        if any(not isinstance(part, str) for part in intel.values()):
            raise EvidenceError("a part of the collateral is no text")
        return cls(intel, {name: _bytes(part, name) for name, part in amd.items()})


@dataclass(frozen=True)
class Evidence:
    kind: str
    quote: bytes
    binding: Binding
    collateral: Collateral = field(default_factory=Collateral)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "quote": base64.b64encode(self.quote).decode(),
            "binding": self.binding.to_json(),
            "collateral": self.collateral.to_json(),
        }

    @classmethod
    def from_json(cls, raw: Any) -> Evidence:
        """Raises ``EvidenceError``."""
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise EvidenceError(f"this is no evidence: its format is not {FORMAT}")
        if set(raw) != {"format", "kind", "quote", "binding", "collateral"}:
            raise EvidenceError("the evidence has parts that are not known, or lacks some")
        if raw["kind"] not in KINDS:
            raise EvidenceError(f"evidence of a kind that is not known; known are {', '.join(KINDS)}")
        quote = _bytes(raw["quote"], "quote")
        if len(quote) > MAX_QUOTE_BYTES:
            raise EvidenceError(f"the quote is longer than {MAX_QUOTE_BYTES:,} bytes")
        return cls(raw["kind"], quote, Binding.from_json(raw["binding"]), Collateral.from_json(raw["collateral"]))


def read_json(raw: bytes) -> Any:
    """What ``raw`` says in JSON. Raises ``EvidenceError``, also for what says a thing twice."""
    if len(raw) > MAX_BYTES:
        raise EvidenceError(f"the document is longer than {MAX_BYTES:,} bytes")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise EvidenceError("the document is not JSON, or says a thing twice") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _bytes(text: object, what: str) -> bytes:
    try:
        if isinstance(text, str):
            return base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        pass
    raise EvidenceError(f"the {what} is not in base64")
