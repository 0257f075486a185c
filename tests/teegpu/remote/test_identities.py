"""Who servers are said to be: pinned by a key, or attested by evidence for it."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import closing
from pathlib import Path

import pytest

from teegpu import config, keys
from teegpu.attest import policy, sources
from teegpu.attest.binding import SERVER, Binding
from teegpu.attest.simulated import verify as simulated_claims
from teegpu.endpoints import parse_all
from teegpu.errors import AttestationError, ConfigError, EvidenceError, ShieldError
from teegpu.model.folder import ModelFolder
from teegpu.remote.identities import Identity, identify
from teegpu.remote.servers import Servers
from teegpu.remote.sides import check_apart, divide


@pytest.fixture
def attested(tmp_path: Path) -> str:
    """``#…`` of an endpoint whose key ``b`` is a TEE's, by simulated evidence."""
    for name in ("a", "b", "me"):
        keys.new(name)
    binding = Binding(SERVER, hashlib.sha256(keys.public("b").raw).digest(), bytes(32), {})
    made = sources.evidence(sources.Simulated(), binding)
    (tmp_path / "b.json").write_text(json.dumps(made.to_json()))
    settings = {"privacy": "none", "verify": "on", "model": "00" * 32, "version": "1"}
    text = policy.render(simulated_claims(made.quote), settings, origin="a test")
    text = re.sub(r"^(privacy|verify|model|version) = \[.*$", r'\1 = "any"', text, flags=re.M)
    (tmp_path / "b.toml").write_text(text)
    return f"evidence={tmp_path}/b.json,policy={tmp_path}/b.toml"


def found(*endpoints: str) -> list[Identity]:
    settings = config.load({"run.endpoints": endpoints, "link.client_key": "me"})
    return identify(settings, parse_all(endpoints))


def test_pinned_attested_and_neither(attested: str) -> None:
    first, second = found("tcp://a:1#key=a,operator=Alpha,share=1", f"tcp://b:1#key=b,operator=Beta,share=2,{attested}")
    assert (first.operator, first.share, first.proof) == ("Alpha", 1, "pinned")
    assert (second.operator, second.share, second.proof) == ("Beta", 2, "attested: simulated")
    assert str(first) == f"key {keys.public('a')}, operator Alpha"
    assert str(second) == f"key {keys.public('b')}, operator Beta, attested: simulated"
    (open_one,) = identify(config.load({"run.endpoints": ("tcp://127.0.0.1:1",)}), parse_all(["tcp://127.0.0.1:1"]))
    assert (open_one.proof, str(open_one)) == ("", "no key")


def test_evidence_for_another_key_is_refused(attested: str, tmp_path: Path) -> None:
    with pytest.raises(AttestationError) as refused:
        found(f"tcp://a:1#key=a,{attested}")
    assert refused.value.rule == "binding.key"
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(EvidenceError):
        found(f"tcp://b:1#key=b,{attested}")
    (tmp_path / "b.json").unlink()
    with pytest.raises(ConfigError, match="can't be read"):
        found(f"tcp://b:1#key=b,{attested}")
    with pytest.raises(ConfigError, match="go together"):
        found("tcp://b:1#key=b,evidence=x")


def test_one_operator_does_not_get_both_shares(attested: str) -> None:
    texts = ("tcp://a:1#key=a,operator=Alpha", "tcp://b:1#key=b,operator=Alpha")
    settings = config.load({"run.endpoints": texts, "link.client_key": "me"})
    with pytest.raises(ShieldError, match="both run by 'Alpha'"):
        check_apart(settings, divide("two-server", parse_all(texts)))


@pytest.mark.parametrize(
    ("before", "joins", "why"),
    [
        ("key=a", "", "link.server_key is not"),
        ("key=b,operator=Beta,{attested}", "#key=b", r"tcp://127.0.0.1:2 \(.*\) proves less than the servers before"),
    ],
)
def test_who_joins_must_not_prove_less_than_those_before(
    before: str, joins: str, why: str, attested: str, tmp_path: Path
) -> None:
    first = f"tcp://127.0.0.1:1#{before.format(attested=attested)}"
    settings = config.load({"run.endpoints": (first,), "link.client_key": "me"})
    servers = Servers(settings, ModelFolder("tiny", tmp_path), lambda _: None)
    with closing(servers), pytest.raises(ConfigError, match=why):
        servers._expect(parse_all([first, f"tcp://127.0.0.1:2{joins}"]))
