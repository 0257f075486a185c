"""``teegpu audit``: what can a GPU server make of what it gets?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teegpu import facts
from teegpu.cli import interrupts
from teegpu.cli.common import ConfigFile, message_console, sigterm_as_interrupt
from teegpu.cli.destination import Destination
from teegpu.cli.flags import Flags, takes_settings
from teegpu.cli.prompts import Prompts
from teegpu.errors import ThresholdError, UsageError
from teegpu.facts import AUTO
from teegpu.settings import INPUT, OUTPUT

if TYPE_CHECKING:
    from teegpu.audit.examine import Report
    from teegpu.config import Config
    from teegpu.model.tokenizer import Tokenizer

PLAN, SHIELDED_PLAN = facts.FUSED.name, facts.ATTENTION.name
"""What is audited where the settings leave the plan to the runner: in the clear, and in whole numbers."""

PROMPT_TOKENS = 64
"""Of the built-in text, where no prompt is given."""


@takes_settings("audit")
def audit(
    *,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; '-' reads standard input. Without one, a built-in text.", show_default=False),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help=f"A prompt of exactly N tokens, cut from --text-file or a built-in text; {PROMPT_TOKENS} where no "
            "prompt is given.",
            rich_help_panel=INPUT,
            show_default=False,
        ),
    ] = None,
    text_file: Annotated[Path | None, typer.Option(help="Text for --prompt-tokens.", rich_help_panel=INPUT)] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="No chat template: continue the text.", rich_help_panel=INPUT)
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1, rich_help_panel=INPUT)] = 16,
    training_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens of another text that the attacker knows, and learns from.", min=1, rich_help_panel=INPUT
        ),
    ] = 512,
    flags: Flags,
    lies: Annotated[
        bool, typer.Option("--lies/--no-lies", help="Also try servers that lie, once for each way.")
    ] = True,
    keep_mib: Annotated[int, typer.Option(help="MiB of messages to keep in memory at most.", min=1)] = 2048,
    show_text: Annotated[
        bool,
        typer.Option("--show-text", help="Also print the text that each attack recovered.", rich_help_panel=OUTPUT),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel=OUTPUT)] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write to this file, in place of standard output.", rich_help_panel=OUTPUT)
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="The result and errors only.", rich_help_panel=OUTPUT)
    ] = False,
    expect_private: Annotated[
        bool,
        typer.Option(
            "--expect-private",
            help="Exit with 9 where anything was found in what a server got.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    expect_verified: Annotated[
        bool, typer.Option("--expect-verified", help="Exit with 9 where a lie went unnoticed.", rich_help_panel=OUTPUT)
    ] = False,
    config_file: ConfigFile = None,
) -> None:
    """Run a prompt, attack what the GPU servers got, and show what was recovered.

    The run is an ordinary one, on real servers. Nothing of it is kept: no record, no messages. The result holds no text
    unless --show-text asks for it. Exits with 0 whatever is found, unless it is told what to expect.
    """
    from teegpu import config, machine
    from teegpu.options import whole_numbers

    flags |= {
        "run.max_tokens": max_tokens,
        # Each scene is computed whole and alike, or there would be nothing to compare.
        "run.prefix_cache_mib": 0,
        "run.speculate": 0,
        "sampling.temperature": 0.0,
    }
    machine.share_cores()
    settings = config.load(flags, config_file)
    for key in ("run.prefill_plan", "run.decode_plan"):
        if settings.values()[key] == AUTO:
            # What is quickest may be to send nothing, and there would be nothing to look at.
            flags[key] = SHIELDED_PLAN if whole_numbers(settings) else PLAN
    settings = config.load(flags, config_file)
    if expect_verified and not lies:
        raise UsageError("--expect-verified needs lies to be told: leave out --no-lies")
    if prompt is None and prompt_tokens is None:
        prompt_tokens = PROMPT_TOKENS
    prompts = Prompts(prompt, None, raw, None, prompt_tokens, text_file)
    prompts.check()
    destination = Destination(out, force=True, quiet=quiet)
    console = message_console()

    def say(line: str) -> None:
        if not quiet:
            console.print(line, soft_wrap=True)

    with sigterm_as_interrupt():
        text = prompts.read(say)
        report, text_of = _examine(
            settings,
            lambda tokenizer: prompts.encode(tokenizer, text)[0],
            training_tokens=training_tokens,
            most_bytes=keep_mib * 2**20,
            lies=lies,
            say=say,
            quiet=quiet,
        )
    document = report.to_json(text_of if show_text else None)
    destination.write(_rendered(document, as_json=as_json))
    sys.stdout.flush()
    _hold_to(report, private=expect_private, verified=expect_verified)


def _examine(
    settings: Config,
    prompt: Callable[[Tokenizer], list[int]],
    *,
    training_tokens: int,
    most_bytes: int,
    lies: bool,
    say: Callable[[str], None],
    quiet: bool,
) -> tuple[Report, Callable[[Sequence[int]], str]]:
    from teegpu.cli.models import find_model

    folder = find_model(settings, quiet=quiet)
    with interrupts.kept():
        from teegpu.audit.examine import Audit

    audit = Audit(
        folder, settings, prompt, training_tokens=training_tokens, most_bytes=most_bytes, lies=lies, notify=say
    )
    return audit.run(), audit.text_of


def _rendered(document: dict[str, Any], *, as_json: bool) -> str:
    from teegpu import formats
    from teegpu.audit import tables

    return formats.as_json(document) if as_json else tables.render(document)


def _hold_to(report: Report, *, private: bool, verified: bool) -> None:
    """Raises ``ThresholdError`` where what was expected is not so."""
    broken = []
    if private and not report.private:
        found = [finding for finding in report.findings if not finding.control and finding.alarming]
        names = ", ".join(dict.fromkeys(finding.attack for finding in found))
        broken.append(f"what the servers got is not private ({names})")
    if verified and not report.verified:
        missed = ", ".join(cheat.kind for cheat in report.cheats if cheat.told is not None and not cheat.noticed)
        broken.append(f"lies went unnoticed ({missed or 'none could be told'})")
    if broken:
        raise ThresholdError("; ".join(broken))
