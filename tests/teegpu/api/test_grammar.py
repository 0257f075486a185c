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
