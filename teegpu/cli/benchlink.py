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
