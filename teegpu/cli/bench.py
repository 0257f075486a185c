"""``teegpu bench``: measurements of this machine, side by side. Results go to stdout or a file, progress to stderr."""

from __future__ import annotations

from typing import Annotated

import typer

from teegpu.cli import benchladder, benchlink, benchshield
from teegpu.cli.benchcommon import Device, Format, Model, Offline, Out, Quiet
from teegpu.cli.benchcommon import Output as _Output
from teegpu.cli.benchcommon import conduct as _conduct
from teegpu.cli.benchcommon import find_folder as _folder
from teegpu.cli.benchcommon import load_settings as _settings
from teegpu.cli.common import ConfigFile, sigterm_as_interrupt
from teegpu.errors import ThresholdError

app = typer.Typer(
    help="Measure plans side by side, the accuracy of narrow dtypes, and what a request costs.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def plans(
    model: Model = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, from a built-in text.")] = 1024,
    decode_tokens: Annotated[int, typer.Option(help="Tokens to generate after the first; 0: prefill alone.")] = 32,
    repeats: Annotated[int, typer.Option(help="Repeats of each case, after a warm-up.")] = 5,
    link: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Emulate a link in all cases: rtt=5ms,bandwidth=1gbit.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="A GPU server that is there already, in place of embedded ones.")
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CASE",
            help="What to measure, such as fused,transport=pipelined,wire=fp16,dtype=bf16,chunk=128,speculate=4; or "
            "transformers,dtype=bf16; or default, for what is measured without this option. Give it several times.",
        ),
    ] = None,
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
    """Measure plans, transports and wire dtypes side by side, transformers beside them.

    The cases take turns, A B C A B C, each in a process of its own that rests while the others work. Figures are
    medians of the repeats. Ctrl-C prints what is done so far.
    """
    flags: dict[str, object] = {
        "run.link": link,
        "run.endpoints": None if endpoint is None else (endpoint,),
        "server.device": device,
    }
    settings = _settings(model, offline, flags, config_file)
    output = _Output(form, out, quiet)
    from teegpu.bench.cases import parse_all

    cases = parse_all(case or [], settings)
    with sigterm_as_interrupt():
        folder = _folder(settings, output)
        from teegpu.bench.plans import PlanBenchmark

        _conduct(
            PlanBenchmark(
                folder,
                settings,
                cases,
                prompt_tokens=prompt_tokens,
                decode_tokens=decode_tokens,
                repeats=repeats,
                check=check,
            ),
            output,
        )


@app.command()
def accuracy(
    model: Model = None,
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
    device: Device = None,
    offline: Offline = None,
    form: Format = "",
    out: Out = None,
    quiet: Quiet = False,
    config_file: ConfigFile = None,
) -> None:
    """Compare the logits of each wire dtype with those of transformers in fp32, on real text.

    The plan is fused, the server a process of its own; for private runs the plan is attention, and their whole numbers
    are computed here, to the same bits. KL divergence is in nats, the mean over all positions.
    """
    settings = _settings(model, offline, {"server.device": device}, config_file)
    output = _Output(form, out, quiet)
    with sigterm_as_interrupt():
        folder = _folder(settings, output)
        from teegpu.bench.accuracy import AccuracyBenchmark, chosen_texts

        chosen = chosen_texts(text_names)
        _conduct(
            AccuracyBenchmark(folder, settings, tokens=tokens, chosen=chosen, bf16=bf16, shielded=shielded), output
        )


