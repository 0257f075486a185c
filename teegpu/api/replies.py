"""What is answered, as OpenAI's objects, and as events of a stream. Pure."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Final

PAD_BYTES: Final = 64
"""Sizes of events are multiples of this: how long a token's text is would tell much of what it says."""

DONE: Final = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token with its logarithmic probability, and the likeliest ones with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(slots=True)
class Piece:
    """What a choice's latest tokens came to. ``finish``: why it ended, with its last piece."""

    choice: int
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt: int
    completion: int
    cached: int

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Form:
    """How one request is answered: ``chat`` or text completion, by ``model``."""

    def __init__(self, *, chat: bool, model: str) -> None:
        self._chat = chat
        kind = "chatcmpl" if chat else "cmpl"
        self._base = {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, pieces: list[Piece], usage: Usage) -> dict[str, Any]:
        """The answer in one object; ``pieces`` are whole choices."""
        choices = []
        for piece in pieces:
            choice: dict[str, Any] = {"index": piece.choice, "finish_reason": piece.finish}
            if self._chat:
                message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
                if piece.calls:
                    calls = [{key: value for key, value in call.items() if key != "index"} for call in piece.calls]
                    message |= {"content": piece.text or None, "tool_calls": calls}
                choice["message"] = message
            else:
                choice["text"] = piece.text
            choice["logprobs"] = self._logprobs(piece.logprobs)
            choices.append(choice)
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._base, "object": kind, "choices": choices, "usage": usage.to_json()}

    def first(self, choice: int) -> dict[str, Any] | None:
        """What comes before a choice's text: its role, in a chat."""
        return self._chunk(choice, {"role": "assistant", "content": ""}, None, []) if self._chat else None

    def part(self, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.calls:
            delta["tool_calls"] = piece.calls
        return self._chunk(piece.choice, delta, piece.finish, piece.logprobs)

    def last(self, usage: Usage) -> dict[str, Any]:
        """The chunk with the usage, after all others."""
        return {**self._base, "object": self._kind, "choices": [], "usage": usage.to_json()}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(
        self, index: int, delta: dict[str, Any], finish: str | None, logprobs: list[dict[str, Any]]
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        choice |= {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        choice |= {"logprobs": self._logprobs(logprobs), "finish_reason": finish}
        return {**self._base, "object": self._kind, "choices": [choice]}

    def _logprobs(self, found: list[dict[str, Any]]) -> dict[str, Any] | None:
        if not found:
            return None
        if self._chat:
            return {"content": found, "refusal": None}
        return {
            "tokens": [each["token"] for each in found],
            "token_logprobs": [each["logprob"] for each in found],
            "top_logprobs": [{top["token"]: top["logprob"] for top in each["top_logprobs"]} for each in found],
            "text_offset": [],
        }


def event(body: dict[str, Any], *, padded: bool) -> bytes:
    """``body`` as an event of a stream; ``padded`` to a size that tells little of what is in it."""
    if not padded:
        return b"data: " + _packed(body) + b"\n\n"
    packed = _packed(body)
    bare = len(packed) + len(b'data: ,"obfuscation":""\n\n')
    filler = secrets.token_hex(PAD_BYTES // 2)[: -bare % PAD_BYTES].encode()
    return b"data: " + packed[:-1] + b',"obfuscation":"' + filler + b'"}\n\n'


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def _packed(body: dict[str, Any]) -> bytes:
    return _ENCODER.encode(body).encode("utf-8", "replace")
