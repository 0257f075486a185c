"""The ``teegpu`` command: its sub-commands, loaded when they are called, and the one place where errors are printed.

``teegpu --help`` must be quick, so the sub-commands are known here by name and summary alone. A command's module is
imported when it is invoked, when its own help is asked for, or when the shell completes its options.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import teegpu
from teegpu import errors, machine
from teegpu.cli import gone, interrupts
from teegpu.cli.common import ARGUMENTS, Commands, from_transport
from teegpu.text import for_terminal
from teegpu.units import printable


@dataclass(frozen=True)
class Entry:
    """A sub-command: what top-level help says of it, and the name it has in its module ``teegpu.cli.<command>``.

    The module's object is a function with a command's parameters, or a ``typer.Typer`` with commands of its own.
    """

    summary: str
    exported: str


COMMANDS: dict[str, Entry] = {
    "run": Entry("Answer a prompt with the help of a GPU server.", "run"),
    "api": Entry("Answer OpenAI's HTTP interface, for many at once.", "api"),
    "serve": Entry("Be the GPU server: hold the weights, compute for runners.", "serve"),
    "fleet": Entry("Keep as many GPU servers as are needed on a Ray cluster.", "app"),
    "model": Entry("List, fetch, inspect and make models.", "app"),
    "report": Entry("Show where the time of a run went; compare runs.", "app"),
    "config": Entry("Show the settings in force, or write a settings file.", "app"),
    "attest": Entry("Show and verify what a TEE proves; write policies.", "app"),
    "connect": Entry("Be a local door to an endpoint that proves what it is.", "connect"),
    "keys": Entry("Make and show the keys that runners and servers know each other by.", "app"),
    "doctor": Entry("Check this machine, the model and the server.", "doctor"),
    "link": Entry("Emulate a link of given delay and bandwidth.", "link"),
    "watch": Entry("Watch a run as it goes on, or replay one that has ended.", "watch"),
    "audit": Entry("Attack what the GPU servers of a run got, and show what was recovered.", "audit"),
    "tune": Entry("Measure a server and its link, and say which settings are best.", "tune"),
    "bench": Entry("Measure plans side by side, accuracy, and what a request costs.", "app"),
}

EPILOG = (
    "Exit codes: 0 done, 1 full disk or failed cases, 2 usage or settings, 3 model or prompt, 4 no connection to the "
    "server, 5 server of another model or version, 6 refused by the server, 7 invalid message, 8 record of a run, 9 "
    "above a threshold, 10 privacy that can't be kept, 11 a server's answer is wrong, 12 evidence that is refused, 70 "
    "a bug, 130 interrupted, 141 reader of the output gone."
)


MACHINE_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE})
"""Faults of the machine rather than of the program: a full or read-only disk, no file descriptors left."""


_GARBAGE_OBJECTS = 50_000
"""So many new ones are looked through at once, in place of 700."""


class LazyGroup(TyperGroup):
    """A group whose commands are stand-ins with a name and a summary until one of them is really called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, entry in COMMANDS.items():
            self.commands[name] = TyperCommand(name, help=entry.summary, short_help=entry.summary)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        ctx.meta[ARGUMENTS] = list(rest)
        return name, load_command(name) if name in COMMANDS else command, rest


def load_command(name: str) -> TyperCommand | TyperGroup:
    """The sub-command ``name`` itself; its module is imported. Raises ``KeyError`` for a name not in ``COMMANDS``."""
    entry = COMMANDS[name]
    module: ModuleType = importlib.import_module(f"teegpu.cli.{name}")
    exported: typer.Typer | Callable[..., None] = vars(module)[entry.exported]
    if isinstance(exported, typer.Typer):
        group = typer.main.get_group(exported)
        group.name = name
        return group
    single = Commands(add_completion=False)
    single.command(name)(exported)
    command = typer.main.get_command(single)
    if not isinstance(command, TyperCommand):
        raise TypeError(f"teegpu.cli.{name}.{entry.exported} makes no command")
    return command


