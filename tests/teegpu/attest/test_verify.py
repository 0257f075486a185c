"""Verdicts on quotes of a PKI of our own, and on real ones of vendors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from teegpu.attest import amd, intel, policy, simulated
from teegpu.attest.binding import ENDPOINT, SERVER, Binding
from teegpu.attest.claims import Claims
from teegpu.attest.evidence import SGX, SIMULATED, SNP, TDX, Collateral, Evidence
from teegpu.attest.policy import Policy
from teegpu.attest.verify import Roots, Wanted, claims_of, judge
from teegpu.errors import AttestationError, EvidenceError
from tests.teegpu.attest import pki
from tests.teegpu.attest.pki import DAY, NOW, Amd, Intel

SAMPLES = Path(__file__).parent / "samples"
KEY, NONCE = bytes(range(32)), bytes(range(100, 132))
SETTINGS = {"privacy": "two-server", "verify": "on", "model": "ab" * 32, "version": "0.1.0"}
BINDING = Binding(ENDPOINT, KEY, NONCE, SETTINGS)
WANTED = Wanted(ENDPOINT, KEY, NONCE)


@dataclass
class Case:
    """A TEE of one kind: ``sign`` makes its quote over report data, with changes to what the TEE is."""

    kind: str
    sign: Callable[..., bytes]
    collateral: Collateral
    roots: Roots

    def evidence(self, binding: Binding = BINDING, **changes: Any) -> Evidence:
        quote = self.sign(report_data=binding.report_data, **changes)
        return Evidence(self.kind, quote, binding, self.collateral)

    def claims(self, evidence: Evidence) -> Claims:
        return claims_of(self.kind, evidence.quote, evidence.collateral, NOW, self.roots)

    def judge(self, evidence: Evidence, accepted: Policy, wanted: Wanted = WANTED, now: int = NOW) -> Claims:
        return judge(evidence, accepted, wanted, now, roots=self.roots)


def make(kind: str, vendor: Intel | Amd | None = None) -> Case:
    if kind == SIMULATED:
        return Case(kind, lambda report_data, **changes: simulated.quote(report_data, **changes), Collateral(), Roots())
    if kind == SNP:
        chips = vendor if isinstance(vendor, Amd) else pki.amd_vendor()
        return Case(kind, chips.report, chips.collateral(), chips.roots)
    made = vendor if isinstance(vendor, Intel) else pki.intel()
    body = pki.td_report if kind == TDX else pki.enclave_report
    return Case(kind, lambda **changes: made.quote(kind, body(**changes)), made.collateral(kind), made.roots)


KINDS = (TDX, SGX, SNP, SIMULATED)


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    return make(request.param)


def accepting(case: Case, **rules: Any) -> Policy:
    """A policy that accepts what ``case`` is, with other ``rules``: section__name."""
    text = policy.render(case.claims(case.evidence()), SETTINGS, origin="a test")
    made = Policy.parse(text, "p.toml")
    changed = {name: dict(table) for name, table in made.rules.items()}
    for key, value in rules.items():
        section, name = key.split("__")
        changed[section.replace("_", "-")][name] = value
    return replace(made, rules=changed)


def rule_of(act: Callable[[], Any]) -> str:
    with pytest.raises(AttestationError) as refused:
        act()
    assert "\n" not in str(refused.value)
    return refused.value.rule


def test_what_a_policy_was_written_from_is_accepted_by_it(case: Case) -> None:
    claims = case.judge(case.evidence(), accepting(case))
    assert claims.report_data == BINDING.report_data
    document = json.loads(json.dumps(case.evidence().to_json()))
    assert case.judge(Evidence.from_json(document), accepting(case)).kind == case.kind


@pytest.mark.parametrize(
    ("kind", "change", "rule"),
    [
        (TDX, {"mrtd": bytes(48)}, "tdx.mrtd"),
        *((TDX, {"rtmrs": tuple(bytes(48) if at == bad else bytes([0xB0 + at]) * 48 for at in range(4))},
           f"tdx.rtmr{bad}") for bad in range(4)),
        (TDX, {"attributes": b"\1\0\0\x10\0\0\0\0"}, "debug"),
        (TDX, {"attributes": bytes(8)}, "quote"),  # SEPT_VE_DISABLE is off
        (SGX, {"enclave": bytes(32)}, "sgx.mrenclave"),
        (SGX, {"signer": bytes(32)}, "sgx.mrsigner"),
        (SGX, {"attributes": b"\7" + bytes(15)}, "debug"),
        (SGX, {"product": 2}, "sgx.isv_prod_id"),
        (SGX, {"svn": 2}, "sgx.min_isv_svn"),
        (SNP, {"measurement": bytes(48)}, "sev-snp.measurement"),
        (SNP, {"policy": 0xB0000}, "debug"),
        (SNP, {"policy": 0x70000}, "migration"),
        (SNP, {"vmpl": 1}, "sev-snp.max_vmpl"),
        (SNP, {"chip": bytes(64)}, "quote"),
        (SNP, {"version": 9}, "quote"),
        (SNP, {"signing": 1}, "quote"),
        (SIMULATED, {"measurement": bytes(48)}, "simulated.measurement"),
        (SIMULATED, {"debug": True}, "debug"),
    ],
)  # fmt: skip
def test_a_tee_that_is_another_one_is_refused(kind: str, change: dict[str, Any], rule: str) -> None:
    case = make(kind)
    assert rule_of(lambda: case.judge(case.evidence(**change), accepting(case))) == rule


@pytest.mark.parametrize(
    ("wanted", "rule"),
    [
        (replace(WANTED, key=bytes(32)), "binding.key"),
        (replace(WANTED, nonce=bytes(32)), "binding.nonce"),
        (replace(WANTED, role=SERVER), "binding.role"),
    ],
)
def test_evidence_that_speaks_for_others_is_refused(case: Case, wanted: Wanted, rule: str) -> None:
    assert rule_of(lambda: case.judge(case.evidence(), accepting(case), wanted)) == rule


def test_a_preimage_that_was_changed_is_not_what_was_signed(case: Case) -> None:
    """Whichever part is changed, and to what is wanted: the quote is of another."""
    for other in (
        replace(BINDING, key=bytes(32)),
        replace(BINDING, nonce=bytes(32)),
        *(replace(BINDING, settings=SETTINGS | {name: value}) for name, value in
          (("privacy", "none"), ("verify", "off"), ("model", "cd" * 32), ("version", "9"))),
    ):  # fmt: skip
        replayed = replace(case.evidence(other), binding=BINDING)
        assert rule_of(lambda sent=replayed: case.judge(sent, accepting(case))) == "binding"


@pytest.mark.parametrize("name", ["privacy", "verify", "model", "version"])
def test_an_endpoint_that_runs_with_other_settings_is_refused(case: Case, name: str) -> None:
    others = {"privacy": "none", "verify": "off", "model": "cd" * 32, "version": "0.0.9"}
    told = case.evidence(replace(BINDING, settings=SETTINGS | {name: others[name]}))
    assert rule_of(lambda: case.judge(told, accepting(case))) == f"settings.{name}"


def test_a_policy_that_does_not_name_the_kind_refuses(case: Case) -> None:
    other = make(next(kind for kind in KINDS if kind != case.kind))
    assert rule_of(lambda: case.judge(case.evidence(), accepting(other))) == "kinds"


def test_a_kind_is_what_the_quote_is_and_not_what_is_said_of_it() -> None:
    sgx, tdx = make(SGX), make(TDX)
    assert rule_of(lambda: tdx.judge(replace(sgx.evidence(), kind=TDX), accepting(tdx))) == "kind"


@pytest.mark.parametrize("kind", [TDX, SGX, SNP])
def test_who_is_not_the_vendor_can_sign_what_he_likes(kind: str) -> None:
    case = make(kind)
    other = make(kind, Amd() if kind == SNP else Intel())
    if kind == SNP:  # the keys of authorities are made once
        other.roots = Roots(amd={})
        assert rule_of(lambda: other.judge(other.evidence(), accepting(case))) == "quote"
        mixed = replace(other.evidence(), collateral=case.collateral)
        assert rule_of(lambda: case.judge(mixed, accepting(case))) == "quote"
    else:
        assert rule_of(lambda: case.judge(other.evidence(), accepting(case))) == "quote"
    assert rule_of(lambda: judge(case.evidence(), accepting(case), WANTED, NOW)) == "quote"  # the vendor's own root


@pytest.mark.parametrize("kind", [TDX, SGX, SNP])
def test_statements_of_the_vendor_that_are_expired_or_of_the_future(kind: str) -> None:
    case = make(kind)
    for now in (NOW + 31 * DAY, NOW - 3 * DAY):
        assert rule_of(lambda then=now: case.judge(case.evidence(), accepting(case), now=then)) in (
            "quote", "collateral"
        )  # fmt: skip
    fresh = accepting(case, **{f"{kind.replace('-', '_')}__collateral_days": 3})
    assert case.judge(case.evidence(), fresh)
    assert rule_of(lambda: case.judge(case.evidence(), fresh, now=NOW + 4 * DAY)) == f"{kind}.collateral_days"


@pytest.mark.parametrize("kind", [TDX, SGX, SNP])
def test_nothing_of_the_vendor_is_a_refusal(kind: str) -> None:
    case = make(kind)
    bare = replace(case.evidence(), collateral=Collateral())
    assert rule_of(lambda: case.judge(bare, accepting(case))) == "collateral"
    assert judge(bare, accepting(case), WANTED, NOW, collateral=case.collateral, roots=case.roots)


def test_revoked_keys() -> None:
    vendor = pki.intel()
    for what in ("revoked_pck", "revoked_ca"):
        case = make(TDX)
        case.collateral = vendor.collateral(TDX, **{what: True})
        assert rule_of(lambda made=case: made.judge(made.evidence(), accepting(make(TDX)))) == "quote"
    snp = make(SNP)
    snp.collateral = pki.amd_vendor().collateral(revoked=True)
    assert rule_of(lambda: snp.judge(snp.evidence(), accepting(make(SNP)))) == "quote"


def test_an_expired_certificate() -> None:
    old = make(TDX, Intel(pck_not_after=NOW - DAY))
    assert rule_of(lambda: old.judge(old.evidence(), accepting(make(TDX)))) == "quote"


def test_firmware_is_judged_by_the_policy() -> None:
    old = make(TDX, Intel(status="OutOfDate"))
    assert rule_of(lambda: old.judge(old.evidence(), accepting(make(TDX)))) == "tdx.tcb"
    assert old.judge(old.evidence(), accepting(old))
    assert rule_of(lambda: old.judge(old.evidence(), accepting(old, tdx__tcb_days=99))) == "tdx.tcb_days"
    revoked = make(TDX, Intel(status="Revoked"))
    assert rule_of(lambda: revoked.judge(revoked.evidence(), accepting(old))) == "quote"
    below = make(SGX, Intel(cpu_svn=bytes([4] * 16)))
    assert rule_of(lambda: below.judge(below.evidence(), accepting(make(SGX)))) == "quote"
    snp = make(SNP)
    for part, level in zip(amd.TCB, pki.amd_vendor().tcb, strict=True):
        strict = accepting(snp, **{f"sev_snp__min_{part}": level + 1})
        assert rule_of(lambda rules=strict: snp.judge(snp.evidence(), rules)) == f"sev-snp.min_{part}"


def test_a_key_for_another_level_of_firmware() -> None:
    case = make(SNP, Amd(vcek_tcb=(2, 0, 20, 209)))
    assert rule_of(lambda: case.judge(case.evidence(), accepting(make(SNP)))) == "quote"


@pytest.mark.parametrize("kind", [TDX, SGX, SNP])
def test_platforms_are_those_of_the_list(kind: str) -> None:
    case = make(kind)
    section = kind.replace("-", "_")
    other = accepting(case, **{f"{section}__platforms": ("ff" * (64 if kind == SNP else 16),)})
    assert rule_of(lambda: case.judge(case.evidence(), other)) == f"{kind}.platforms"
    assert case.judge(case.evidence(), accepting(case, **{f"{section}__platforms": None}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quote_that_is_cut_anywhere_is_refused(kind: str) -> None:
    case = make(kind)
    whole, accepted = case.evidence(), accepting(case)
    for end in range(len(whole.quote)):
        cut = replace(whole, quote=whole.quote[:end])
        assert rule_of(lambda sent=cut: case.judge(sent, accepted)) in ("quote", "kind")
    assert rule_of(lambda: case.judge(replace(whole, quote=whole.quote + b"\1"), accepted)) == "quote"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.extra)])
def test_every_bit_of_a_quote_counts(kind: str, step: int) -> None:
    """One bit of each byte, or of each fifth: the verdict flips, or nothing that is believed changes."""
    case = make(kind)
    whole, accepted = case.evidence(), accepting(case)
    text = max(whole.quote.find(b"-----BEGIN"), 0) or len(whole.quote)
    idle = set()
    for place in (*range(0, text, step), *range(text, len(whole.quote), 11 * step)):
        flipped = bytearray(whole.quote)
        flipped[place] ^= 1 << place % 8
        try:
            claims = case.judge(replace(whole, quote=bytes(flipped)), accepted)
        except AttestationError:
            continue
        assert claims == case.claims(whole)
        idle.add(place)
    # Nothing rests on what kind of data is around the chain, nor on where it ends: the root there is known here.
    around = {764, 765} if kind == TDX else set()
    assert {place for place in idle if place < text} <= around | set(range(text - 4, text))


@pytest.mark.parametrize("kind", [TDX, SNP])
def test_every_part_of_the_vendor_s_statements_counts(kind: str) -> None:
    case = make(kind)
    whole, accepted = case.evidence(), accepting(case)
    parts: dict[str, Any] = dict(whole.collateral.intel or whole.collateral.amd)
    for name, part in parts.items():
        if name == "pck_crl_issuer_chain":  # the chain to the list's signer comes with the quote: this one is not read
            given = pki.changed(whole.collateral, pck_crl_issuer_chain="none")
            assert case.judge(replace(whole, collateral=given), accepted) == case.claims(whole)
            continue
        for place in range(11, len(part), max(1, len(part) // 40)):
            if isinstance(part, bytes):
                damaged: Any = part[:place] + bytes([part[place] ^ 1]) + part[place + 1 :]
                given = Collateral(amd={**whole.collateral.amd, name: damaged})
            else:
                letter = "5" if part[place] != "5" else "6"
                given = pki.changed(whole.collateral, **{name: part[:place] + letter + part[place + 1 :]})
            refused = None
            try:
                claims = case.judge(replace(whole, collateral=given), accepted)
            except AttestationError as error:
                refused = error.rule
            # Armour says nothing, and the root is known here: who changes these changes nothing.
            assert refused in ("quote", "collateral") or (name.endswith("chain") and claims == case.claims(whole))


OTHERS: dict[str, Any] = {
    "tcb": ("OutOfDate",),
    "tcb_days": 99,
    "collateral_days": 1,
    "isv_prod_id": 2,
    "min_isv_svn": 4,
    "max_vmpl": 0,
    **{f"min_{part}": level + 1 for part, level in zip(amd.TCB, pki.Amd.tcb, strict=True)},
    "privacy": ("pads",),
    "verify": ("off",),
    "version": ("9",),
}
"""Values of rules that accept less than what the cases are; of the rest another measurement is one."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_of_a_policy_counts(kind: str) -> None:
    """What is judged is two days old, and of SEV-SNP not of the highest privilege."""
    case = make(kind)
    if kind == SNP:
        case.collateral = pki.amd_vendor().collateral(begins=NOW - 2 * DAY)
    changes = {"vmpl": 1} if kind == SNP else {}
    evidence = case.evidence(**changes)
    accepted = accepting(case, **({"sev_snp__max_vmpl": 1} if kind == SNP else {}))
    assert case.judge(evidence, accepted)
    for section, rules in accepted.rules.items():
        for rule in rules:
            stricter = dict(accepted.rules) | {section: {**rules, rule: OTHERS.get(rule, ("00",))}}
            assert rule_of(lambda made=stricter: case.judge(evidence, replace(accepted, rules=made))) == (
                f"{section}.{rule}"
            )


