"""``teegpu run --watch``: the run as a child process, and the monitor in this one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from teegpu.cli.common import message_console
from teegpu.errors import RecordError
from teegpu.monitor import feed
from teegpu.monitor.launch import WatchedRun
from teegpu.monitor.players import LivePlayer
from teegpu.monitor.terminal import keys_from_terminal, why_plain

if TYPE_CHECKING:
    from teegpu.config import Config

GRACE_SECONDS = 2.0
"""How long the screen has to come to its end after its terminal has gone."""

PLAIN_SECONDS = 1.0
"""Between two lines where there is no screen."""

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def watch_run(settings: Config, arguments: Sequence[str], *, typed: bytes | None, quiet: bool) -> int:
    """Runs ``teegpu run`` with ``arguments`` and shows it; returns its exit code.

    ``typed`` is a prompt that was typed into this terminal before the screen is taken.
    """
    plain = why_plain()
    environment = dict(os.environ)
    with contextlib.ExitStack() as stack:
        if not settings.record.keep:
            # There must be something to watch; it goes when the run has ended.
            folder = tempfile.mkdtemp(prefix="teegpu-watch-")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            environment |= {"TEEGPU_RECORD_KEEP": "true", "TEEGPU_RECORD_DIR": folder}
            arguments = [argument for argument in arguments if argument != "--no-record"]
        player = LivePlayer(hertz=settings.monitor.refresh_hertz, advise=_advise)
        watched = stack.enter_context(
            WatchedRun(
                arguments,
                environment=environment,
                hold_stdout=sys.stdout.isatty(),
                hold_stderr=not plain,
                typed=typed,
                stdin=_standard_input(),
                on_message=lambda kind, value: _told(player, kind, value),
                on_line=player.note,
            )
        )
        threading.Thread(target=_end_with, args=(player, watched.process), name="end of the run", daemon=True).start()
        with _passed_on(watched, player, stack.pop_all):
            if plain:
                _plainly(player, watched, quiet=quiet)
            else:
                _on_screen(settings, player, watched)
            watched.release()
            return watched.wait()


def _standard_input() -> int | None:
    """Ours for the child, unless it is the terminal, whose keys are the monitor's."""
    try:
        return subprocess.DEVNULL if sys.stdin is None or sys.stdin.isatty() else None
    except ValueError:
        return subprocess.DEVNULL


def _told(player: LivePlayer, kind: str, value: Any) -> None:
    from teegpu.metrics.runfolder import RunFolder

    if kind == feed.RUN and isinstance(value, str):
        try:
            player.attach(RunFolder(Path(value)))
        except RecordError as error:
            player.note(str(error))
    elif kind == feed.TEXT and isinstance(value, str):
        player.add_text(value)


def _end_with(player: LivePlayer, process: subprocess.Popen[bytes]) -> None:
    process.wait()
    if player.run is None:
        player.leave()  # it ended before there was anything to show; what it said is printed


@contextlib.contextmanager
def _passed_on(watched: WatchedRun, player: LivePlayer, leave: Callable[[], contextlib.ExitStack]) -> Iterator[None]:
    """Ctrl-C, a request to end, and the end of the terminal are the run's; the screen goes with them.

    A screen whose terminal is gone may wait for ever to write to it, so then the process ends without it: ``leave``
    gives what there is to clean up."""

    def pass_on(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        watched.interrupt()
        player.leave()
        if number == signal.SIGHUP:
            threading.Thread(target=end_anyway, name="end of the terminal", daemon=True).start()

    def end_anyway() -> None:
        watched.process.wait()
        time.sleep(GRACE_SECONDS)
        with contextlib.suppress(Exception):
            leave().close()
        os._exit(128 + signal.SIGHUP)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _on_screen(settings: Config, player: LivePlayer, watched: WatchedRun) -> None:
    # What is wrong with the command is told before there is a screen.
    while watched.running and not watched.begun.wait(0.05):
        pass
    if not watched.running and player.run is None:
        return
    from teegpu.cli.monitoring import show
    from teegpu.monitor.widgets.dialogs import STOP

    with keys_from_terminal():
        result = show(settings, player, ours=True)
    if result == STOP:
        watched.interrupt()
    elif result is None and watched.running:
        message_console().print("the monitor has failed; the run goes on", soft_wrap=True)


def _plainly(player: LivePlayer, watched: WatchedRun, *, quiet: bool) -> None:
    """A line about every second, on stderr."""
    from teegpu.monitor.plain import progress_line

    console = message_console()
    last = ""
    due = time.monotonic() + PLAIN_SECONDS
    while watched.running:
        while player.tick():
            pass
        with contextlib.suppress(subprocess.TimeoutExpired):
            watched.process.wait(0.1)
        if quiet or time.monotonic() < due:
            continue
        due = time.monotonic() + PLAIN_SECONDS
        state = player.look()
        line = progress_line(state)
        if state.current.running and line != last:
            console.print(line, soft_wrap=True)
            last = line
    player.close()


def _advise(meta: Any, summary: Any, status: str) -> list[str]:
    from teegpu.cli.monitoring import advice

    return advice(meta, summary, status)
