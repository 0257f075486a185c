"""What the process of a tokenizer says, as one that was taken over may say it."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from teegpu.model import answers

DESCRIBED = {"vocab_size": 5, "eos_token_id": 2, "chat_template": "", "special": {"</s>": 2}, "spells": True}
TEXT = {"job": "text", "text": "hello", "special": False}
DECODE = {"job": "decode", "ids": [[1, 2], [3]]}
CHAT = {"job": "chat", "template": "", "messages": []}
BYTES = {"job": "bytes", "token": 3}


def line(answer: object) -> bytes:
    return json.dumps({"answer": answer}, separators=(",", ":")).encode() + b"\n"


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (None, DESCRIBED),
        (None, DESCRIBED | {"eos_token_id": None}),
        (TEXT, [0, 300, 2**22 - 1]),
        (TEXT, []),
        (DECODE, ["a\n", "\U0001f600"]),
        (CHAT, 'a "text"\n\ud800'),
        (CHAT, ""),
        (BYTES, [0, 255]),
    ],
)
def test_a_right_answer_is_taken(request_: dict[str, Any] | None, answer: object) -> None:
    assert answers.read(line(answer), request_) == answer


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        *((None, {name: value for name, value in DESCRIBED.items() if name != left_out}) for left_out in DESCRIBED),
        (None, DESCRIBED | {"more": 1}),
        (None, DESCRIBED | {"vocab_size": True}),
        (None, DESCRIBED | {"vocab_size": 2**22}),
        (None, DESCRIBED | {"eos_token_id": -1}),
        (None, DESCRIBED | {"special": {"a": "b"}}),
        (None, DESCRIBED | {"special": {"\ud800": 1}}),
        (None, DESCRIBED | {"special": []}),
        (None, []),
        (TEXT, [-1]),  # a row of the embedding, counted from its end
        (TEXT, [2**22]),
        (TEXT, [1.0]),
        (TEXT, [float("nan")]),
        (TEXT, [True]),
        (TEXT, "12"),
        (TEXT, {"0": 1}),
        (DECODE, ["one"]),
        (DECODE, ["one", 2]),
        (DECODE, ["one", "half a character: \ud83d"]),
        (CHAT, None),
        (CHAT, ["a"]),
        (BYTES, [256]),
        (BYTES, 2**40),  # bytes(2**40) would be as many
    ],
)
def test_another_answer_is_none(request_: dict[str, Any] | None, answer: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        answers.read(line(answer), request_)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\n", b"null\n", b"[]\n", b"\xff\n", b'{"answer":"a"', b'{"answer":"a"} \n', b'{"answer":"a","b":1}\n',
        b'{"answer":"a\n', b'{"answer":}\n', b'{"answer":' + b"[" * 99_999 + b"}\n",
        b'{"answer":' + b"9" * 5000 + b"}\n", b'{"error":1}\n', b'{"error":"E","reason":"r"}\n',
        b'{"error":' + b"[" * 9000 + b"}\n",
        b'{"error":"E","reason":"' + b"r" * 20_000 + b'","refused":true}\n',
    ],
)  # fmt: skip
@pytest.mark.parametrize("request_", [None, TEXT, CHAT], ids=["described", "text", "chat"])
def test_what_is_no_answer_at_all(request_: dict[str, Any] | None, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        answers.read(data, request_)


def test_a_list_in_place_of_a_text_takes_no_memory() -> None:
    data = b'{"answer":[' + b"[]," * 500_000 + b"[]]}\n"
    tracemalloc.start()
    with pytest.raises(ValueError, match="no text"):
        answers.read(data, CHAT)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2 * len(data)


def test_an_answer_is_no_longer_than_what_was_asked_explains() -> None:
    assert answers.most_bytes(TEXT) == answers.most_bytes(DECODE | {"ids": [[1] * 5]}) < 2 * answers.MIB


def test_its_own_word_of_what_went_wrong_is_one_line() -> None:
    with pytest.raises(answers.FailedError) as caught:
        answers.read(b'{"error":"E","reason":"a\\u001b]52;c\\n","refused":false}\n', TEXT)
    assert str(caught.value) == "E: a\ufffd]52;c "