@app.command()
def overhead(
    model: Model = None,
    rounds: Annotated[int, typer.Option(help="How often each of the two programs is sent.")] = 2000,
    transport: Annotated[str, typer.Option(help="zmq, zmq+zstd, pipelined or pipelined+zstd.")] = "zmq",
    wire_dtype: Annotated[str | None, typer.Option(help="auto, fp32, bf16, fp16 or int8.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the server.", show_default=False)] = None,
    device: Device = None,
    offline: Offline = None,
    form: Format = "",
    out: Out = None,
    quiet: Quiet = False,
    config_file: ConfigFile = None,
) -> None:
    """Measure what an RPC of a decode step costs beyond computation and the bare exchange of its bytes."""
    flags = {
        "run.transport": transport,
        "run.wire_dtype": wire_dtype,
        "server.dtype": dtype,
        "server.device": device,
    }
    settings = _settings(model, offline, flags, config_file)
    output = _Output(form, out, quiet)
    with sigterm_as_interrupt():
        folder = _folder(settings, output)
        from teegpu.bench.overhead import OverheadBenchmark

        _conduct(OverheadBenchmark(folder, settings, rounds=rounds), output)


@app.command()
def soak(
    model: Model = None,
    clients: Annotated[int, typer.Option(help="Clients at once.")] = 8,
    minutes: Annotated[float, typer.Option(help="How long.")] = 10.0,
    greedy: Annotated[
        int | None, typer.Option(help="Greedy clients among them.", show_default="a quarter of them")
    ] = None,
    device: Device = None,
    offline: Offline = None,
    form: Format = "",
    out: Out = None,
    quiet: Quiet = False,
    config_file: ConfigFile = None,
) -> None:
    """Leave a server no rest: many clients, some of them greedy, while its memory and its fairness are watched.

    Exits with 9 where its memory grew by more than 5 %, a client got on twice as fast as another of its kind, or
    something was left open.
    """
    settings = _settings(model, offline, {"server.device": device}, config_file)
    output = _Output(form, out, quiet)
    with sigterm_as_interrupt():
        folder = _folder(settings, output)
        from teegpu.bench.soak import SoakBenchmark

        chosen = clients // 4 if greedy is None else greedy
        bench = SoakBenchmark(folder, settings, clients=clients, seconds=minutes * 60, greedy=chosen)
        _conduct(bench, output)
    if bench.breaches:
        raise ThresholdError("; ".join(bench.breaches))


@app.command()
def recording(
    model: Model = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, from a built-in text.")] = 512,
    decode_tokens: Annotated[int, typer.Option(help="Tokens to generate after the first.")] = 64,
    pairs: Annotated[int, typer.Option(help="Runs with a record, and as many without, after a warm-up.")] = 10,
    transport: Annotated[
        str | None, typer.Option(help="zmq, zmq+zstd, pipelined or pipelined+zstd.", show_default=False)
    ] = None,
    link: Annotated[str | None, typer.Option(metavar="SPEC", help="Emulate a link: rtt=5ms,bandwidth=1gbit.")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="A GPU server that is there already, in place of an embedded one.")
    ] = None,
    device: Device = None,
    offline: Offline = None,
    form: Format = "",
    out: Out = None,
    quiet: Quiet = False,
    config_file: ConfigFile = None,
) -> None:
    """Measure what it costs a run to be recorded: with a record and without, in pairs."""
    flags: dict[str, object] = {
        "run.link": link,
        "run.transport": transport,
        "run.endpoints": None if endpoint is None else (endpoint,),
        "server.device": device,
    }
    settings = _settings(model, offline, flags, config_file)
    output = _Output(form, out, quiet)
    with sigterm_as_interrupt():
        folder = _folder(settings, output)
        from teegpu.bench.recording import RecordingBenchmark

        _conduct(
            RecordingBenchmark(folder, settings, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, pairs=pairs),
            output,
        )


