"""The commands of ``teegpu bench`` that measure the way between runner and server rather than runs."""

from __future__ import annotations

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

LinkSpecOption = Annotated[
    str | None, typer.Option("--link", metavar="SPEC", help="Emulate a link: rtt=5ms,bandwidth=1gbit.")
]
Sizes = Annotated[
    list[int] | None,
    typer.Option(
        "--size",
        metavar="BYTES",
        help="Bytes up, and as many down; may be given several times.",
        show_default="1 KiB to 8 MiB",
    ),
]
ServerKey = Annotated[
    str | None,
    typer.Option("--server-key", help="The public key that the server must prove to have: name or file."),
]
ClientKey = Annotated[str | None, typer.Option("--client-key", help="The key pair of this side: name or file.")]


def link(
    model: Model = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="The GPU server to measure the link to; without it, an embedded server on this machine."),
    ] = None,
    link_spec: LinkSpecOption = None,
    rounds: Annotated[int, typer.Option(help="Round trips.")] = 200,
    transfers: Annotated[int, typer.Option(help="Large messages each way.")] = 10,
    seconds: Annotated[float, typer.Option(help="Time after which a slow link is measured by less.")] = 60.0,
    server_key: ServerKey = None,
    client_key: ClientKey = None,
    device: Device = None,
    offline: Offline = None,
    form: Format = "",
    out: Out = None,
    quiet: Quiet = False,
    config_file: ConfigFile = None,
) -> None:
    """Measure the link to a GPU server: round-trip time, and bandwidth each way.

    It sends what any server answers, whatever model it holds; with --model the server has to hold that one. The result
    ends with the link as --link of other commands takes it.
    """
    flags: dict[str, object] = {
        "run.link": link_spec,
        "run.endpoints": None if endpoint is None else (endpoint,),
        "link.server_key": server_key,
        "link.client_key": client_key,
        "server.device": device,
    }
    settings = load_settings(model, offline, flags, config_file)
    output = Output(form, out, quiet)
    with sigterm_as_interrupt():
        needs_model = model is not None or not settings.run.endpoint
        folder = find_folder(settings, output) if needs_model else None
        from teegpu.bench.link import LinkBenchmark

        conduct(LinkBenchmark(settings, folder, rounds=rounds, transfers=transfers, seconds=seconds), output)


def transports(
    rounds: Annotated[int, typer.Option(help="How often each size is sent each way.")] = 20,
    size: Sizes = None,
    transport: Annotated[
        list[str] | None, typer.Option(help="This transport only; may be given several times.", show_default="all")
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            help="tcp or ipc: this kind of address only; may be given several times.",
            show_default="both; over a link tcp",
        ),
    ] = None,
    link_spec: LinkSpecOption = None,
    form: Format = "",
    out: Out = None,
    quiet: Quiet = False,
    config_file: ConfigFile = None,
) -> None:
    """Measure the transports: round trip and throughput by size, with keys and without, bare zmq beside them.

    Needs no model. The far side is a process of its own, but for inprocess, the floor.
    """
    settings = load_settings(None, None, {"run.link": link_spec}, config_file)
    output = Output(form, out, quiet)
    with sigterm_as_interrupt():
        from teegpu.bench.carriers import TransportBenchmark
        from teegpu.bench.exchanges import SIZES
        from teegpu.settings import TRANSPORTS

        bench = TransportBenchmark(
            settings, rounds=rounds, sizes=size or SIZES, names=transport or TRANSPORTS, over=over or ()
        )
        conduct(bench, output)


def codec(
    model: Model = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt whose activations are taken.")] = 256,
    repeats: Annotated[int, typer.Option(help="Repeats, after a warm-up.")] = 5,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--activations",
            metavar="KIND",
            help="residual, qkv, attended, gate+up, mlp, hidden, scores or probabilities; may be given several times.",
            show_default="all",
        ),
    ] = None,
    wire_dtype: Annotated[
        list[str] | None, typer.Option(help="fp32, bf16, fp16 or int8; may be given several times.", show_default="all")
    ] = None,
    level: Annotated[
        list[int] | None, typer.Option(help="Level of zstd; may be given several times.", show_default="1 and 3")
    ] = None,
    device: Device = None,
    offline: Offline = None,
    form: Format = "",
    out: Out = None,
    quiet: Quiet = False,
    config_file: ConfigFile = None,
) -> None:
    """Measure wire dtypes and zstd on the model's own activations: speed, bytes, error, and where zstd pays."""
    settings = load_settings(model, offline, {"server.device": device}, config_file)
    output = Output(form, out, quiet)
    with sigterm_as_interrupt():
        folder = find_folder(settings, output)
        from teegpu.bench.activations import NAMES
        from teegpu.bench.codec import LEVELS, CodecBenchmark
        from teegpu.settings import WIRE_DTYPES

        bench = CodecBenchmark(
            folder,
            settings,
            prompt_tokens=prompt_tokens,
            repeats=repeats,
            kinds=kind or NAMES,
            wire_dtypes=wire_dtype or WIRE_DTYPES,
            levels=level or LEVELS,
        )
        conduct(bench, output)


def curve(
    rounds: Annotated[int, typer.Option(help="How often each size is sent.")] = 30,
    size: Sizes = None,
    link_spec: LinkSpecOption = None,
    form: Format = "",
    out: Out = None,
    quiet: Quiet = False,
    config_file: ConfigFile = None,
) -> None:
    """Measure what keys cost: round trip and throughput by size, with CURVE and without, in turn. Needs no model."""
    settings = load_settings(None, None, {"run.link": link_spec}, config_file)
    output = Output(form, out, quiet)
    with sigterm_as_interrupt():
        from teegpu.bench.curve import CurveBenchmark
        from teegpu.bench.exchanges import SIZES

        conduct(CurveBenchmark(settings, rounds=rounds, sizes=size or SIZES), output)
