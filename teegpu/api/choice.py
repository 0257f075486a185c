"""One choice of a request: a sequence of the engine, whose tokens become text on the way to the client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from teegpu.api.asked import Asked
from teegpu.api.errors import ApiError
from teegpu.api.grammar import Grammar
from teegpu.api.replies import Logprob, Piece
from teegpu.api.tools import Calls
from teegpu.model.tokenizer import Tokenizer
from teegpu.tee.sampling import Sampler
from teegpu.tee.sequence import Sequence
from teegpu.text import Streamer

Put = Callable[[Piece], None]


class Choice:
    """``sequence`` is for the engine, ``put`` gets what comes of it, from the engine's thread."""

    def __init__(
        self,
        index: int,
        prompt: list[int],
        asked: Asked,
        max_tokens: int,
        tokenizer: Tokenizer,
        namespace: str,
        put: Put,
        grammar: Grammar | None = None,
        calls: Calls | None = None,
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._put = put
        self._grammar = grammar
        self._calls = calls
        self._told_calls = 0
        self._text: list[str] = []
        special = {text: token for text in asked.stop if (token := tokenizer.special_id(text)) is not None}
        self._streamer = Streamer(
            tokenizer.stream(prompt), [text for text in asked.stop if text not in special], self._text.append
        )
        seed = asked.sampling.seed
        options = replace(
            asked.sampling,
            seed=None if seed is None else (seed + index) % 2**63,
            logprobs=asked.logprobs,
            vocabulary=tokenizer.vocab_size,
        )
        self._sampler = Sampler(options, grammar)
        ends = () if asked.ignore_eos and grammar is None else tokenizer.eos_token_ids
        self.sequence = Sequence(
            prompt,
            max_tokens,
            self._sampler,
            frozenset((*ends, *special.values())),
            self._on_token,
            self._on_end,
            namespace=namespace,
        )

    def _on_token(self, token: int) -> bool:
        stopped = self._streamer.push(token)
        logprobs = self._logprobs()
        text = self._taken()
        calls = self._new_calls()
        if text or logprobs or calls:
            self._put(Piece(self._index, text, logprobs, calls))
        return stopped

    def _on_end(self, error: BaseException | None) -> None:
        logprobs = self._logprobs()  # of an end token, which is no text
        self._streamer.finish()
        text = self._taken()
        if self._calls is not None:
            text += self._calls.finish()
        calls = self._new_calls()
        finish: str | None = self.sequence.done.finish_reason
        if finish == "stop" and self._told_calls:
            finish = "tool_calls"
        if self._grammar is not None and self._grammar.failed and error is None:
            error = ApiError(400, f"the answer can't be what was asked for ({self._grammar.failed})", code="grammar")
        if finish == "interrupted":
            finish = None
        self._put(Piece(self._index, text, logprobs, calls, finish, error))

    def _taken(self) -> str:
        text = "".join(self._text)
        self._text.clear()
        return text if self._calls is None else self._calls.push(text)

    def _new_calls(self) -> list[dict[str, Any]]:
        if self._calls is None:
            return []
        calls = self._calls.found[self._told_calls :]
        self._told_calls = len(self._calls.found)
        return calls

    def _logprobs(self) -> list[dict[str, Any]]:
        found = self._sampler.drawn
        self._sampler.drawn = None
        return [] if found is None else [self._told(Logprob(*found))]

    def _told(self, found: Logprob) -> dict[str, Any]:
        top = [self._one(token, logprob) for token, logprob in found.top]
        return {**self._one(found.token, found.logprob), "top_logprobs": top}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}
