"""What the process of a tokenizer and a template (``model.foreign``) answers: a line of JSON.

What it runs is foreign and may have taken it over, so its lines are read as a stranger's: an answer is of the kind and
in the range that was asked for, or none, and reading it takes a small multiple of what a right one could be long.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from teegpu.units import printable

MIB: Final = 1 << 20
_BEGIN, _END, _ERROR = '{"answer":', "}\n", '{"error":'
_TEXTS: Final = {"chat": 64 * MIB, "json": 256 * MIB, "tokens": MIB}
_IDS: Final = 1 << 22
_MOST_ERROR: Final = 16384
_BYTES_FOR_EACH: Final = 1024
"""Of an answer for each character or token of what was asked: far more than any normalizer makes of one."""
_ENTRIES: Final = {
    "vocab_size": (int,),
    "eos_token_id": (int, type(None)),
    "chat_template": (str,),
    "special": (dict,),
    "spells": (bool,),
}


class FailedError(Exception):
    """The child's own word of what went wrong. ``refused``: it was the template's purpose."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


def most_bytes(request: Mapping[str, Any] | None) -> int:
    """How long the answer to ``request`` can be; None: to none, the description that comes first."""
    match request:
        case None:
            return 32 * MIB
        case {"job": "chat" | "json" | "tokens" as job}:
            return _TEXTS[job]
        case {"job": "text", "text": text}:
            return MIB + _BYTES_FOR_EACH * len(text)
        case {"job": "decode", "ids": lists}:
            return MIB + _BYTES_FOR_EACH * sum(map(len, lists))
    return MIB


def read(line: bytes, request: Mapping[str, Any] | None) -> Any:
    """The answer to ``request`` that ``line`` has. Raises ``FailedError`` where it says what went wrong, ``ValueError``
    where it is no answer."""
    text = line.decode("ascii")
    if text.startswith(_ERROR):
        raise _failure(text)
    if not text.startswith(_BEGIN) or not text.endswith(_END):
        raise ValueError("no answer")
    job = "" if request is None else request["job"]
    if job in _TEXTS:
        return _string(text)
    try:
        answer = json.loads(text)["answer"]
    except RecursionError:
        raise ValueError("an answer in too many brackets") from None
    if not (_described(answer) if request is None else _fits(job, request, answer)):
        raise ValueError("another answer than was asked for")
    return answer


def _string(text: str) -> str:
    """A text is read as one: a list in its place would take twenty times the memory of its bytes."""
    if text[len(_BEGIN)] != '"':
        raise ValueError("no text")
    found, end = json.JSONDecoder().raw_decode(text, len(_BEGIN))
    if text[end:] != _END:
        raise ValueError("more than a text")
    return str(found)


def _failure(text: str) -> FailedError:
    if len(text) > _MOST_ERROR:
        raise ValueError("an error without end")
    try:
        match json.loads(text):
            case {"error": str(kind), "reason": str(reason), "refused": bool(refused)}:
                pass
            case _:
                raise ValueError("no error")
    except RecursionError:
        raise ValueError("an error in too many brackets") from None
    if kind == "MemoryError":
        reason = "it takes more memory than it may"
    elif not refused:
        reason = f"{kind}: {reason}" if reason else kind
    return FailedError(printable(reason), refused=refused)


def _described(answer: Any) -> bool:
    return (
        isinstance(answer, dict)
        and answer.keys() == _ENTRIES.keys()
        and all(type(answer[name]) in kinds for name, kinds in _ENTRIES.items())
        and _below(_IDS, [answer["vocab_size"], answer["eos_token_id"] or 0, *answer["special"].values()])
        and all(map(is_whole, answer["special"]))
    )


def _fits(job: str, request: Mapping[str, Any], answer: Any) -> bool:
    if not isinstance(answer, list):
        return False
    if job == "decode":
        return len(answer) == len(request["ids"]) and all(isinstance(text, str) and is_whole(text) for text in answer)
    return _below(_IDS if job == "text" else 256, answer)


def _below(end: int, numbers: list[Any]) -> bool:
    return all(type(number) is int and 0 <= number < end for number in numbers)


def is_whole(text: str) -> bool:
    """Whether ``text`` can be written: no half of a character, which JSON has words for."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)
