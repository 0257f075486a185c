"""``teegpu run``: answer a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from teegpu import facts
from teegpu.cli.answering import Answering, Output
from teegpu.cli.common import ARGUMENTS, ConfigFile, message_console, sigterm_as_interrupt
from teegpu.cli.flags import Flags, takes_settings
from teegpu.cli.prompts import Prompts
from teegpu.errors import UsageError
from teegpu.monitor.feed import FeedWriter
from teegpu.settings import INPUT, OUTPUT, SAMPLING

if TYPE_CHECKING:
    from teegpu.config import Config


@takes_settings("run")
def run(
    context: typer.Context,
    *,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; '-' reads standard input. A pipe is joined to it.", show_default=False),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.", rich_help_panel=INPUT)] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="No chat template: continue the text.", rich_help_panel=INPUT)
    ] = False,
    prompts_file: Annotated[
        Path | None, typer.Option(help="One prompt a line; a common beginning is computed once.", rich_help_panel=INPUT)
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="A prompt of exactly N tokens, cut from --text-file or a built-in text.", rich_help_panel=INPUT
        ),
    ] = None,
    text_file: Annotated[Path | None, typer.Option(help="Text for --prompt-tokens.", rich_help_panel=INPUT)] = None,
    flags: Flags,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end token (for benchmarks).", rich_help_panel=SAMPLING)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the run as one JSON document.", rich_help_panel=OUTPUT)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="The text and errors only.", rich_help_panel=OUTPUT)
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="End with the whole report.", rich_help_panel=OUTPUT)
    ] = False,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Watch it as it happens; the text is printed at the end.", rich_help_panel=OUTPUT),
    ] = False,
    feed: Annotated[
        int | None, typer.Option(help="Where a run that is watched tells its text.", hidden=True, show_default=False)
    ] = None,
    config_file: ConfigFile = None,
) -> None:
    """Answer a prompt; the text goes to stdout, everything else to stderr."""
    from teegpu import config, machine

    if flags["record.save_text"] and flags["record.keep"] is False:
        raise UsageError("--save-text would keep the text in the record, and --no-record keeps none: leave one out")
    if flags["run.note"] is not None:
        flags["run.note"] = " ".join(flags["run.note"].split())
    settings = config.load(flags, config_file)
    _check(settings)
    machine.share_cores(alone=_local(settings))
    prompts = Prompts(prompt, system, raw, prompts_file, prompt_tokens, text_file)
    prompts.check()
    _check_embedded(settings, {"--device": flags["server.device"], "--dtype": flags["server.dtype"]})
    _prepare_stdout()
    if quiet and verbose:
        raise UsageError("--quiet and --verbose are opposites: give one of them")
    if watch and feed is None:
        _watch(settings, context.meta[ARGUMENTS], prompts, quiet)
    watched = FeedWriter(feed) if feed is not None else None
    with sigterm_as_interrupt():
        Answering(settings, prompts, Output(as_json, quiet, verbose, ignore_eos, watched)).go()


def _check(settings: Config) -> None:
    """What can't be is said before torch is loaded, and before there is a record of it."""
    from teegpu.cli.models import check_draft
    from teegpu.shield import modes

    modes.check(settings)
    check_draft(settings)


def _watch(settings: Config, arguments: list[str], prompts: Prompts, quiet: bool) -> NoReturn:
    """The run as a process of its own, and the monitor here."""
    from teegpu.cli.watching import check_theme, watch_run

    check_theme(settings)
    typed = None
    if prompts.prompt == "-" and sys.stdin is not None and sys.stdin.isatty():
        message_console().print("type the prompt, and end it with Ctrl-D on a line of its own")
        typed = sys.stdin.buffer.read()
    raise typer.Exit(watch_run(settings, arguments, typed=typed, quiet=quiet))


def _local(settings: Config) -> bool:
    return facts.all_local(settings.run.prefill_plan, settings.run.decode_plan)


def _check_embedded(settings: Config, flags: dict[str, str | None]) -> None:
    """Raises ``UsageError`` for flags of the embedded server in a run that has none: they would do nothing."""
    given = [name for name, value in flags.items() if value is not None]
    if not given:
        return
    run = settings.run
    told = f"{' and '.join(given)} would be for the embedded server, and this run starts none"
    if run.endpoint:
        raise UsageError(f"{told}: run.endpoints names {run.endpoint}, so give it to 'teegpu serve' there")
    if _local(settings):
        raise UsageError(f"{told}: the plan 'local' computes in the runner, in fp32")
    if not facts.privacy(run.privacy).servers:
        raise UsageError(f"{told}: privacy '{run.privacy}' computes in the runner, in whole numbers")


def _prepare_stdout() -> None:
    if sys.stdout is None:
        raise UsageError("standard output is closed: there is nowhere to write the answer")
