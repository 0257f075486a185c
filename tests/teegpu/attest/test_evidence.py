"""Documents of evidence from anybody: read, or refused in a line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from teegpu.attest.evidence import MAX_BYTES, Collateral, Evidence, read_json
from teegpu.errors import EvidenceError
from tests.teegpu.attest.test_verify import make


def test_any_part_missing_added_or_of_another_kind_is_refused() -> None:
    good = make("tdx").evidence().to_json()
    assert Evidence.from_json(good).to_json() == good
    within = [("binding", name) for name in ("role", "key", "nonce", "settings")]
    within += [("collateral", name) for name in ("intel", "amd")]
    for path in (("kind",), ("quote",), ("binding",), ("collateral",), *within):
        for wrong in (None, 1, [], {"x": 1}, "ü", "0", {"vcek": 1}):
            _refused(_with(good, path, wrong))
        _refused(_with(good, path, None, drop=True))
        _refused(_with(good, (*path[:-1], "more"), 1))
    for wrong in (None, [], "x", {"format": "teegpu.evidence/2"}):
        _refused(wrong)


def _refused(raw: Any) -> None:
    with pytest.raises(EvidenceError) as refused:
        Evidence.from_json(raw)
    assert "\n" not in str(refused.value)


def _with(good: dict[str, Any], path: tuple[str, ...], value: Any, *, drop: bool = False) -> Any:
    made = json.loads(json.dumps(good))
    inner = made
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    if drop:
        del inner[path[-1]]
    return made


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b'{"a":1,"a":2}', b"[" * 5000, b" " * (MAX_BYTES + 1)])
def test_bytes_that_are_no_document(raw: bytes) -> None:
    with pytest.raises(EvidenceError):
        read_json(raw)


def test_a_file_s_collateral_goes_before_what_was_sent() -> None:
    sent = Collateral(intel={"tcb_info": "old"}, amd={"vcek": b"v", "crl": b"old"})
    own = Collateral(amd={"crl": b"new"})
    assert own.over(sent) == Collateral(intel={"tcb_info": "old"}, amd={"vcek": b"v", "crl": b"new"})
    assert Collateral(intel={"tcb_info": "new"}).over(sent).intel == {"tcb_info": "new"}
