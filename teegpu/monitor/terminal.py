"""Whether there is a terminal for the full-screen view, and where its keys come from."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import IO

PLAIN_TERMINALS = ("", "dumb", "unknown")
TERMINAL = "/dev/tty"


def why_plain() -> str:
    """Why the full-screen view can't be shown here; empty where it can.

    Textual writes to standard error and reads keys from standard input, in whose place ``keys_from_terminal`` puts the
    terminal itself.
    """
    if os.environ.get("TERM", "") in PLAIN_TERMINALS:
        return "this terminal can only write lines (TERM)"
    if sys.__stderr__ is None or not sys.__stderr__.isatty():
        return "standard error is no terminal"
    if _is_terminal(sys.__stdin__):
        return ""
    try:
        os.close(os.open(TERMINAL, os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return "there is no terminal to read keys from"
    return ""


@contextlib.contextmanager
def keys_from_terminal() -> Iterator[None]:
    """Within it, ``sys.__stdin__`` is a terminal, which is where Textual's driver reads keys: standard input may be a
    piped prompt."""
    given = sys.__stdin__
    if _is_terminal(given):
        yield
        return
    terminal: IO[str] = open(TERMINAL, encoding="utf-8", errors="replace")  # noqa: SIM115 (closed below)
    sys.__stdin__ = terminal  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        sys.__stdin__ = given  # type: ignore[misc]
        terminal.close()


def _is_terminal(stream: IO[str] | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False
