"""``teegpu watch``: look at a run that goes on in another terminal, or at one that has ended, again."""

from __future__ import annotations

import math
import signal
import time
from typing import TYPE_CHECKING, Annotated

import typer

from teegpu.cli import interrupts
from teegpu.cli.common import ConfigFile, message_console, result_console
from teegpu.cli.flags import Flags, takes_settings
from teegpu.errors import TeegpuError, UsageError

if TYPE_CHECKING:
    from teegpu.config import Config
    from teegpu.record.run import RunFolder

WIDTHS = (60, 160)
"""Least and most columns of ``--once``."""


@takes_settings("watch")
def watch(
    flags: Flags,
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
    config_file: ConfigFile = None,
) -> None:
    """Watch a run as it goes on, also one in another terminal; or replay one that has ended.

    Leaving it leaves the run alone, and any number may watch at once. Keys: ? in the monitor.
    """
    from teegpu import config

    settings = config.load(flags, config_file)
    if once and speed is not None:
        raise UsageError("--once prints one frame, so --speed has no place in it: leave one out")
    if speed is not None and not 0 <= speed <= 1e6:
        raise UsageError(f"--speed {speed:g} is not from 0 to 1,000,000")
    from teegpu.cli.watching import check_theme, print_lines
    from teegpu.monitor.players import LivePlayer
    from teegpu.monitor.terminal import why_plain
    from teegpu.record.store import open_store

    check_theme(settings)
    found = open_store(settings).find(run)
    going_on = found.status == "running"
    if speed is not None and going_on:
        raise UsageError(f"run {found.id} goes on, so it has its own speed: leave --speed out")
    why = why_plain()
    if once or (why and not going_on):
        _print_frame(found)
    elif why:
        message_console().print(f"plain lines: {why}", soft_wrap=True)
        player = LivePlayer(found)
        try:
            print_lines(player, result_console(), time.sleep)
        except KeyboardInterrupt:
            interrupts.handled()
            raise
        finally:
            player.close()
    else:
        _show(settings, found, speed=1.0 if speed is None else speed or math.inf, going_on=going_on)


def _show(settings: Config, run: RunFolder, *, speed: float, going_on: bool) -> None:
    from teegpu.cli.watching import advice, show, signals
    from teegpu.monitor.players import LivePlayer, ReplayPlayer
    from teegpu.monitor.terminal import screen

    player = LivePlayer(run, advise=advice) if going_on else ReplayPlayer(run, speed=speed)
    # so that the terminal is left as it was, if that is still there
    with signals((signal.SIGTERM, signal.SIGHUP), lambda _: player.end()), screen(player):
        result = show(settings, player, ours=False)
    if result is None:
        raise TeegpuError("the monitor has failed; the run is not touched by that")


def _print_frame(run: RunFolder) -> None:
    from teegpu.cli.watching import advice
    from teegpu.monitor.draw import Look
    from teegpu.monitor.plain import FRAME_WIDTH, as_text, frame
    from teegpu.monitor.players import LivePlayer

    player = LivePlayer(run, advise=advice)
    try:
        while player.tick():
            pass
        player.tick()  # the end of a run is seen by who finds nothing more
        state = player.look()
    finally:
        player.close()
    console = result_console()
    least, most = WIDTHS
    width = min(most, max(least, console.width)) if console.is_terminal else FRAME_WIDTH
    letters = not console.is_terminal or console.no_color
    console.print(as_text(frame(state, width, Look(letters=letters))), soft_wrap=True)
