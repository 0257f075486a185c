"""Tokens to text on the way out: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class TextSource(Protocol):
    """What turns tokens into text piece by piece (``teegpu.model.tokenizer.TextStream``)."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


class Streamer:
    """Writes text as it becomes certain. ``text`` is all that was written.

    Text that may be the beginning of a stop string is held back until it is known not to be one. Of several stop
    strings the one that is complete first counts, wherever the borders of the tokens are.
    """

    def __init__(self, source: TextSource, stop: Sequence[str], write: Callable[[str], None]) -> None:
        self._source = source
        self._stop = [text for text in stop if text]
        self._write = write
        self._held = ""
        self._stopped = False
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def push(self, token: int) -> bool:
        """Takes the next token; True when a stop string has come."""
        return self._take(self._source.push(token))

    def finish(self) -> None:
        """Writes what is still held back. Call it once, at the end."""
        if not self._stopped and not self._take(self._source.finish()):
            self._emit(self._held)
        self._held = ""

    def _take(self, piece: str) -> bool:
        self._held += piece
        found = [(at + len(text), at) for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self._emit(self._held[: min(found)[1]])
            self._held = ""
            self._stopped = True
            return True
        keep = max((overlap(self._held, text) for text in self._stop), default=0)
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(ready) :]
        self._emit(ready)
        return False

    def _emit(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            self._write(piece)


_CONTROLS = {code: "�" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def for_terminal(text: str) -> str:
    """``text`` that a model made, with every control character but line break and tab replaced: an answer can be
    steered, by a prompt or a server, and an escape sequence in it would be obeyed."""
    return text.translate(_CONTROLS)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
