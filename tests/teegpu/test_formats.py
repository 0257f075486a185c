"""Which format is meant, and rows as text."""

from __future__ import annotations

import json
import re

import pytest

from teegpu.errors import UsageError
from teegpu.formats import aligned, as_json, choose, markdown

FORMATS = ("table", "json", "md")


@pytest.mark.parametrize(
    ("given", "out", "form"),
    [("", "", "table"), ("md", "", "md"), ("", "a.b.JSON", "json"), ("json", "a.md", "json"), ("", "a.txt", "table")],
)
def test_the_format_that_is_meant(given: str, out: str, form: str) -> None:
    assert choose(given, out, FORMATS) == form


def test_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"--format jsno is not one of table, json, md, did you mean 'json'\?"):
        choose("jsno", "", FORMATS)


def test_rows_stand_below_each_other() -> None:
    assert aligned([["", "a"], ["long", "1"], ["l", "100"]]).splitlines() == ["        a", "long    1", "l     100"]


def test_wide_characters_take_two_columns() -> None:
    assert aligned([["模", "1"], ["abc", "2"]]).splitlines() == ["模   1", "abc  2"]


def test_markdown_keeps_bars_apart() -> None:
    assert markdown([["a", "b"], ["x|y", "1"]]).splitlines() == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 |"]


def test_json_with_numbers_on_one_line() -> None:
    assert as_json({"a": [1, 2.5, -3], "b": ["x"]}) == '{\n  "a": [1, 2.5, -3],\n  "b": [\n    "x"\n  ]\n}\n'


def test_json_has_no_control_characters_and_says_the_same() -> None:
    document = {"text": "\x1b]0;x\x07\x7f\x9b31m é模"}
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", as_json(document))
    assert json.loads(as_json(document)) == document
