from __future__ import annotations

import json

import pytest

from teegpu.api.replies import PAD_BYTES, Form, Piece, event


def test_sizes_of_events_say_little() -> None:
    form = Form(chat=True, model="m")
    sizes = set()
    for text in ("", "a", "the", "ü", "🌲", "a" * 20, '"' * 9):
        made = event(form.part(Piece(0, text)), padded=True)
        assert len(made) % PAD_BYTES == 0
        assert json.loads(made.removeprefix(b"data: "))["choices"][0]["delta"].get("content", "") == text
        sizes.add(len(made))
    assert len(sizes) <= 2


def test_without_padding_there_is_none() -> None:
    assert b"obfuscation" not in event({"a": 1}, padded=False)


@pytest.mark.parametrize("text", ["\n\ndata: [DONE]\n\n", "\r\n", "\u2028"])
def test_text_is_never_an_event_of_its_own(text: str) -> None:
    made = event(Form(chat=False, model="m").part(Piece(0, text)), padded=True)
    assert made.count(b"\n") == 2
    assert made.endswith(b"\n\n")
    assert b"\r" not in made
