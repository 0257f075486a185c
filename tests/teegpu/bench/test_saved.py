"""Results read again: what is no result, or another one, is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from teegpu.bench.samples import Measured
from teegpu.bench.saved import read, take_over
from teegpu.errors import UsageError

WHOLE: dict[str, Any] = {
    "schema": "teegpu.bench/1", "benchmark": "ladder", "status": "complete", "machine": {}, "versions": {},
    "settings": {}, "notes": [], "results": [],
}  # fmt: skip


def test_a_result(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(WHOLE))
    assert read(path) == read(path, "ladder") == WHOLE


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rung,label\n", "it is not JSON (write it with --out FILE.json)"),
        ("[]", "its schema is not teegpu.bench/1"),
        ('{"schema": "teegpu.report/1"}', "its schema is not teegpu.bench/1"),
        (json.dumps(WHOLE | {"benchmark": "plans"}), "is a result of 'teegpu bench plans', and one of 'teegpu"),
        (json.dumps(WHOLE | {"results": None}), "damaged"),
        (json.dumps({key: value for key, value in WHOLE.items() if key != "machine"}), "damaged"),
    ],
)  # fmt: skip
def test_what_is_none(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read(path, "ladder")
    assert told in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be read: no such file"):
        read(tmp_path / "nowhere.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="it is not JSON"):
        read(tmp_path / "x.json")


@pytest.mark.parametrize("entry", [{}, {"samples": [{}]}, {"samples": [], "warm_up": {"prefill": {}}}])
def test_an_entry_that_can_not_be_one(entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"samples|not a sample"):
        take_over(entry, Measured("x", {}))
