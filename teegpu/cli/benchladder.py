"""``teegpu bench ladder``, and what is made of its results: ``bench show`` and ``bench plot``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from teegpu.cli.benchcommon import (
    Device,
    Format,
    Model,
    Offline,
    Out,
    Output,
    Quiet,
    conduct,
    find_folder,
    load_settings,
)
from teegpu.cli.common import ConfigFile, sigterm_as_interrupt
from teegpu.cli.destination import Destination
from teegpu.errors import UsageError

Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Results written with --out FILE.json.")]


def ladder(
    model: Model = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, from a built-in text.")] = 1024,
    decode_tokens: Annotated[
        int, typer.Option(help="Tokens to generate after the first; slow rungs make fewer. 0: prefill alone.")
    ] = 32,
    link: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Emulate a link on all rungs: rtt=5ms,bandwidth=1gbit.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="A GPU server that is there already, in place of embedded ones.")
    ] = None,
    rungs: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Rungs with commas, such as per-op,fused; or prefill, decode, beside, baseline for all of a kind.",
            show_default="all",
        ),
    ] = "",
    repeats: Annotated[int, typer.Option(help="Repeats of each rung, after a warm-up.")] = 5,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            help="A rung whose runs have taken that long takes no more repeats; the table says how many it has.",
            show_default="no bound",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the JSON file of --out: what it has is kept. None yet: begin it."),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare the output with that of transformers in fp32.")
    ] = True,
    device: Device = None,
    offline: Offline = None,
    form: Format = "",
    out: Out = None,
    quiet: Quiet = False,
    config_file: ConfigFile = None,
) -> None:
    """Measure what each step brings, from one RPC for each product to what teegpu does now; transformers beside them.

    The rungs take turns, A B C A B C, each in a process of its own that rests while the others work. Figures are
    medians of the repeats. Ctrl-C prints what is done so far; with --out FILE.json that is kept after each step, and
    --resume goes on with it.
    """
    flags: dict[str, object] = {
        "run.link": link,
        "run.endpoints": None if endpoint is None else (endpoint,),
        "server.device": device,
    }
    settings = load_settings(model, offline, flags, config_file)
    output = Output(form, out, quiet)
    if resume and (out is None or output.form != "json"):
        raise UsageError("--resume goes on with a result in JSON: name its file with --out FILE.json")
    from teegpu.bench.rungs import chosen

    found = chosen(rungs, endpoint=bool(settings.run.endpoint), decode_tokens=decode_tokens)
    with sigterm_as_interrupt():
        folder = find_folder(settings, output)
        from teegpu.bench.ladder import LadderBenchmark

        benchmark = LadderBenchmark(
            folder,
            settings,
            found,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            repeats=repeats,
            max_seconds=math.inf if max_seconds is None else max_seconds,
            check=check,
            resume=out if resume and out is not None and out.exists() else None,
        )
        conduct(benchmark, output, keep=True)


def show(files: Files, form: Format = "", out: Out = None) -> None:
    """Show results of any of these benchmarks again, in another format."""
    output = Output(form, out, quiet=False)
    from teegpu.bench import render, saved

    if output.form in ("json", "csv") and len(files) > 1:
        raise UsageError(f"--format {output.form} is for one result: give one file")
    texts = []
    for path in files:
        document = saved.read(path)
        try:
            texts.append(render.render(document, output.form))
        except (LookupError, TypeError, ValueError, AttributeError):
            raise saved.damaged(path) from None
    Destination(out, force=True).write("\n".join(texts))


def plot(
    files: Files,
    phase: Annotated[str, typer.Option(help="prefill or decode.")] = "prefill",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the SVG there, not to standard output.")
    ] = None,
) -> None:
    """Draw results of 'bench ladder' as one SVG: a row for each rung, a column for each file, so for each link."""
    destination = Destination(out, force=True)
    from teegpu.bench import ladderplot, saved

    panels = []
    for path in files:
        document = saved.read(path, "ladder")
        try:
            panels.append(ladderplot.Panel.read(document, phase))
        except (LookupError, TypeError, ValueError, AttributeError):
            raise saved.damaged(path) from None
    destination.write(ladderplot.plot(panels, phase))
