"""``teegpu connect``: a local door to an endpoint that has proved what it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teegpu.cli import logs
from teegpu.cli.common import message_console
from teegpu.errors import UsageError

if TYPE_CHECKING:
    from teegpu.connect.upstream import Seen


def connect(
    url: Annotated[str, typer.Argument(help="The endpoint: https://host:port.", show_default=False)],
    policy: Annotated[
        Path | None,
        typer.Option("--policy", metavar="FILE", help="What the endpoint must prove ('teegpu attest policy new')."),
    ] = None,
    listen: Annotated[
        str, typer.Option("--listen", metavar="ADDRESS", help="Where applications find it: host:port or unix:/path.")
    ] = "127.0.0.1:8080",
    collateral: Annotated[
        Path | None,
        typer.Option("--collateral", metavar="FILE", help="What the vendor says ('teegpu attest collateral')."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Go on where the endpoint does not prove what the policy asks for.")
    ] = False,
) -> None:
    """Pass requests on to an endpoint, each over a connection on which it has proved what the policy asks for.

    Applications use http://127.0.0.1:8080/v1 as they would OpenAI's. Nothing of a request is sent before the endpoint
    has proved what it is; where it does not, the request is refused with the policy's rule. Ctrl-C or SIGTERM end it.
    """
    from teegpu.attest import collateral as collaterals
    from teegpu.attest.policy import Policy

    if policy is None and not insecure:
        raise UsageError(
            "connect asks for a policy: --policy FILE ('teegpu attest policy new --from URL --out FILE' writes one to "
            "read)"
        )
    accepted = None if policy is None else Policy.read(policy)
    given = None if collateral is None else collaterals.read(collateral)
    from teegpu.connect.serving import Serving
    from teegpu.connect.upstream import Upstream

    console = message_console()

    def verdict(seen: Seen) -> None:
        if seen.claims is None or seen.evidence is None:
            console.print(f"NOT VERIFIED: {seen.problem}")
            return
        settings = ", ".join(f"{name} {value}" for name, value in seen.evidence.binding.settings.items())
        for name, value in seen.claims.measurements.items():
            console.print(f"verified: {name} {value}")
        console.print(f"verified: {settings}")
        console.print(f"verified: {seen.claims.kind}, for the key {seen.key.hex()}")
        if seen.claims.kind == "simulated":
            console.print("warning: the evidence is simulated, which proves nothing, and the policy accepts it")

    def ready(where: str, _: Seen) -> None:
        console.print(f"teegpu connect ready at {where} for {url}")

    with logs.shown("rich", "info", console):
        if insecure:
            console.print(
                "warning: --insecure: requests go to the endpoint whatever it proves, and who stands in between reads "
                "them; each answer says so in its header x-teegpu-insecure"
            )
        Serving(listen, Upstream(url, accepted, insecure, given, on_key=verdict), ready).run()
    console.print("stopped")
