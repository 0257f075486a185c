"""``teegpu watch``: look at a run that goes on in another terminal, or at one that has ended, again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from teegpu.cli import interrupts
from teegpu.cli.common import ConfigFile, message_console, result_console
from teegpu.errors import TeegpuError, UsageError

if TYPE_CHECKING:
    from teegpu.config import Config
    from teegpu.metrics.runfolder import RunFolder

WIDTHS = (60, 160)
"""Least and most columns of ``--once``."""


def watch(
    run: Annotated[
        str, typer.Argument(metavar="[RUN]", help="last, the id of a run, or the beginning of one.", show_default=False)
    ] = "last",
    once: Annotated[bool, typer.Option("--once", help="Print one plain frame and exit.")] = False,
    speed: Annotated[
        float | None,
        typer.Option(
            metavar="N", help="Replay N times as quickly as it was (0: at once, to the end).", show_default=False
        ),
    ] = None,
    theme: Annotated[str | None, typer.Option(help="teegpu-dark or teegpu-light.", show_default=False)] = None,
    config_file: ConfigFile = None,
) -> None:
    """Watch a run as it goes on, also one in another terminal; or replay one that has ended.

    Leaving it leaves the run alone, and any number may watch at once. Keys: ? in the monitor.
    """
    from teegpu import config

    settings = config.load({"monitor.theme": theme}, config_file)
    if once and speed is not None:
        raise UsageError("--once prints one frame, so --speed has no place in it: leave one out")
    if speed is not None and not 0 <= speed <= 1e6:
        raise UsageError(f"--speed {speed:g} is not from 0 to 1,000,000")
    from teegpu.cli.monitoring import check_theme
    from teegpu.metrics.store import open_store

    check_theme(settings)
    found = open_store(settings).find(run)
    going_on = found.status == "running"
    if speed is not None and going_on:
        raise UsageError(f"run {found.id} goes on, so it has its own speed: leave --speed out")
    if once:
        _print_frame(found, going_on=going_on)
        return
    from teegpu.monitor.terminal import keys_from_terminal, why_plain

    if why := why_plain():
        if not going_on:
            _print_frame(found, going_on=False)
            return
        message_console().print(f"plain lines: {why}", soft_wrap=True)
        _print_lines(found)
        return
    with keys_from_terminal():
        _show(settings, found, speed=speed, going_on=going_on)


def _show(settings: Config, run: RunFolder, *, speed: float | None, going_on: bool) -> None:
    from teegpu.cli.monitoring import advice, show, speed_of
    from teegpu.monitor.players import LivePlayer, Player, ReplayPlayer

    hertz = settings.monitor.refresh_hertz
    player: Player
    if going_on:
        player = LivePlayer(run, hertz=hertz, advise=advice)
    else:
        player = ReplayPlayer(run, speed=speed_of(1.0 if speed is None else speed), hertz=hertz)
    with _ended_by_sigterm(player):
        result = show(settings, player, ours=False)
    if result is None:
        raise TeegpuError("the monitor has failed; the run is not touched by that")


@contextlib.contextmanager
def _ended_by_sigterm(player: object) -> Iterator[None]:
    """SIGTERM and the end of the terminal close the screen, so that the terminal is left as it was."""
    import signal

    from teegpu.monitor.players import Player

    assert isinstance(player, Player)
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: player.leave()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _print_frame(run: RunFolder, *, going_on: bool) -> None:
    from rich.console import Console

    from teegpu.cli.monitoring import advice
    from teegpu.monitor.draw import Look
    from teegpu.monitor.plain import FRAME_WIDTH, as_text, frame
    from teegpu.monitor.players import LivePlayer

    player = LivePlayer(run, advise=advice)
    try:
        while player.tick():
            pass
        if not going_on:
            player.tick()  # nothing more to read: its end
        state = player.look()
    finally:
        player.close()
    console: Console = result_console()
    least, most = WIDTHS
    width = min(most, max(least, console.width)) if console.is_terminal else FRAME_WIDTH
    letters = not console.is_terminal or console.no_color
    console.print(as_text(frame(state, width, Look(letters=letters))), soft_wrap=True)


def _print_lines(run: RunFolder) -> None:
    """A line a second on stdout, until the run ends."""
    from teegpu.monitor.plain import progress_line
    from teegpu.monitor.players import LivePlayer

    console = result_console()
    player = LivePlayer(run)
    last = ""
    try:
        while True:
            while player.tick():
                pass
            state = player.look()
            line = progress_line(state)
            if line != last:
                console.print(line, soft_wrap=True)
                last = line
            if state.ended:
                return
            time.sleep(1.0)
    except KeyboardInterrupt:
        interrupts.handled()
        raise
    finally:
        player.close()
