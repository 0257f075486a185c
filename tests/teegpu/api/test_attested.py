"""When an endpoint proves what it is, and when it does not start."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from teegpu import config
from teegpu.api import attested
from teegpu.api.attested import Attester, Attesting
from teegpu.api.errors import ApiError
from teegpu.api.serving import check_access
from teegpu.attest import sources
from teegpu.attest.evidence import SIMULATED
from teegpu.attest.sources import Quoted, Simulated
from teegpu.config import Config
from teegpu.errors import ConfigError, EvidenceError
from tests.teegpu.attest.test_verify import SETTINGS


def settings(**given: object) -> Config:
    return config.load({f"api.{name}": value for name, value in given.items()})


class Broken:
    describe = "a TEE that does not work"

    def quote(self, report_data: bytes) -> Quoted:
        raise EvidenceError("the kernel has none")


def test_outside_of_a_tee_nothing_is_attested_and_that_is_said() -> None:
    found = attested.choose(settings())
    assert (found.source, found.identity) == (None, None)
    assert "development mode" in found.reason
    document = asyncio.run(Attester(found).answer("ab" * 32, SETTINGS))
    assert document == {"format": "teegpu.evidence/1", "kind": "none", "note": found.reason}
    with pytest.raises(ConfigError, match=r"api\.attest is required, and nothing can be attested: none: development"):
        attested.choose(settings(attest="required"))


def test_what_was_simulated_is_called_so() -> None:
    found = attested.choose(settings(attest="simulated"))
    assert found.identity is not None
    assert found.reason == "SIMULATED, which proves nothing"
    document = asyncio.run(Attester(found).answer("ab" * 32, SETTINGS))
    assert (document["kind"], document["binding"]["key"]) == (SIMULATED, found.identity.key.hex())


@pytest.mark.parametrize(
    ("given", "said"), [({"tls_cert": "c", "tls_key": "k"}, "in a file"), ({"listen": "unix:/tmp/x"}, "unix socket")]
)
def test_a_key_from_a_file_and_a_unix_socket_are_never_attested(
    given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "find", Simulated)
    assert said in attested.choose(settings(**given)).reason
    for attest in ("required", "simulated"):
        with pytest.raises(ConfigError, match=said):
            attested.choose(settings(attest=attest, **given))


def test_evidence_that_can_not_be_had_ends_the_start_or_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find", Broken)
    with pytest.raises(EvidenceError, match="the kernel has none"):
        attested.choose(settings(attest="required"))
    found = attested.choose(settings())
    assert found.source is None
    assert found.identity is not None  # TLS was promised to who allowed the address
    assert "the kernel has none" in found.reason
    assert attested.choose(settings(attest="off")).reason == "api.attest is off"


def test_an_attested_key_is_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"listen": "0.0.0.0:80", "keys": "keys"}
    with pytest.raises(ConfigError, match="without TLS"):
        check_access(settings(**given), insecure=False)
    assert check_access(settings(attest="simulated", **given), insecure=False) == ""
    monkeypatch.setattr(sources, "find", Simulated)
    assert check_access(settings(**given), insecure=False) == ""


def test_few_may_wait_for_evidence(tmp_path: Path) -> None:
    gate = threading.Event()

    class Slow(Simulated):
        def quote(self, report_data: bytes) -> Quoted:
            gate.wait(10)
            return super().quote(report_data)

    async def ask_all() -> list[Any]:
        attester = Attester(Attesting("", Slow(), attested.identity.new()))
        asked = [asyncio.ensure_future(attester.answer("ab" * 32, SETTINGS)) for _ in range(20)]
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(ask_all())
    assert sum(isinstance(each, dict) for each in answers) == 16
    assert {each.status for each in answers if isinstance(each, ApiError)} == {429}
