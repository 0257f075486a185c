"""What several commands share: the ``--config`` option, consoles, transports' errors in our words, and SIGTERM."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperOption
from typer.models import CommandFunctionType as CommandFunction

from teegpu import errors

if TYPE_CHECKING:
    from rich.console import Console

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings file, in place of ./config.toml.", show_default=False),
]
"""The type of a command's ``config_file`` parameter; None where it is not given."""

InsecureServers = Annotated[
    bool,
    typer.Option("--insecure", help="Allow addresses that others can reach without --key, and --key without --auth."),
]
"""The type of ``insecure`` where a command starts servers: see ``serve.check_access``."""


OF_SETTING: Final = "flag_"
"""Begins the names of parameters that give a setting. What others are given may be text that is for nobody's log."""


class Command(TyperCommand):
    """A command that says so where an option of one value is given another one: the last one counts, as everywhere, and
    who gave two may have wanted both."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(list(args))
        rest = super().parse_args(ctx, list(args))
        if not (ctx.resilient_parsing or ctx.params.get("quiet")):
            for option in dict.fromkeys(given):
                if isinstance(option, TyperOption) and not (option.multiple or option.is_flag or option.count):
                    *before, last = _values(option.opts, args)
                    if set(before) - {last}:
                        said = f"{ctx.command_path}: {option.opts[0]} is given {len(before) + 1} times: "
                        values = (
                            (last, ", ".join(before)) if option.name.startswith(OF_SETTING) else ("the last", "others")
                        )
                        typer.echo(f"{said}{values[0]} counts, and not {values[1]}", err=True)
        return rest


def _values(names: Sequence[str], args: Sequence[str]) -> list[str]:
    """What ``args`` give to an option of these ``names``, in their order."""
    found = []
    for place, arg in enumerate(args):
        name, joined, value = arg.partition("=")
        if name in names and (joined or place + 1 < len(args)):
            found.append(value if joined else args[place + 1])
    return found


class Commands(typer.Typer):
    """A group whose commands are such."""

    def command(self, name: str | None = None, **attributes: Any) -> Callable[[CommandFunction], CommandFunction]:
        return super().command(name, cls=Command, **attributes)


ARGUMENTS = "teegpu.arguments"
"""Where a command finds its own arguments, as they were given: in the ``meta`` of its context."""


WIDE = 10_000
"""Columns where nothing is to be broken."""


def result_console() -> Console:
    """A console for results, on stdout. Words that look like markup stay as they are; where there is no terminal, and
    nobody says how wide it would be, lines stay whole."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = WIDE
    return console


def message_console() -> Console:
    """A console for everything that is not a result, on stderr."""
    from rich.console import Console

    console = Console(stderr=True, markup=False, highlight=False)
    if not console.is_terminal:
        console.soft_wrap = True  # lines in a log stay whole: there is no width that they should fit
    return console


def from_transport(error: Exception) -> errors.TeegpuError | None:
    """What a transport's error means for the user, or None where ``error`` is not one."""
    # an error of that module can only exist where the module has been imported: --help need not do so
    known = sys.modules.get("transports.errors")
    if known is None or not isinstance(error, known.TransportError):
        return None
    kinds: list[tuple[Any, type[errors.TeegpuError]]] = [
        ((known.ConnectError, known.ConnectionLostError, known.ReplyTimeoutError), errors.ConnectionFailedError),
        (
            (known.UnknownTransportError, known.BadAddressError, known.BadKeyError, known.LinkSpecError),
            errors.ConfigError,
        ),
        (known.EnvelopeVersionError, errors.MismatchError),
        (known.FrameError, errors.BadReplyError),
        (known.LimitError, errors.UsageError),
    ]
    kind = next((ours for theirs, ours in kinds if isinstance(error, theirs)), errors.ConnectionFailedError)
    return kind(str(error))


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Within it, SIGTERM raises ``KeyboardInterrupt`` like Ctrl-C does, so that one way of cleaning up serves both; so
    does SIGHUP, which a terminal sends at its end, unless it is ignored (``nohup``).

    Outside of the main thread, where signals can't be handled, it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        # As SIGINT is handled now: within asyncio.run it cancels, where an exception would leave the loop in pieces.
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)
        else:
            raise KeyboardInterrupt

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            # None stands for a handler that was not installed from Python and can't be put back from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
