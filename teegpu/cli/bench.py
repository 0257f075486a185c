"""``teegpu bench``: measurements of this machine, side by side. Results go to stdout or a file, progress to stderr."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from teegpu.cli import interrupts
from teegpu.cli.benchcommon import Output, Shared, benchmark, conduct
from teegpu.cli.common import Commands, sigterm_as_interrupt
from teegpu.cli.destination import Destination
from teegpu.errors import UsageError

app = Commands(
    help="Measure what each step brings on this machine and link, the link, accuracy, and what privacy costs.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
@benchmark
def ladder(
    shared: Shared,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, from a built-in text.")] = 1024,
    decode_tokens: Annotated[
        int, typer.Option(help="Tokens to generate after the first; slow rungs make fewer. 0: prefill alone.")
    ] = 32,
    endpoint: Annotated[
        str | None, typer.Option(help="A GPU server that is there already, in place of embedded ones.")
    ] = None,
    rungs: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Rungs with commas, such as per-op,fused; or prefill, decode, beside, baseline for all of a kind.",
            show_default="all; none with --case",
        ),
    ] = "",
    case: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CASE",
            help="Measure this, such as fused,transport=pipelined,wire=fp16,dtype=bf16,chunk=128,speculate=4; or "
            "transformers,dtype=bf16; or default, for one of each plan. Give it several times.",
        ),
    ] = None,
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
    saved: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Measure nothing, but show this result of --out FILE.json; or several of them.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg", help="Draw the result: a row for each rung, a column for each --from."),
    ] = None,
    phase: Annotated[str, typer.Option(help="What --plot draws: prefill or decode.")] = "prefill",
) -> None:
    """Measure what each step brings, from one RPC for each product to what teegpu does now; transformers beside them.

    With --case, measure plans, transports and wire dtypes of your choice side by side. All take turns, A B C A B C,
    each in a process of its own that rests while the others work. Figures are medians of the repeats. Ctrl-C prints
    what is done so far; with --out FILE.json that is kept after each step, and --resume goes on with it.
    """
    output = shared.output()
    picture = None if plot is None else _Picture(plot, phase, quiet=shared.quiet)
    if saved:
        for flag, given in (
            ("--rungs", rungs),
            ("--case", case),
            ("--link", shared.flags["run.link"]),
            ("--resume", resume),
        ):
            if given:
                raise UsageError(f"--from shows what was measured: leave {flag} out")
        _show(saved, output, picture)
        return
    if resume and (shared.out is None or output.form != "json"):
        raise UsageError("--resume goes on with a result in JSON: name its file with --out FILE.json")
    settings = shared.settings({"run.endpoints": None if endpoint is None else (endpoint,)})
    from teegpu.bench.cases import parse_all
    from teegpu.bench.rungs import Rung, chosen

    found = [Rung.of(each) for each in parse_all(case or [], settings)]
    if rungs or not found:
        found = [*chosen(rungs, endpoint=bool(settings.run.endpoint), decode_tokens=decode_tokens), *found]
    with sigterm_as_interrupt():
        folder = shared.folder(settings)
        with interrupts.kept():
            from teegpu.bench.ladder import LadderBenchmark

        measured = LadderBenchmark(
            folder,
            settings,
            found,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            repeats=repeats,
            max_seconds=math.inf if max_seconds is None else max_seconds,
            check=check,
            resume=shared.out if resume and shared.out is not None and shared.out.exists() else None,
        )
        conduct(measured, output, keep=True)
    if picture is not None:
        picture.draw([measured.document("complete")])


class _Picture:
    """Where the SVG goes. Raises ``UsageError`` at once for a phase and a place that can't be."""

    def __init__(self, path: Path, phase: str, *, quiet: bool) -> None:
        from teegpu.bench import plot

        plot.check_phase(phase)
        self._phase = phase
        self._destination = Destination(path, force=True, quiet=quiet)

    def draw(self, documents: Sequence[Mapping[str, Any]]) -> None:
        from teegpu.bench import plot

        panels = [plot.Panel.read(document, self._phase) for document in documents]
        self._destination.write(plot.plot(panels, self._phase))


def _show(files: Sequence[Path], output: Output, picture: _Picture | None) -> None:
    from teegpu.bench import document

    if output.form in ("json", "csv") and len(files) > 1:
        raise UsageError(f"--format {output.form} is for one result: give one file")
    documents = [document.read(path, "ladder") for path in files]
    try:
        output.write(*documents)
        if picture is not None:
            picture.draw(documents)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise document.damaged(*files) from None


