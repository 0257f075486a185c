from __future__ import annotations

import pytest

from teegpu.errors import PromptError
from teegpu.model import texts
from teegpu.model.tokenizer import Tokenizer


def test_every_evaluation_text_is_long_enough(smollm2) -> None:
    tokenizer = Tokenizer(smollm2)
    lengths = {name: len(tokenizer.encode_plain(text)) for name, text in texts.evaluation_texts().items()}

    assert len(lengths) >= 4
    assert min(lengths.values()) > 1100
    assert len(tokenizer.encode_plain(texts.sample_text())) > 2048


def test_the_texts_are_what_they_say() -> None:
    found = texts.evaluation_texts()

    assert "White Rabbit with pink eyes" in found["alice"]
    assert "We the People of the United States" in found["constitution"]
    assert "a truth universally acknowledged" in found["pride"]
    assert "Four score and seven years ago" in found["speeches"]
    compile(found["code"], "code.txt", "exec")


@pytest.mark.parametrize("tokens", [1, 2, 17, 1024, 2048, 20_000])
def test_a_prompt_has_exactly_the_length_asked_for(smollm2, tokens) -> None:
    tokenizer = Tokenizer(smollm2)
    ids = texts.prompt_of(tokenizer, tokens)

    assert len(ids) == tokens
    assert ids == texts.prompt_of(tokenizer, tokens)
    assert texts.sample_text().startswith(tokenizer.decode(ids[:1000]))


def test_a_short_text_is_repeated(tiny_model) -> None:
    tokenizer = Tokenizer(tiny_model("llama"))
    body = tokenizer.encode_plain("abc")

    assert texts.prompt_of(tokenizer, 8, "abc") == (body * 3)[:8]


@pytest.mark.parametrize(("tokens", "text"), [(0, None), (-1, None), (5, "")])
def test_what_can_make_no_prompt_is_refused(tiny_model, tokens, text) -> None:
    with pytest.raises(PromptError, match="can't be made"):
        texts.prompt_of(Tokenizer(tiny_model("llama")), tokens, text)
