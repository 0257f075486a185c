"""Tokenizers of models that grammars can't be made with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from teegpu.api.errors import ApiError
from teegpu.api.grammar import Grammars
from teegpu.model.byte_tokenizer import SMALLEST_VOCABULARY, byte_tokenizer

JSON = byte_tokenizer(SMALLEST_VOCABULARY).backend_tokenizer.to_str()


@pytest.mark.parametrize(
    ("described", "size"),
    [("{}", 300), ("[]", 300), ("/etc/hostname", 300), ("", 300), (JSON, 3), (JSON, 2**21)],
    ids=["empty", "list", "path", "nothing", "too-few", "too-many"],  # of the last one llguidance panics
)
def test_a_tokenizer_that_it_makes_nothing_of_is_told_in_a_line(described: str, size: int) -> None:
    tokenizer: Any = SimpleNamespace(to_json=lambda: described, vocab_size=size, eos_token_ids=(2,))
    with pytest.raises(ApiError, match="no schema can be followed with the tokenizer of this model") as caught:
        Grammars(tokenizer).of({"type": "string"}, "response_format")
    assert "\n" not in str(caught.value)
    assert caught.value.status == 400


def test_a_schema_that_is_nested_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(200):
        schema = {"type": "array", "items": schema}
    tokenizer: Any = SimpleNamespace(to_json=lambda: JSON, vocab_size=300, eos_token_ids=(2,))
    with pytest.raises(ApiError, match="the schema can't be followed"):
        Grammars(tokenizer).of(schema, "response_format")


def pattern(number: int) -> dict[str, Any]:
    return {"type": "string", "pattern": f"a.{{{number}}}b"}


def chained(name: str) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "string"}
    for number in range(14):
        made = {**pattern(number), name: [made]}
    return made


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [pattern(number) for number in range(14)]},
        {"allOf": [{"properties": {"a": pattern(number)}} for number in range(14)]},
        chained("allOf"),
        chained("anyOf"),
        {
            "$defs": {f"d{n}": {**pattern(n), "$ref": f"#/$defs/d{n + 1}"} for n in range(14)} | {"d14": {}},
            "$ref": "#/$defs/d0",
        },
    ],
)
def test_many_patterns_for_one_text_are_refused(schema: dict[str, Any]) -> None:
    """Of 24 a minute is spent, of 40 all time there is."""
    tokenizer: Any = SimpleNamespace(to_json=lambda: JSON, vocab_size=300, eos_token_ids=(2,))
    with pytest.raises(ApiError, match="more than 12 patterns"):
        Grammars(tokenizer).of(schema, "response_format")


def test_many_patterns_beside_each_other_are_taken() -> None:
    tokenizer: Any = SimpleNamespace(to_json=lambda: JSON, vocab_size=300, eos_token_ids=(2,))
    optional = {"anyOf": [pattern(1), {"type": "null"}], "title": "Optional"}
    properties = {f"a{number}": pattern(number) for number in range(30)} | {"format": optional, "pattern": optional}
    assert Grammars(tokenizer).of({"type": "object", "properties": properties}, "response_format")