@app.command()
@benchmark
def link(
    shared: Shared,
    endpoint: Annotated[
        str | None,
        typer.Option(help="The GPU server to measure the link to; without it, an embedded server on this machine."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Round trips.")] = 200,
    transfers: Annotated[int, typer.Option(help="Large messages each way.")] = 10,
    seconds: Annotated[float, typer.Option(help="Time after which a slow link is measured by less.")] = 60.0,
) -> None:
    """Measure the link to a GPU server: round-trip time, and bandwidth each way.

    It sends what any server answers, whatever model it holds; with --model the server has to hold that one. The result
    ends with the link as --link of other commands takes it.
    """
    settings = shared.settings({"run.endpoints": None if endpoint is None else (endpoint,)})
    output = shared.output()
    with sigterm_as_interrupt():
        needs_model = shared.flags["model.name"] is not None or not settings.run.endpoint
        folder = shared.folder(settings) if needs_model else None
        with interrupts.kept():
            from teegpu.bench.link import LinkBenchmark

        conduct(LinkBenchmark(settings, folder, rounds=rounds, transfers=transfers, seconds=seconds), output)


@app.command()
@benchmark
def accuracy(
    shared: Shared,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 1024,
    text_names: Annotated[
        str, typer.Option("--texts", metavar="NAMES", help="all, or names of built-in texts with commas.")
    ] = "all",
    bf16: Annotated[
        bool, typer.Option("--bf16/--no-bf16", help="Also a server in bf16, and transformers in bf16.")
    ] = True,
    shielded: Annotated[
        bool, typer.Option("--shielded/--no-shielded", help="Also what runs with --privacy compute.")
    ] = True,
    int8: Annotated[bool, typer.Option("--int8/--no-int8", help="Also int8 weights, a row at a time.")] = True,
) -> None:
    """Compare the logits of each wire dtype with those of transformers in fp32, on real text.

    The plan is fused, the server a process of its own; for private runs the plan is attention, and their whole numbers
    are computed here, to the same bits. KL divergence is in nats, the mean over all positions.
    """
    settings = shared.settings()
    output = shared.output()
    with sigterm_as_interrupt():
        folder = shared.folder(settings)
        with interrupts.kept():
            from teegpu.bench.accuracy import AccuracyBenchmark, chosen_texts

        chosen = chosen_texts(text_names)
        measured = AccuracyBenchmark(
            folder, settings, tokens=tokens, chosen=chosen, bf16=bf16, shielded=shielded, int8=int8
        )
        conduct(measured, output)


@app.command()
@benchmark
def shield(
    shared: Shared,
    rows: Annotated[int, typer.Option(help="Tokens in a chunk of a prompt.")] = 128,
    batch: Annotated[int, typer.Option(help="Sequences that generate a token in one step.")] = 16,
    repeats: Annotated[int, typer.Option(help="Repeats of each pass.")] = 5,
    layers: Annotated[int, typer.Option(help="Layers to measure; the others are taken to be like them.")] = 4,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="This mode only; may be given several times.", show_default="all"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=0, help="Threads to compute with; 0: all cores.", show_default="run.threads")
    ] = None,
) -> None:
    """Measure what hiding and verifying a token costs the runner, by mode and operation, and what is made ahead.

    Needs no server. The products themselves, computed in the TEE, stand beside it; leverage is their processor time
    over that of what the runner does in their place.
    """
    settings = shared.settings({"run.threads": threads})
    output = shared.output()
    with sigterm_as_interrupt():
        folder = shared.folder(settings)
        with interrupts.kept():
            from teegpu.bench.shield import MODES, ShieldBenchmark

        conduct(
            ShieldBenchmark(
                folder, settings, rows=rows, batch=batch, repeats=repeats, layers=layers, modes=mode or MODES
            ),
            output,
        )


@app.command()
def serve(
    url: Annotated[str, typer.Option(help="The endpoint.")] = "http://127.0.0.1:8000",
    clients: Annotated[str, typer.Option(help="How many at once; several numbers with commas.")] = "1,16,32",
    requests: Annotated[int, typer.Option(min=1, help="Requests of each client.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, about.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    model: Annotated[str, typer.Option(help="The model to ask for.", show_default="the first it offers")] = "",
    key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="The API key.", show_default=False)] = "",
    ca: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate to trust, for https.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Put a load on an endpoint with OpenAI's interface, 'teegpu api' or another: throughput and latencies.

    Each client asks, reads the stream to its end, and asks again.
    """
    import asyncio
    import json
    import ssl

    from teegpu.bench import load
    from teegpu.cli.common import message_console, result_console
    from teegpu.formats import aligned

    try:
        counts = [int(part) for part in clients.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UsageError(f"--clients {clients!r} is not a list of numbers such as 1,16,32")
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--url {url!r} is not http://host:port or https://host:port")
    context = None if ca is None else ssl.create_default_context(cafile=str(ca))
    wanted = load.Load(url, model, prompt_tokens, max_tokens, key, context)
    with sigterm_as_interrupt():
        wanted = replace(wanted, model=model or asyncio.run(load.model_of(wanted)))
        asyncio.run(load.run(replace(wanted, max_tokens=2), 1, 1))  # the first request makes kernels and buffers
        results: list[dict[str, Any]] = []
        asked = 1
        for count in counts:
            if not quiet:
                message_console().print(f"{count} client{'s' * (count != 1)}")
            took, seconds = asyncio.run(load.run(wanted, count, count * requests, asked))
            asked += count * requests
            results.append(load.figures(count, took, seconds))
    if as_json:
        document = {"url": url, "model": wanted.model, "prompt_tokens": prompt_tokens, "max_tokens": max_tokens}
        typer.echo(json.dumps(document | {"results": results}, indent=2))
    else:
        result_console().print(aligned(load.rows(results)), end="", soft_wrap=True)
    errors = [error for result in results for error in result["errors"]]
    if errors:
        message_console().print(f"some requests failed: {'; '.join(sorted(set(errors)))}")