def test_a_real_quote_of_intel() -> None:
    quote = (SAMPLES / "tdx_quote").read_bytes()
    given = Collateral(intel=json.loads((SAMPLES / "tdx_quote_collateral.json").read_text()))
    now = 1_751_328_000  # 1 July 2025
    claims = intel.verify(TDX, quote, given, now)
    assert claims.tcb_status == "UpToDate"
    assert claims.measurements["mrtd"].startswith("91eb2b44d141d4ece09f0c75")
    for then in (now + 40 * DAY, now - 40 * DAY):
        assert rule_of(lambda at=then: intel.verify(TDX, quote, given, at)) == "quote"
    for place in range(0, len(quote) - 1400, 97):
        flipped = quote[:place] + bytes([quote[place] ^ 4]) + quote[place + 1 :]
        assert rule_of(lambda sent=flipped: intel.verify(TDX, sent, given, now)) in ("quote", "debug", "kind")


def real_report() -> tuple[bytes, Collateral]:
    folder = files("omne_attest") / "vectors"
    names = {"vcek": "kds_vcek.der", "ask": "milan_ask.der", "ark": "milan_ark.der"}
    given = Collateral(amd={name: (folder / file).read_bytes() for name, file in names.items()})
    return (folder / "attestation.bin").read_bytes(), given


