"""Policies: what is written can be read, and nothing is let through by being forgotten, mistyped or unknown."""

from __future__ import annotations

import re

import pytest
import tomlkit

from teegpu.attest import policy
from teegpu.attest.evidence import KINDS, SIMULATED
from teegpu.attest.policy import RULES, Policy
from teegpu.errors import ConfigError
from tests.teegpu.attest.test_verify import SETTINGS, Case, accepting, make


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    return make(request.param)


def written(case: Case) -> str:
    return policy.render(case.claims(case.evidence()), SETTINGS, origin="a test")


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        Policy.parse(text, "p.toml")
    assert str(refused.value).startswith("p.toml: ")
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_every_rule_has_to_be_there_and_no_other(case: Case) -> None:
    text = written(case)
    document = tomlkit.parse(text)
    for section in (case.kind, "settings"):
        for rule in RULES[section]:
            changed = tomlkit.parse(text)
            del changed[section][rule]  # type: ignore[attr-defined]
            assert f"no rule '{section}.{rule}'" in refusal(tomlkit.dumps(changed))
            changed = tomlkit.parse(text)
            changed[section][rule + "s"] = 1  # type: ignore[index]
            assert f"unknown rule '{section}.{rule}s', did you mean" in refusal(tomlkit.dumps(changed))
            for wrong in ([], "all", True, -1, ["?"], [1], {}, 1.5):
                changed = tomlkit.parse(text)
                changed[section][rule] = wrong  # type: ignore[index]
                assert f"{section}.{rule} " in refusal(tomlkit.dumps(changed))
    for name in ("version", "kinds", "evidence_seconds", case.kind, "settings"):
        changed = tomlkit.parse(text)
        del changed[name]
        assert name in refusal(tomlkit.dumps(changed))
    document["surprise"] = 1
    assert "unknown rule 'surprise'" in refusal(tomlkit.dumps(document))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("version = 1", "version = 2", "whole number from 1 to 1"),
        ('kinds = ["simulated"]', 'kinds = ["simulated", "nitro"]', "'nitro', which is none of tdx"),
        ('kinds = ["simulated"]', 'kinds = ["tdx"]', "[simulated] is there, and kinds does not accept it"),
        ("[simulated]", "[simulate]", "did you mean 'simulated'"),
        ('verify = ["on"]', 'verify = ["yes"]', "'yes', which is not on or off"),
        ('privacy = ["two-server"]', 'privacy = ["reference"]', "is not local, none, two-server or pads"),
        ("version = 1", "version = ", "not a valid TOML file"),
        ("version = 1", 'version = 1\n"\\u001b[2J" = 1', "unknown rule '\ufffd[2J'"),
        ("version = 1", '"\\u001b[2J".x = 1\nversion = 1', "unknown section [\ufffd[2J]"),
        ("version = 1", "version = 1\n\u202e", "not a valid TOML file"),
    ],
)
def test_mistakes_are_told(old: str, new: str, said: str) -> None:
    text = written(make(SIMULATED))
    assert old in text
    told = refusal(text.replace(old, new))
    assert said in told
    assert told.isprintable()


def test_any_program_at_all_is_no_policy() -> None:
    for kind, rules in (("tdx", ("mrtd",)), ("sev-snp", ("measurement",)), ("sgx", ("mrenclave", "mrsigner"))):
        text = written(make(kind))
        for rule in rules:
            text = re.sub(rf"^{rule} = .*$", f'{rule} = "any"', text, flags=re.M)
        assert "any program at all" in refusal(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_blank_policy_has_to_be_filled_in(kind: str) -> None:
    text = policy.blank(kind)
    assert "FILL-IN" in refusal(text)
    text = re.sub(r'(model = )\["FILL-IN"\]', rf'\1["{"ab" * 32}"]', text)
    text = text.replace('version = ["FILL-IN"]', 'version = ["1"]')
    digits = 64 if kind == "sgx" else 96
    assert Policy.parse(text.replace("FILL-IN", "0" * digits), "p.toml").kinds == (kind,)


def test_simulated_says_that_it_proves_nothing() -> None:
    assert "PROVES NOTHING" in written(make(SIMULATED))
    assert "PROVES NOTHING" not in written(make("tdx"))


def test_debug_can_be_allowed_by_no_policy(case: Case) -> None:
    assert accepting(case)
    assert "unknown rule" in refusal(written(case).replace("\n[settings]", "debug = true\n[settings]"))