@app.command()
def watch(
    model: Model = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, from a built-in text.")] = 512,
    decode_tokens: Annotated[int, typer.Option(help="Tokens to generate after the first.")] = 64,
    pairs: Annotated[int, typer.Option(help="Runs that are watched, and as many that are not.")] = 10,
    transport: Annotated[
        str | None, typer.Option(help="zmq, zmq+zstd, pipelined or pipelined+zstd.", show_default=False)
    ] = None,
    link: Annotated[str | None, typer.Option(metavar="SPEC", help="Emulate a link: rtt=5ms,bandwidth=1gbit.")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="A GPU server that is there already, in place of an embedded one.")
    ] = None,
    device: Device = None,
    offline: Offline = None,
    form: Format = "",
    out: Out = None,
    quiet: Quiet = False,
    config_file: ConfigFile = None,
) -> None:
    """Measure what it costs a run to be watched: with a monitor and without, in pairs; and what the monitor costs."""
    flags: dict[str, object] = {
        "run.link": link,
        "run.transport": transport,
        "run.endpoints": None if endpoint is None else (endpoint,),
        "server.device": device,
    }
    settings = _settings(model, offline, flags, config_file)
    output = _Output(form, out, quiet)
    with sigterm_as_interrupt():
        folder = _folder(settings, output)
        from teegpu.bench.watching import WatchBenchmark

        _conduct(
            WatchBenchmark(folder, settings, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, pairs=pairs),
            output,
        )


@app.command()
def replay(
    model: Model = None,
    hours: Annotated[float, typer.Option(help="How long the run was.")] = 1.0,
    tokens: Annotated[int, typer.Option(help="Tokens that it generated.")] = 36_000,
    speed: Annotated[float, typer.Option(help="Replay so many times as quickly; 0: at once.")] = 30.0,
    device: Device = None,
    offline: Offline = None,
    form: Format = "",
    out: Out = None,
    quiet: Quiet = False,
    config_file: ConfigFile = None,
) -> None:
    """Show that the monitor's memory stays flat: it replays a long run, made from a short one's events.

    Exits with 9 where its memory grew by more than 8 MiB after the first tenth.
    """
    settings = _settings(model, offline, {"server.device": device}, config_file)
    output = _Output(form, out, quiet)
    with sigterm_as_interrupt():
        folder = _folder(settings, output)
        from teegpu.bench.replay import ReplayBenchmark

        bench = ReplayBenchmark(folder, settings, hours=hours, tokens=tokens, speed=speed)
        _conduct(bench, output)
    if bench.breaches:
        raise ThresholdError("; ".join(bench.breaches))


@app.command()
def accounting(
    model: Model = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, from a built-in text.")] = 1024,
    decode_tokens: Annotated[int, typer.Option(help="Tokens to generate after the first.")] = 32,
    chunk_tokens: Annotated[int, typer.Option(help="Tokens of a chunk, where chunks overlap.")] = 128,
    plan: Annotated[
        list[str] | None, typer.Option(help="This plan only; may be given several times.", show_default="all")
    ] = None,
    transport: Annotated[
        list[str] | None, typer.Option(help="This transport only; may be given several times.", show_default="all")
    ] = None,
    link: Annotated[str | None, typer.Option(metavar="SPEC", help="Emulate a link: rtt=5ms,bandwidth=1gbit.")] = None,
    device: Device = None,
    offline: Offline = None,
    form: Format = "",
    out: Out = None,
    quiet: Quiet = False,
    config_file: ConfigFile = None,
) -> None:
    """Check that the times add up: for each plan and transport, the sum of a phase's parts over its wall time."""
    settings = _settings(model, offline, {"run.link": link, "server.device": device}, config_file)
    output = _Output(form, out, quiet)
    with sigterm_as_interrupt():
        folder = _folder(settings, output)
        from teegpu.bench.accounting import LINKED_TRANSPORTS, AccountingBenchmark
        from teegpu.settings import PLANS

        _conduct(
            AccountingBenchmark(
                folder,
                settings,
                prompt_tokens=prompt_tokens,
                decode_tokens=decode_tokens,
                chunk_tokens=chunk_tokens,
                plans=plan or PLANS,
                transports=transport or LINKED_TRANSPORTS,
            ),
            output,
        )


app.command()(benchlink.link)
app.command()(benchlink.transports)
app.command()(benchlink.codec)
app.command()(benchlink.curve)
app.command()(benchladder.ladder)
app.command()(benchladder.show)
app.command()(benchladder.plot)
app.command()(benchshield.shield)