def test_a_real_report_of_amd_whose_guest_may_be_debugged() -> None:
    """It is refused for that; its signature and chain are genuine."""
    report, given = real_report()
    now = 1_790_000_000
    assert rule_of(lambda: amd.verify(report, given, now)) == "debug"


def test_a_real_report_of_amd_is_genuine(monkeypatch: pytest.MonkeyPatch) -> None:
    report, given = real_report()
    now = 1_790_000_000
    monkeypatch.setattr(amd, "_DEBUG", 0)  # what would be refused first
    assert rule_of(lambda: amd.verify(report, given, now)) == "collateral"  # there is no list of revoked keys with it
    monkeypatch.setattr(amd, "_check_revocation", lambda *_: now)
    listed = Collateral(amd={**given.amd, "crl": b""})
    assert amd.verify(report, listed, now).platform.startswith("3ac3fe21e13fb099")
    for place in range(0, amd.SIGNED_BYTES + 144, 31):
        flipped = report[:place] + bytes([report[place] ^ 1]) + report[place + 1 :]
        assert rule_of(lambda sent=flipped: amd.verify(sent, listed, now)) in ("quote", "migration")


def test_what_is_signed_is_unambiguous() -> None:
    """Bytes that move from one part to the next are another preimage."""
    assert len(BINDING.report_data) == 64
    moved = Binding(ENDPOINT, KEY[1:] + NONCE[:1], NONCE[1:], SETTINGS)
    assert moved.report_data != BINDING.report_data


@pytest.mark.parametrize(
    "change",
    [
        {"role": "runner"},
        {"key": b"short"},
        {"nonce": bytes(15)},
        {"nonce": bytes(65)},
        {"settings": {}},
        {"settings": SETTINGS | {"more": "x"}},
        {"settings": SETTINGS | {"model": "x" * 201}},
        {"settings": SETTINGS | {"model": 3}},
    ],
)
def test_a_binding_that_can_not_be(change: dict[str, Any]) -> None:
    with pytest.raises(EvidenceError):
        replace(BINDING, **change)
