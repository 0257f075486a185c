"""Answers that are JSON of a schema: of each token's logits those are left that the grammar allows."""

from __future__ import annotations

import json
import threading
from typing import Any, Final

import torch
from llguidance import LLMatcher, LLTokenizer

from teegpu.api.errors import ApiError
from teegpu.model.tokenizer import Tokenizer
from teegpu.units import one_line

MOST_SCHEMA_BYTES: Final = 64 * 1024

MOST_TOGETHER: Final = 12
"""Patterns of a schema, where several may have to hold for one text: each doubles what that takes, and no limit of
llguidance ends it."""

_SPACE: Final = r"[ \n]{1,8}"
"""Room for an indentation, and not for a model that has nothing to say but spaces."""

_BITS = torch.arange(8, dtype=torch.uint8)


class Grammars:
    """Makes grammars for one tokenizer. What is costly is made when the first one is asked for; any thread may ask."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None

    def of(self, schema: dict[str, Any], param: str) -> Grammar:
        """A grammar of JSON that ``schema`` describes, for one answer. Raises ``ApiError``, of ``param``, for a schema
        that can't be followed."""
        text = json.dumps(schema)
        if len(text) > MOST_SCHEMA_BYTES:
            raise ApiError(400, f"the schema is longer than {MOST_SCHEMA_BYTES} bytes", param=param)
        if _patterns_together(schema) > MOST_TOGETHER:
            raise _refused(f"it has more than {MOST_TOGETHER} patterns and joins some of them", param)
        with self._lock:
            if self._made is None:
                self._made = _tokens_of(self._tokenizer)
        try:
            made = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _SPACE})
        except ValueError as error:  # one that is nested too deep, for instance
            raise _refused(str(error), param) from None
        matcher = LLMatcher(self._made, made, log_level=0)
        if matcher.is_error():
            raise _refused(matcher.get_error(), param)
        return Grammar(matcher)


def _patterns_together(schema: dict[str, Any]) -> int:
    """How many patterns a text may have to follow at once, at most; 0 where nothing joins any."""
    count, joined = 0, False
    parts: list[Any] = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            patterns = sum(isinstance(part.get(name), str) for name in ("pattern", "format"))
            every = part.get("allOf")
            several = sum(isinstance(part.get(name), list) for name in ("allOf", "anyOf", "oneOf"))
            count += patterns
            joined |= (patterns > 0) + several + isinstance(part.get("$ref"), str) > 1
            joined |= isinstance(every, list) and len(every) > 1
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return count if joined else 0


def _tokens_of(tokenizer: Tokenizer) -> LLTokenizer:
    """Raises ``ApiError`` for a tokenizer that llguidance makes nothing of: a model's file says what it is."""
    described = tokenizer.to_json()
    try:
        if not described.startswith("{"):  # it would be taken for the name of a file
            raise ValueError("it is no JSON object")
        return LLTokenizer(described, n_vocab=tokenizer.vocab_size, eos_token=list(tokenizer.eos_token_ids))
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # which is none
            raise
        told = one_line(error)
        raise ApiError(400, f"no schema can be followed with the tokenizer of this model ({told})") from None


def _refused(reason: str, param: str) -> ApiError:
    return ApiError(400, f"the schema can't be followed ({one_line(reason)})", param=param, code="invalid_schema")


class Grammar:
    """Where one answer stands in its grammar (``tee.sampling.Constraint``)."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = (packed[:, None] >> _BITS & 1).flatten().to(torch.bool)[: logits.shape[-1]]
        left = logits[: allowed.shape[0]].masked_fill(~allowed, float("-inf"))
        rest = logits.new_full((logits.shape[-1] - left.shape[0],), float("-inf"))
        return torch.cat([left, rest])

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)

    @property
    def failed(self) -> str:
        """Why the answer is not what was asked for; empty where it is, as far as it goes."""
        return one_line(self._matcher.get_error()) if self._matcher.is_error() else ""
