"""``teegpu link``: an emulated link between any two programs, in the foreground."""

from __future__ import annotations

from typing import Annotated

import typer

from teegpu.cli.common import from_transport, message_console, result_console, sigterm_as_interrupt
from teegpu.errors import ConnectionFailedError, UsageError


def link(
    target: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to relay to: tcp://host:port or ipc:///path.")
    ] = "",
    listen: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; port 0 takes any free one.")
    ] = "tcp://127.0.0.1:0",
    rtt: Annotated[str, typer.Option(metavar="TIME", help="Round-trip time, for example 5ms.")] = "0",
    bandwidth: Annotated[
        str, typer.Option(metavar="RATE", help="Each way: 1gbit, 100mbit, 12MB; unlimited where not given.")
    ] = "",
    up: Annotated[str, typer.Option(metavar="RATE", help="From the listening side to the target.")] = "",
    down: Annotated[str, typer.Option(metavar="RATE", help="From the target to the listening side.")] = "",
    jitter: Annotated[
        str, typer.Option(metavar="TIME", help="Largest deviation of each one-way delay, at most half the RTT.")
    ] = "0",
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure the link first and print what it does. Without --target, then end."),
    ] = False,
) -> None:
    """Emulate a link of a given round-trip time and bandwidth between two programs on this machine.

    Relays every connection to --listen on to --target until Ctrl-C or SIGTERM, which end it with exit code 0.
    """
    from transports.errors import BadAddressError, TransportError
    from transports.netem.link import EmulatedLink, LinkSpec, LinkSpecError
    from transports.netem.link import measure as measure_link

    if not target and not measure:
        raise UsageError("--target is missing: say where to relay to, for example --target tcp://127.0.0.1:5555")
    given = {"rtt": rtt, "bandwidth": bandwidth, "up": up, "down": down, "jitter": jitter}
    try:
        spec = LinkSpec.parse(",".join(f"{key}={value}" for key, value in given.items() if value))
        # Nothing but the measurement uses a link without a target; port 9 discards by convention.
        with sigterm_as_interrupt(), EmulatedLink(spec, target or "tcp://127.0.0.1:9", listen=listen) as running:
            if measure:
                result_console().print(str(measure_link(running)), soft_wrap=True)
            if not target:
                return
            try:
                message_console().print(f"link ready at {running.endpoint} to {target} ({spec})", soft_wrap=True)
                status = running.wait()
            except KeyboardInterrupt:
                return
            raise ConnectionFailedError(f"the link's process ended by itself with status {status}: start the link anew")
    except (LinkSpecError, BadAddressError) as error:
        raise UsageError(str(error)) from error
    except TransportError as error:
        raise from_transport(error) or error from error
