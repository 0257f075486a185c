"""Whether there is a terminal for the full-screen view, where its keys come from, and its end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import IO, Final

from teegpu.monitor.players import Player

PLAIN_TERMINALS: Final = ("", "dumb", "unknown")
TERMINAL: Final = "/dev/tty"

GRACE_SECONDS: Final = 0.5
"""How long the screen has to give the terminal back when it must end and the terminal takes nothing; thirty times as
long where it does."""

_LOOK_SECONDS: Final = 0.1


def why_plain() -> str:
    """Why the full-screen view can't be shown here; empty where it can.

    Textual writes to standard error and reads keys from standard input, in whose place ``screen`` puts the terminal
    itself.
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
def screen(
    player: Player, *, first: Callable[[], object] | None = None, clean: Callable[[], None] | None = None
) -> Iterator[None]:
    """Within it, the screen of ``player`` may be shown, and ends with its terminal.

    When the player must end, and when the terminal is gone, whether or not a signal told, the screen has
    ``GRACE_SECONDS`` from when ``first`` has returned. One that waits to write to a terminal that takes nothing never
    gets to its end: then ``clean`` is called, in another thread, and must write nothing either; the process ends with
    the code of a SIGHUP.
    """
    over = threading.Event()
    threading.Thread(target=_end, args=(player, over, first, clean), name="end of the screen", daemon=True).start()
    try:
        with _keys_from_terminal():
            yield
    finally:
        over.set()


def _end(
    player: Player, over: threading.Event, first: Callable[[], object] | None, clean: Callable[[], None] | None
) -> None:
    poller = select.poll()
    terminal = sys.__stderr__.fileno() if sys.__stderr__ is not None else -1
    poller.register(terminal, 0)  # no event but its end
    while not (player.ending or poller.poll(0)):
        if over.wait(_LOOK_SECONDS):
            return
    player.end()
    if first is not None:
        first()
    poller.modify(terminal, select.POLLOUT)
    waited = 0.0
    while waited < GRACE_SECONDS:
        if over.wait(_LOOK_SECONDS):
            return
        # A terminal that takes what is written has the screen end by itself, however busy the machine is.
        waited += _LOOK_SECONDS if poller.poll(0) != [(terminal, select.POLLOUT)] else _LOOK_SECONDS / 30
    if clean is not None:
        with contextlib.suppress(Exception):
            clean()
    os._exit(128 + signal.SIGHUP)


@contextlib.contextmanager
def _keys_from_terminal() -> Iterator[None]:
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
