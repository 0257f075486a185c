"""Tokens to text on the way out."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from teegpu.model.tokenizer import Tokenizer
from teegpu.text import Streamer, for_terminal
from tests.conftest import TinyModel


class Pieces:
    """A text source whose token i is ``pieces[i]``; ``rest`` comes with ``finish``."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self._pieces = pieces
        self._rest = rest

    def push(self, token: int) -> str:
        return self._pieces[token]

    def finish(self) -> str:
        return self._rest


def stream(pieces: list[str], stop: list[str], rest: str = "") -> tuple[list[str], bool]:
    """(what was written, piece by piece; whether a stop string was reported before the end)"""
    written: list[str] = []
    streamer = Streamer(Pieces(pieces, rest), stop, written.append)
    stopped = any(streamer.push(token) for token in range(len(pieces)))
    streamer.finish()
    assert streamer.text == "".join(written)
    return written, stopped


def up_to_first(text: str, stop: list[str]) -> str:
    """``text`` before the stop string that is complete first."""
    ends = [(text.find(word) + len(word), text.find(word)) for word in stop if word and word in text]
    return text[: min(ends)[1]] if ends else text


def test_without_stop_strings_each_piece_is_written_at_once() -> None:
    assert stream(["Hel", "", "lo"], []) == (["Hel", "lo"], False)


def test_a_stop_string_ends_the_text_before_it() -> None:
    assert stream(["one ", "two ", "three"], ["two"]) == (["one "], True)


def test_a_stop_string_across_token_borders() -> None:
    assert stream(["ab<", "/", "en", "d>cd"], ["</end>"]) == (["ab"], True)


def test_what_may_become_a_stop_string_waits_and_no_more_than_that() -> None:
    assert stream(["x<", "/e", "lse", "y"], ["</end>"]) == (["x", "</else", "y"], False)


def test_what_was_held_back_comes_at_the_end() -> None:
    assert stream(["a</", "en"], ["</end>"]) == (["a", "</en"], False)


def test_a_stop_string_that_only_the_last_bytes_complete() -> None:
    assert stream(["a</"], ["</end>"], rest="end>b") == (["a"], False)


def test_the_stop_string_that_is_complete_first_counts_wherever_tokens_end() -> None:
    for pieces in (["xabcd"], ["xa", "bc", "d"], ["x", "a", "b", "c", "d"]):
        assert "".join(stream(pieces, ["abcd", "bc"])[0]) == "xa"


def test_an_empty_stop_string_is_none() -> None:
    assert stream(["a", "b"], [""]) == (["a", "b"], False)


@given(
    pieces=st.lists(st.text(alphabet="ab</é", max_size=4), max_size=12),
    stop=st.lists(st.text(alphabet="ab</é", max_size=4), max_size=3),
    rest=st.text(alphabet="ab<", max_size=2),
)
def test_the_output_is_the_text_up_to_the_first_stop_string(pieces: list[str], stop: list[str], rest: str) -> None:
    written, stopped = stream(pieces, stop, rest)
    assert "".join(written) == up_to_first("".join(pieces) + rest, stop)
    assert stopped == any(word and word in "".join(pieces) for word in stop)


@given(pieces=st.lists(st.text(alphabet="ab<", min_size=1, max_size=3), max_size=12), word=st.text("ab<", min_size=1))
def test_no_more_than_a_possible_beginning_is_held_back(pieces: list[str], word: str) -> None:
    written: list[str] = []
    streamer = Streamer(Pieces(pieces), [word], written.append)
    text = ""
    for token, piece in enumerate(pieces):
        if streamer.push(token):
            return
        text += piece
        held = text[len(streamer.text) :]
        assert text == streamer.text + held
        assert word.startswith(held)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: TinyModel) -> Tokenizer:
    return Tokenizer(tiny_model("llama"))


@given(text=st.text(max_size=20), stop=st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_characters_whose_bytes_span_tokens_come_whole(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    assume("<" not in text)  # a special token's text is that token, which has no bytes
    written: list[str] = []
    streamer = Streamer(tokenizer.stream(), stop, written.append)
    for token in tokenizer.encode_plain(text):  # one token a byte
        if streamer.push(token):
            break
    streamer.finish()
    assert "".join(written) == up_to_first(text, stop)


def test_bytes_that_never_become_a_character_are_shown_as_replaced(tokenizer: Tokenizer) -> None:
    written: list[str] = []
    streamer = Streamer(tokenizer.stream(), [], written.append)
    for token in tokenizer.encode_plain("aé")[:-1]:
        assert not streamer.push(token)
    assert written == ["a"]
    streamer.finish()
    assert written == ["a", "\ufffd"]


def test_a_terminal_gets_no_control_characters_but_line_breaks_and_tabs() -> None:
    assert for_terminal("a\x1b]52;c;ZXZpbA==\x07\tb\r\n\x9b31mé模\x7f\x00") == "a�]52;c;ZXZpbA==�\tb�\n�31mé模��"
