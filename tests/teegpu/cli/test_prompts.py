"""Where the prompts come from."""

from __future__ import annotations

import io
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from teegpu.cli import prompts
from teegpu.cli.prompts import Prompts
from teegpu.errors import PromptError, UsageError
from teegpu.model.tokenizer import Tokenizer
from tests.conftest import TinyModel

Piped = Callable[[bytes], None]


def stand_in(monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    monkeypatch.setattr(sys, "stdin", stream)


@pytest.fixture(autouse=True)
def devnull(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Standard input as a service has it."""
    with open(os.devnull) as stream:
        stand_in(monkeypatch, stream)
        yield


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Piped]:
    """``piped(data)``: standard input is a pipe with ``data`` in it, whose other end is closed."""
    streams = []

    def make(data: bytes) -> None:
        reader, writer = os.pipe()
        os.write(writer, data)
        os.close(writer)
        streams.append(os.fdopen(reader))
        stand_in(monkeypatch, streams[-1])

    yield make
    for stream in streams:
        stream.close()


def test_the_argument() -> None:
    assert Prompts("Hi  there\n").read() == ["Hi  there\n"]


def test_a_pipe(piped: Piped) -> None:
    piped("Grüße\n".encode())
    assert Prompts().read() == ["Grüße"]


@pytest.mark.parametrize("prompt", ["-", None])
def test_standard_input_as_the_prompt(prompt: str | None, piped: Piped) -> None:
    piped(b"from the pipe\n\n")
    assert Prompts(prompt).read() == ["from the pipe"]


def test_raw_text_from_a_pipe_is_taken_as_it_is(piped: Piped) -> None:
    piped(b"def f(x):\n")
    assert Prompts(raw=True).read() == ["def f(x):\n"]


def test_a_pipe_is_joined_to_the_argument(piped: Piped) -> None:
    """And is told of: ``while read line; do teegpu run "$line"; done`` would give all lines to the first run."""
    piped(b"the text\n")
    told: list[str] = []
    assert Prompts("Sum this up:").read(told.append) == ["Sum this up:\n\nthe text"]
    assert told == ["8 characters of standard input are part of the prompt (leave out with '< /dev/null')"]


def test_an_empty_pipe_adds_nothing_to_the_argument(piped: Piped) -> None:
    piped(b"\n")
    assert Prompts("Hi").read() == ["Hi"]


def test_a_file_as_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("from a file")
    with (tmp_path / "text").open() as stream:
        stand_in(monkeypatch, stream)
        assert Prompts().read() == ["from a file"]


def test_a_socket_as_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(b"from a socket")
    theirs.close()
    with ours, ours.makefile("r") as stream:
        stand_in(monkeypatch, stream)
        assert Prompts().read() == ["from a socket"]


def test_no_device_is_read_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/zero") as endless:
        stand_in(monkeypatch, endless)
        assert Prompts("Hi").read() == ["Hi"]


@pytest.mark.parametrize("prompt", [None, "-", "", " \n"])
def test_an_empty_prompt(prompt: str | None) -> None:
    with pytest.raises(PromptError, match="the prompt is empty: give one as argument, on standard input"):
        Prompts(prompt).read()


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, None)
    assert Prompts("Hi").read() == ["Hi"]
    with pytest.raises(PromptError, match="standard input is closed"):
        Prompts("-").read()
    with pytest.raises(PromptError, match="the prompt is empty"):
        Prompts().read()


def test_standard_input_without_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, io.TextIOWrapper(io.BytesIO(b"from memory")))
    assert Prompts("Hi").read() == ["Hi"]
    assert Prompts("-").read() == ["from memory"]


def test_what_is_no_text(piped: Piped) -> None:
    piped(b"\xff\xfe")
    with pytest.raises(PromptError, match="standard input is not UTF-8 text"):
        Prompts().read()
    with pytest.raises(PromptError, match="the prompt is not UTF-8 text"):
        Prompts(os.fsdecode(b"caf\xe9")).read()
    with pytest.raises(PromptError, match="--system is not UTF-8 text"):
        Prompts("Hi", system=os.fsdecode(b"\xe9")).read()


def test_a_pipe_that_stays_silent_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "PATIENCE_SECONDS", 0.01)
    reader, writer = os.pipe()
    told: list[str] = []

    def notify(line: str) -> None:
        told.append(line)
        if len(told) == 1:
            os.write(writer, b"at last")
            os.close(writer)

    with os.fdopen(reader) as stream:
        stand_in(monkeypatch, stream)
        assert Prompts("Hi").read(notify) == ["Hi\n\nat last"]
    assert told[:1] == [
        "waiting for standard input, a pipe, to end: it is part of the prompt (leave it out with '< /dev/null')"
    ]


def test_a_terminal_is_read_when_asked_for_and_says_how_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    os.write(ours, b"typed\n\x04")
    told: list[str] = []
    with os.fdopen(ours, "wb"), os.fdopen(theirs) as terminal:
        stand_in(monkeypatch, terminal)
        assert Prompts("Hi").read(told.append) == ["Hi"]
        assert Prompts("-").read(told.append) == ["typed"]
    assert told == ["type the prompt, and end it with Ctrl-D on a line of its own"]


# Files


def test_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("one\n\n  \ntwo\r\nthree")
    source = Prompts(prompts_file=tmp_path / "prompts")
    assert source.read() == ["one", "two", "three"]
    assert source.several


def test_a_file_without_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text(" \n\n")
    with pytest.raises(PromptError, match="has no prompt: write one a line"):
        Prompts(prompts_file=tmp_path / "prompts").read()


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "no such file or directory"), (b"\xff", "it is not UTF-8 text")]
)
def test_a_file_that_can_not_be_read(content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=f"^--prompts-file .* can't be read: {reason}$"):
        Prompts(prompts_file=path).read()
    with pytest.raises(UsageError, match=f"^--text-file .* can't be read: {reason}$"):
        Prompts(prompt_tokens=4, text_file=path).read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "Hi", "prompt_tokens": 4}, "PROMPT and --prompt-tokens exclude each other"),
        ({"prompt": "-", "prompts_file": Path("x")}, "PROMPT and --prompts-file exclude each other"),
        ({"prompt": "Hi", "text_file": Path("x")}, "--text-file is the text for --prompt-tokens"),
        ({"prompt": "Hi", "raw": True, "system": "Be brief."}, "--raw uses no chat template"),
        ({"prompt_tokens": 4, "system": "Be brief."}, "--prompt-tokens uses no chat template"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Prompts(**options).check()


# Token ids


@pytest.fixture(scope="module")
def tokenizer(tiny_model: TinyModel) -> Tokenizer:
    return Tokenizer(tiny_model("llama"))


def test_chat_raw_and_cut_texts(tokenizer: Tokenizer) -> None:
    def encode(source: Prompts, *texts: str) -> list[list[int]]:
        return source.encode(tokenizer, list(texts))

    assert encode(Prompts(), "Hi", "Ho") == [tokenizer.encode_chat("Hi"), tokenizer.encode_chat("Ho")]
    assert encode(Prompts(system="Be brief."), "Hi") == [tokenizer.encode_chat("Hi", "Be brief.")]
    assert encode(Prompts(raw=True), "Hi") == [tokenizer.encode_raw("Hi")]
    assert encode(Prompts(prompt_tokens=7), "abcd") == [tokenizer.encode_plain("abcdabc")]
    assert [len(ids) for ids in encode(Prompts(prompt_tokens=200))] == [200]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\r"])
def test_a_line_of_prompts_ends_at_a_newline_only(tmp_path: Path, inside: str) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(f"one{inside}line\r\n\nanother\n".encode())
    assert Prompts(prompts_file=path).read() == [f"one{inside}line", "another"]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path, piped: Piped) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfone\n")
    assert Prompts(prompts_file=path).read() == ["one"]
    assert Prompts(prompt_tokens=4, text_file=path).read() == ["one\n"]
    piped(b"\xef\xbb\xbfone")
    assert Prompts(raw=True).read() == ["one"]


def test_what_is_far_too_long_is_refused_before_it_is_all_read(
    tmp_path: Path, piped: Piped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "MOST_BYTES", 1 << 20)
    path = tmp_path / "text"
    path.write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(PromptError, match="has more than 1 MiB"):
        Prompts(prompts_file=path).read()
    monkeypatch.setattr(prompts, "MOST_BYTES", 4)
    piped(b"hello")
    with pytest.raises(PromptError, match="standard input has more than 0 MiB"):
        Prompts().read()
