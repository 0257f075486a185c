"""Documents that are old, damaged or not documents at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from teegpu.errors import RecordError
from teegpu.report import look
from tests.teegpu.report.samples import HOSTILE, document


@pytest.mark.parametrize("value", [None, "1", True, math.nan, math.inf, [], {}])
def test_what_is_no_number_is_none(value: object) -> None:
    assert look.number({"a": {"b": value}}, "a", "b") is None
    assert look.amount({"a": {"b": value}}, "a", "b") == 0


def test_a_path_through_what_is_no_object() -> None:
    assert look.at({"a": [1]}, "a", "b") is None
    assert look.text({"a": 1}, "a", "b") == ""
    assert look.mapping({"a": 1}, "a") == {}
    assert look.entries({"a": [1, {"b": 2}]}, "a") == [{"b": 2}]


def test_text_has_no_control_characters() -> None:
    shown = look.text({"a": HOSTILE}, "a")
    assert shown.isprintable()
    assert "[31mred" in shown
    assert len(look.text({"a": "x" * 10_000}, "a")) == 400


def test_numbers_by_their_paths() -> None:
    found = dict(look.numbers(document()))
    assert found["phases.decode.rpc_calls"] == 1891
    assert found["phases.prefill.layers.7.tee_seconds"] == pytest.approx(0.03)
    assert found["phases.prefill.ops.ADD@tee.count"] == 30


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "is not a report"),
        ({}, "is not a report"),
        ({"schema": "teegpu.bench/1"}, "is not a report"),
        ({"schema": "teegpu.report/x"}, "is not a report"),
        ({"schema": "teegpu.report/2"}, r"newer teegpu \(teegpu.report/2\); this one reads up to teegpu.report/1"),
    ],
)
def test_other_documents_are_refused(found: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        look.check(found, "x")


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document()))
    assert look.read(path) == document()


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"])
def test_a_file_that_is_no_json(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecordError, match=r"run.json is not a report: it is not valid JSON"):
        look.read(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="can't be read"):
        look.read(tmp_path / "nothing.json")
