"""Where the prompts of a run come from: the argument, standard input, a file, or a text cut to length."""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from teegpu.errors import PromptError, UsageError

if TYPE_CHECKING:
    from teegpu.model.tokenizer import Tokenizer

Notify = Callable[[str], None]

PATIENCE_SECONDS = 2.0
"""A pipe that gives nothing for so long may be one that nobody will ever write to: the user is told of the wait."""


MOST_BYTES = 64 << 20
"""Of a file or of standard input: more than any context holds."""


@dataclass(frozen=True)
class Prompts:
    """What the options of ``run`` say about its prompts. Nothing is read before ``read``."""

    prompt: str | None = None
    system: str | None = None
    raw: bool = False
    prompts_file: Path | None = None
    prompt_tokens: int | None = None
    text_file: Path | None = None

    def check(self) -> None:
        """Raises ``UsageError`` where options exclude each other."""
        given = [
            name
            for name, value in (
                ("PROMPT", self.prompt),
                ("--prompts-file", self.prompts_file),
                ("--prompt-tokens", self.prompt_tokens),
            )
            if value is not None
        ]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} exclude each other: give one of them")
        if self.text_file is not None and self.prompt_tokens is None:
            raise UsageError("--text-file is the text for --prompt-tokens: give that too")
        for option, used in (("--raw", self.raw), ("--prompt-tokens", self.prompt_tokens is not None)):
            if used and self.system is not None:
                raise UsageError(f"{option} uses no chat template, so --system has no place in it: leave one out")

    @property
    def several(self) -> bool:
        """Whether the answers are a list, even of one."""
        return self.prompts_file is not None

    def read(self, notify: Notify = lambda _: None) -> list[str]:
        """The prompts as texts; for ``--prompt-tokens`` the text to cut from, or nothing for the built-in one.

        ``notify`` is told what is waited for. Raises ``PromptError`` where there is no prompt or it is no text, and
        ``UsageError`` for a file that can't be read.
        """
        if self.prompts_file is not None:
            # Not splitlines: that cuts at U+2028 and others too, which a prompt may hold.
            lines = [line.removesuffix("\r") for line in _file(self.prompts_file, "--prompts-file").split("\n")]
            lines = [line for line in lines if line.strip()]
            if not lines:
                raise PromptError(f"--prompts-file {self.prompts_file} has no prompt: write one a line")
            return lines
        if self.prompt_tokens is not None:
            return [_file(self.text_file, "--text-file")] if self.text_file is not None else []
        text = self._joined(notify)
        if not text.strip():
            raise PromptError("the prompt is empty: give one as argument, on standard input, or with --prompt-tokens")
        return [text]

    def _joined(self, notify: Notify) -> str:
        argument = "" if self.prompt is None or self.prompt == "-" else self.prompt
        for text, what in ((argument, "the prompt"), (self.system or "", "--system")):
            if any("\ud800" <= character <= "\udfff" for character in text):  # how Python keeps bytes of an argument
                raise PromptError(f"{what} is not UTF-8 text")
        piped = _standard_input(notify) if self.prompt == "-" or _is_piped() else ""
        if not self.raw:
            # `echo Hi | teegpu run` is to ask what `teegpu run Hi` asks; raw text is taken as it is.
            piped = piped.rstrip("\r\n")
        if argument.strip() and piped.strip():
            notify(f"{len(piped):,} characters of standard input are part of the prompt (leave out with '< /dev/null')")
        return "\n\n".join(part for part in (argument, piped) if part.strip())

    def encode(self, tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
        """The token ids of each prompt; ``texts`` are those that ``read`` gave."""
        if self.prompt_tokens is not None:
            from teegpu.model.texts import prompt_of

            return [prompt_of(tokenizer, self.prompt_tokens, texts[0] if texts else None)]
        if self.raw:
            return [tokenizer.encode_raw(text) for text in texts]
        return [tokenizer.encode_chat(text, self.system) for text in texts]


def _file(path: Path, option: str) -> str:
    try:
        with path.open("rb") as file:
            return _decoded(file, f"{option} {path}")
    except UnicodeDecodeError:
        raise UsageError(f"{option} {path} can't be read: it is not UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"{option} {path} can't be read: {(error.strerror or str(error)).lower()}") from None


def _decoded(file: IO[bytes], what: str) -> str:
    """All of ``file``, without a byte order mark. Raises ``PromptError`` for what no context holds, before it is all in
    memory."""
    content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise PromptError(f"{what} has more than {MOST_BYTES >> 20} MiB, which is too long for a prompt: cut it")
    return content.decode("utf-8-sig")


def _standard_input(notify: Notify) -> str:
    if sys.stdin is None:
        raise PromptError("standard input is closed: give the prompt as an argument, or pipe it in")
    if sys.stdin.isatty():
        notify("type the prompt, and end it with Ctrl-D on a line of its own")
    elif _is_piped(regular=False) and not select.select([sys.stdin.fileno()], [], [], PATIENCE_SECONDS)[0]:
        notify("waiting for standard input, a pipe, to end: it is part of the prompt (leave it out with '< /dev/null')")
    try:
        return _decoded(sys.stdin.buffer, "standard input")
    except UnicodeDecodeError:
        raise PromptError("standard input is not UTF-8 text") from None
    except OSError as error:
        raise PromptError(f"standard input can't be read: {(error.strerror or str(error)).lower()}") from None


def _is_piped(*, regular: bool = True) -> bool:
    """Whether standard input is a pipe, a socket or (with ``regular``) a file: not a terminal, a device or nothing."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or (regular and stat.S_ISREG(mode))
