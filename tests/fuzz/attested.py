"""What is fuzzed of attestation: documents of evidence, quotes, and policies."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from teegpu.attest.evidence import Evidence, read_json
from teegpu.attest.policy import RULES, Policy, render
from teegpu.attest.verify import claims_of
from teegpu.errors import AttestationError, ConfigError, EvidenceError
from tests.teegpu.attest import pki
from tests.teegpu.attest.test_verify import BINDING, SETTINGS, Case, accepting, make


def evidence(data: bytes) -> str:
    """A document of evidence, judged by a policy that accepts what it was made of."""
    case = _case()
    try:
        given = Evidence.from_json(read_json(data))
        case.judge(given, accepting(case))
    except (EvidenceError, AttestationError) as error:
        return _one_line(error)
    assert given.quote == case.evidence().quote or given.kind != "simulated"
    return "taken"


def quote(data: bytes) -> str:
    """The first byte says whose; what is genuine is what our own vendors signed."""
    kind = ("tdx", "sgx", "sev-snp", "simulated")[data[0] % 4] if data else "tdx"
    case = _quoted(kind)
    try:
        found = claims_of(kind, data[1:], case.collateral, pki.NOW, case.roots)
    except AttestationError as error:
        return _one_line(error)
    assert kind == "simulated" or found.report_data == BINDING.report_data
    return "taken"


def policy(data: bytes) -> str:
    """A policy: what is read of it has every rule."""
    try:
        made = Policy.parse(data.decode("utf-8", "replace"), "p.toml")
    except ConfigError as error:
        return _one_line(error)
    assert all(set(made.rules[name]) == set(RULES[name]) for name in (*made.kinds, "settings"))
    return "taken"


@cache
def _case() -> Case:
    return make("tdx")


@cache
def _quoted(kind: str) -> Case:
    return make(kind)


def _one_line(error: Exception) -> str:
    assert str(error).isprintable()
    return "refused"


TARGETS: dict[str, Callable[[bytes], str]] = {"evidence": evidence, "quote": quote, "policy": policy}


def seeds() -> dict[str, list[bytes]]:
    """For each target, what is right."""
    kinds = ("tdx", "sgx", "sev-snp", "simulated")
    written = [render(_quoted(kind).claims(_quoted(kind).evidence()), SETTINGS, origin="fuzz") for kind in kinds]
    return {
        "evidence": [json.dumps(_case().evidence().to_json()).encode()],
        "quote": [bytes([number]) + _quoted(kind).evidence().quote for number, kind in enumerate(kinds)],
        "policy": [text.encode() for text in written],
    }
