"""``teegpu bench shield``: what privacy and verification cost the runner."""

from __future__ import annotations

from typing import Annotated

import typer

from teegpu.cli.benchcommon import Format, Model, Offline, Out, Output, Quiet, conduct, find_folder, load_settings
from teegpu.cli.common import ConfigFile, sigterm_as_interrupt


def shield(
    model: Model = None,
    rows: Annotated[int, typer.Option(help="Tokens in a chunk of a prompt.")] = 128,
    repeats: Annotated[int, typer.Option(help="Repeats of each pass.")] = 5,
    layers: Annotated[int, typer.Option(help="Layers to measure; the others are taken to be like them.")] = 4,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="This mode only; may be given several times.", show_default="two-server, pads, lwe"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=0, help="Threads to compute with; 0: all cores.", show_default="run.threads")
    ] = None,
    offline: Offline = None,
    form: Format = "",
    out: Out = None,
    quiet: Quiet = False,
    config_file: ConfigFile = None,
) -> None:
    """Measure what hiding and verifying a token costs the runner, by mode and operation, and what is made ahead.

    Needs no server. The products themselves, computed in the TEE, stand beside it.
    """
    settings = load_settings(model, offline, {"run.threads": threads}, config_file)
    output = Output(form, out, quiet)
    with sigterm_as_interrupt():
        folder = find_folder(settings, output)
        from teegpu.bench.shield import MODES, ShieldBenchmark

        bench = ShieldBenchmark(folder, settings, rows=rows, repeats=repeats, layers=layers, modes=mode or MODES)
        conduct(bench, output)
