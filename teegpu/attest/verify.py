"""Judges evidence by a policy: genuine or not, whom it speaks for, what it runs. Refusals name their rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from teegpu.attest import amd, intel, simulated
from teegpu.attest.binding import SETTINGS, Binding
from teegpu.attest.claims import Claims
from teegpu.attest.evidence import SGX, SIMULATED, SNP, TDX, Collateral, Evidence
from teegpu.attest.policy import Policy
from teegpu.errors import AttestationError, refusal

_DAY_SECONDS: Final = 86400


@dataclass(frozen=True)
class Roots:
    """Whom evidence leads to: ``intel`` is a root certificate (DER), None for Intel's own; ``amd`` has the digests of
    keys. Only tests name others."""

    intel: bytes | None = None
    amd: Mapping[str, str] | None = None


VENDORS: Final = Roots()


@dataclass(frozen=True)
class Wanted:
    """What the asker knows by itself: the role of whom it asked, the digest of the key that this one proved to have,
    and the nonce that it was asked with (None: it was not asked now, so that it may be an old one)."""

    role: str
    key: bytes
    nonce: bytes | None


def claims_of(kind: str, quote: bytes, collateral: Collateral, now: int, roots: Roots = VENDORS) -> Claims:
    """What a genuine quote says. Raises ``AttestationError`` for any other, ``UsageError`` for a missing library."""
    if kind == SIMULATED:
        return simulated.verify(quote)
    if kind == SNP:
        return amd.verify(quote, collateral, now, amd.ROOTS if roots.amd is None else roots.amd)
    return intel.verify(kind, quote, collateral, now, roots.intel)


def judge(
    evidence: Evidence,
    policy: Policy,
    wanted: Wanted,
    now: int,
    *,
    collateral: Collateral | None = None,
    roots: Roots = VENDORS,
) -> Claims:
    """What ``evidence`` proves, where all of it is as ``policy`` and ``wanted`` ask at ``now`` (Unix time).
    ``collateral`` goes before what came with it. Raises ``AttestationError`` for the first rule that is broken."""
    check_kind(evidence.kind, policy)
    check_binding(evidence.binding, wanted)
    given = evidence.collateral if collateral is None else collateral.over(evidence.collateral)
    claims = claims_of(evidence.kind, evidence.quote, given, now, roots)
    if claims.report_data != evidence.binding.report_data:
        raise refusal("binding", "what the TEE had signed is not what was sent beside it")
    for broken in (*refusals(claims, policy, now), *settings_refusals(evidence.binding.settings, policy)):
        raise broken
    return claims


def check_kind(kind: str, policy: Policy) -> None:
    if kind not in policy.kinds:
        known = ", ".join(policy.kinds)
        raise refusal("kinds", f"evidence of {kind}, and the policy accepts {known}")


def check_binding(binding: Binding, wanted: Wanted) -> None:
    if binding.role != wanted.role:
        raise refusal("binding.role", f"the evidence speaks for a {binding.role}, not for a {wanted.role}")
    if binding.key != wanted.key:
        raise refusal(
            "binding.key",
            "the evidence speaks for another key than the one of this connection: somebody stands in between",
        )
    if wanted.nonce is not None and binding.nonce != wanted.nonce:
        raise refusal("binding.nonce", "the evidence was made for somebody else's question, or an earlier one")


def refusals(claims: Claims, policy: Policy, now: int) -> Iterator[AttestationError]:
    """Each rule on the TEE that ``claims`` break."""
    rules = policy.rules[claims.kind]
    for name, value in claims.measurements.items():
        if not _accepts(rules[name], value):
            yield refusal(f"{claims.kind}.{name}", f"it measured {value}, which the policy does not have")
    yield from _platform(claims, rules, now)
    if claims.kind == SNP:
        for part in amd.TCB:
            if claims.numbers[part] < rules[f"min_{part}"]:
                yield refusal(
                    f"{SNP}.min_{part}",
                    f"its firmware's {part} is {claims.numbers[part]}, below {rules[f'min_{part}']}",
                )
        if claims.numbers["vmpl"] > rules["max_vmpl"]:
            yield refusal(f"{SNP}.max_vmpl", f"the program that asked runs at VMPL {claims.numbers['vmpl']}")
    if claims.kind == SGX:
        if claims.numbers["isv_prod_id"] != rules["isv_prod_id"]:
            yield refusal(f"{SGX}.isv_prod_id", f"the product is {claims.numbers['isv_prod_id']}")
        if claims.numbers["isv_svn"] < rules["min_isv_svn"]:
            yield refusal(f"{SGX}.min_isv_svn", f"the program's security version is {claims.numbers['isv_svn']}")


def _platform(claims: Claims, rules: Mapping[str, Any], now: int) -> Iterator[AttestationError]:
    if claims.kind in (TDX, SGX):
        if claims.tcb_status not in rules["tcb"]:
            told = f" ({', '.join(claims.advisories)})" if claims.advisories else ""
            yield refusal(f"{claims.kind}.tcb", f"Intel calls its firmware {claims.tcb_status}{told}")
        if claims.tcb_at is None or _older(claims.tcb_at, rules["tcb_days"], now):
            yield refusal(f"{claims.kind}.tcb_days", "its level of firmware was set too long ago")
    if claims.kind != SIMULATED:
        if not _accepts(rules["platforms"], claims.platform):
            yield refusal(f"{claims.kind}.platforms", f"it runs on processor {claims.platform}")
        if claims.collateral_at is None or _older(claims.collateral_at, rules["collateral_days"], now):
            yield refusal(
                f"{claims.kind}.collateral_days",
                "what the vendor says of revoked keys and firmware is too old: 'teegpu attest collateral' gets it anew",
            )


def settings_refusals(settings: Mapping[str, str], policy: Policy) -> Iterator[AttestationError]:
    """Each rule on what the endpoint runs with that ``settings`` break."""
    for name in SETTINGS if settings else ():
        if not _accepts(policy.rules["settings"][name], settings[name]):
            accepted = ", ".join(policy.rules["settings"][name])
            yield refusal(
                f"settings.{name}", f"it runs with {name} {settings[name]}, and the policy accepts {accepted}"
            )


def _accepts(accepted: tuple[str, ...] | None, value: str) -> bool:
    return accepted is None or value in accepted


def _older(then: int, days: int | None, now: int) -> bool:
    return days is not None and now - then > days * _DAY_SECONDS