app = typer.Typer(
    name="teegpu",
    cls=LazyGroup,
    help="Split LLM inference: what is private is computed in a trusted process, matrix products on an untrusted GPU "
    "server.",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"teegpu {teegpu.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _teegpu(
    ctx: typer.Context,
    version: Annotated[  # noqa: ARG001 (its callback has done it all)
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), nl=False)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit code, at once: a Python that has loaded torch takes half a
    second to take itself apart. The process may hold prompts or keys, whichever command it is: nobody else is to read
    its memory."""
    machine.keep_to_itself()
    # Imports make a million objects that stay: to look through them again and again for garbage is a tenth of a start.
    gc.set_threshold(_GARBAGE_OBJECTS)
    with interrupts.heard():
        code = run(args)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # none, full, closed: nobody is left to be told
            stream.flush()
    os._exit(code)


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. What went wrong is printed to stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # its encoding may lack a character of an answer, or of ours
    for size in ("COLUMNS", "LINES"):
        if not os.environ.get(size, "unset").strip("0"):  # of a terminal without a size, where rich prints nothing
            del os.environ[size]
    try:
        # in this mode usage errors are raised to us, and an exit code, if any, is returned
        result = typer.main.get_command(app).main(args=args, prog_name="teegpu", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if sys.stdout is not None:
            sys.stdout.flush()  # a reader that went away is noticed here, not when the interpreter shuts down
        return code
    except SystemExit as stop:
        # shell completion ends this way; so does a broken pipe, which Typer turns into exit code 1 before we see it
        if isinstance(stop.__context__, BrokenPipeError):
            return _reader_gone()
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:
        return _reader_gone()
    except KeyboardInterrupt:
        interrupts.handled()
        return errors.EXIT_INTERRUPTED
    except typer.TyperException as error:
        return _usage_error(error, sys.argv[1:] if args is None else args)
    except Exception as error:  # noqa: BLE001 (whatever is left over is told as what it is: a bug)
        told = error if isinstance(error, errors.TeegpuError) else from_transport(error)
        if told is not None:
            _tell(f"teegpu: {told}")
            return told.exit_code
        if isinstance(error, OSError) and error.errno in MACHINE_FAULTS:
            return _machine_fault(error)
        if interrupts.hidden(error):
            return errors.EXIT_INTERRUPTED
        return _bug()


def _usage_error(error: typer.TyperException, args: Sequence[str]) -> int:
    context = vars(error).get("ctx")
    message = error.format_message().strip()
    if context is not None and (option := vars(error).get("option_name")) and "possibilities" in vars(error):
        shown = [param for param in context.command.params if not getattr(param, "hidden", False)]
        known = [name for param in shown for name in (*param.opts, *param.secondary_opts) if name.startswith("-")]
        message = f"there is no option {printable(option, 60)}{errors.nearest(option, known)}"
    if told := gone.told(args):
        _tell(f"teegpu: {told}")
    elif message:  # empty where a group was called without a command: its help has been printed instead
        where = context.command_path if context is not None else "teegpu"
        _tell(f"{where}: {message.rstrip('.')} (see '{where} --help')")
    return error.exit_code


def _machine_fault(error: OSError) -> int:
    where = f"{error.filename}: " if error.filename else ""
    _tell(f"teegpu: {where}{error.strerror}")
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:
            _discard(sys.stdout)
    return errors.TeegpuError.exit_code


def _bug() -> int:
    import traceback

    _tell(traceback.format_exc().rstrip())
    _tell("teegpu: this is a bug in teegpu; please report it with the lines above")
    return errors.EXIT_BUG


def _tell(line: str) -> None:
    """Print to stderr; where nobody can read it, there is nobody to tell."""
    if sys.stderr is None:
        return
    try:
        # It may quote a name on a disk, or a library that quotes one.
        sys.stderr.write((for_terminal(line) if sys.stderr.isatty() else line) + "\n")
        sys.stderr.flush()
    except BrokenPipeError:
        _discard(sys.stderr)


def _reader_gone() -> int:
    if sys.stdout is not None:
        _discard(sys.stdout)
    return errors.EXIT_BROKEN_PIPE


def _discard(stream: Any) -> None:
    """Point ``stream`` to nowhere, so that flushing what is left in it at exit can't fail once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)
