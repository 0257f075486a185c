"""Texts that come with the package: for prompts of a given length, and for measuring accuracy on real text."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from teegpu.errors import PromptError

if TYPE_CHECKING:
    from teegpu.model.tokenizer import Tokenizer

NAMES = ("alice", "constitution", "pride", "speeches", "code")


def evaluation_texts() -> dict[str, str]:
    """Name → text. Each has more than 1,100 tokens with SmolLM2's tokenizer; four are prose, one is a program."""
    return {name: (files(__name__) / f"{name}.txt").read_text(encoding="utf-8") for name in NAMES}


def sample_text() -> str:
    """The text that benchmark prompts are cut from: the evaluation texts one after the other."""
    return "\n".join(evaluation_texts().values())


def prompt_of(tokenizer: Tokenizer, tokens: int, text: str | None = None) -> list[int]:
    """Exactly ``tokens`` token ids: what ``text`` (None: ``sample_text()``) begins with, repeated where it is too
    short. They begin as the model expects a text to begin (with BOS where it has one). Equal arguments give equal ids.

    Raises ``PromptError`` for a length below 1 or an empty text.
    """
    if tokens < 1:
        raise PromptError(f"a prompt of {tokens} tokens can't be made: give 1 or more")
    source = sample_text() if text is None else text
    body = tokenizer.encode_plain(source)
    if not body:
        raise PromptError("a prompt can't be made from an empty text: give a file that has some")
    ids = tokenizer.encode_raw(source)
    # A tokenizer that also ends a text with a special token would put it in the middle: only its beginning is kept.
    start = len(ids) - len(body) if ids[-len(body) :] == body else 0
    ids = ids[:start] + body
    while len(ids) < tokens:
        ids += body
    return ids[:tokens]
