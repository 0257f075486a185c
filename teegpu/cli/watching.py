"""What ``run --watch`` and ``watch`` share: the screen, lines where there is none, and the run as a child process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teegpu.cli import interrupts
from teegpu.cli.common import message_console
from teegpu.errors import ConfigError, nearest
from teegpu.monitor import feed
from teegpu.monitor.launch import WatchedRun
from teegpu.monitor.players import LivePlayer, Player
from teegpu.monitor.terminal import screen, why_plain
from teegpu.stats.document import rebuild

if TYPE_CHECKING:
    from rich.console import Console

    from teegpu.config import Config
    from teegpu.stats.summary import Summary

LINE_SECONDS = 1.0
"""Between two lines where there is no screen."""


def check_theme(settings: Config) -> None:
    """Raises ``ConfigError`` for a theme that does not exist."""
    from textual.theme import BUILTIN_THEMES

    from teegpu.monitor.themes import COLOURS

    known = [*COLOURS, *BUILTIN_THEMES]
    theme = settings.monitor.theme
    if theme not in known:
        raise ConfigError(
            f"monitor.theme: there is no theme '{theme}'{nearest(theme, known)}; ours are {', '.join(COLOURS)}"
        )


def show(settings: Config, player: Player, *, ours: bool) -> str | None:
    """The full-screen monitor, until the user leaves it. How it was left (see ``monitor.app``), or None where it
    failed."""
    from teegpu.monitor.app import Monitor
    from teegpu.report.tables import tables

    app = Monitor(
        player,
        ours=ours,
        theme=settings.monitor.theme,
        hertz=settings.monitor.refresh_hertz,
        conclude=lambda document: tables(_with_advice(dict(document))),
        build=lambda meta, summary: _with_advice(rebuild(meta, summary, "running")),
    )
    try:
        return app.run()
    finally:
        player.close()


def advice(meta: Mapping[str, Any], summary: Summary, status: str) -> list[str]:
    """What could be advised by now, in words."""
    return [str(entry["text"]) for entry in _with_advice(rebuild(meta, summary, status))["advice"]]


def _with_advice(document: dict[str, Any]) -> dict[str, Any]:
    """``document`` with advice, where it has none."""
    if document.get("advice"):
        return document
    from teegpu.report.advice import advise

    return document | {"advice": advise(document)}


def print_lines(
    player: Player, console: Console, wait: Callable[[float], object], *, running_only: bool = False
) -> None:
    """Prints a line a second, where it differs from the last, until the run has ended or ``wait``, which takes as many
    seconds, returns something true."""
    from teegpu.monitor.plain import progress_line

    last = ""
    while True:
        while player.tick():
            pass
        state = player.look()
        line = progress_line(state)
        if line != last and (state.current.running or not running_only):
            console.print(line, soft_wrap=True)
            last = line
        if state.ended or wait(LINE_SECONDS):
            return


@contextlib.contextmanager
def signals(numbers: Sequence[signal.Signals], handle: Callable[[int], None]) -> Iterator[None]:
    """Within it ``handle`` is called for each of ``numbers`` that comes."""
    before = {number: signal.signal(number, lambda number, _: handle(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


# The run as a child


def watch_run(settings: Config, arguments: Sequence[str], *, typed: bytes | None, quiet: bool) -> int:
    """Runs ``teegpu run`` with ``arguments`` and shows it; returns its exit code.

    ``typed`` is a prompt that was typed into this terminal before the screen is taken.
    """
    plain = why_plain()
    environment = dict(os.environ)
    with contextlib.ExitStack() as scratch, contextlib.ExitStack() as stack:
        if not settings.record.keep:
            # There must be something to watch; it goes when the run has ended.
            folder = tempfile.mkdtemp(prefix="teegpu-watch-")
            scratch.callback(shutil.rmtree, folder, ignore_errors=True)
            environment |= {"TEEGPU_RECORD_KEEP": "true", "TEEGPU_RECORD_DIR": folder}
            arguments = [argument for argument in arguments if argument != "--no-record"]
        player = LivePlayer(advise=advice)
        watched = stack.enter_context(
            WatchedRun(
                arguments,
                given=environment,
                hold_stdout=sys.stdout.isatty(),
                hold_stderr=not plain,
                typed=typed,
                on_message=lambda kind, value: _hear(player, kind, value),
                on_line=player.note,
            )
        )

        def pass_on(number: int) -> None:
            """Ctrl-C, a request to end and the end of the terminal are the run's; the screen goes with them."""
            watched.interrupt()
            player.leave() if number == signal.SIGINT else player.end()

        with signals(interrupts.ENDS, pass_on):
            if not plain:
                _on_screen(settings, player, watched, clean=scratch.close)
            elif not quiet:
                print_lines(player, message_console(), watched.ended, running_only=True)
                player.close()
            return watched.wait()


def _hear(player: LivePlayer, kind: str, value: Any) -> None:
    from teegpu.record.run import RunFolder

    if kind == feed.RUN and isinstance(value, str):
        player.attach(RunFolder(Path(value)))
    elif kind == feed.TEXT and isinstance(value, str):
        player.add_text(value)


def _on_screen(settings: Config, player: LivePlayer, watched: WatchedRun, clean: Callable[[], None]) -> None:
    # What is wrong with the command is printed before there is a screen.
    while watched.running and not watched.begun.wait(0.05):
        pass
    if not watched.running and player.run is None:
        return
    from teegpu.monitor.widgets.dialogs import STOP

    threading.Thread(target=_leave_without_a_run, args=(player, watched), daemon=True).start()
    with screen(player, first=watched.interrupted, clean=clean):
        result = show(settings, player, ours=True)
    if result == STOP:
        watched.interrupt()
    elif result is None and watched.running:
        message_console().print("the monitor has failed; the run goes on", soft_wrap=True)


def _leave_without_a_run(player: LivePlayer, watched: WatchedRun) -> None:
    watched.process.wait()
    if player.run is None:
        player.leave()  # it ended before there was anything to show; what it said is printed
