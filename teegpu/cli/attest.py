"""``teegpu attest``: what a TEE can prove, and whether what was proved is enough."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teegpu.cli.common import message_console, result_console
from teegpu.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from teegpu.attest.evidence import Evidence

app = typer.Typer(
    help="What this machine can prove of itself, and whether what an endpoint has proved is enough.",
    no_args_is_help=True,
    add_completion=False,
)
policies = typer.Typer(help="Policies: what an endpoint must prove.", no_args_is_help=True, add_completion=False)
app.add_typer(policies, name="policy")

EvidenceFile = Annotated[Path, typer.Argument(metavar="FILE", help="Evidence: a file of 'attest show --out'.")]
CollateralFile = Annotated[
    Path | None,
    typer.Option("--collateral", metavar="FILE", help="What the vendor says ('teegpu attest collateral')."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where it is written; else to stdout.")]


@app.command()
def show(
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Make evidence that proves nothing, as outside of a TEE.")
    ] = False,
    key: Annotated[
        str, typer.Option("--key", metavar="NAME", help="Speak for this key of 'teegpu keys list', of a GPU server.")
    ] = "",
    nonce: Annotated[str, typer.Option("--nonce", metavar="HEX", help="What the asker chose; else random.")] = "",
    out: Out = None,
) -> None:
    """Show what the TEE around this process proves: a quote, and what it measures.

    Exits with 12 where there is no TEE, or it gives no evidence.
    """
    from teegpu import keys, machine
    from teegpu.attest import sources
    from teegpu.attest.binding import NONCE_BYTES, SERVER, Binding, unhex
    from teegpu.errors import EvidenceError

    source = sources.Simulated() if simulated else sources.find()
    if source is None:
        tee = machine.tee()
        raise EvidenceError(f"nothing can be attested here: {tee.kind}: {tee.note}")
    digest = hashlib.sha256(keys.public(key).raw).digest() if key else bytes(32)
    asked = unhex(nonce, "nonce") if nonce else secrets.token_bytes(NONCE_BYTES)
    made = sources.evidence(source, Binding(SERVER, digest, asked, {}))
    console = message_console()
    console.print(f"evidence of {made.kind}, by {source.describe}: {len(made.quote):,} bytes", soft_wrap=True)
    console.print(f"it speaks for {f'the key {key}' if key else 'no key'}", soft_wrap=True)
    _write(json.dumps(made.to_json(), indent=2) + "\n", out)


@app.command()
def verify(
    file: EvidenceFile,
    policy: Annotated[
        Path | None, typer.Option("--policy", metavar="FILE", help="Judge by this policy too, its settings included.")
    ] = None,
    collateral: CollateralFile = None,
    at: Annotated[
        str, typer.Option("--at", metavar="TIME", help="Judge as of then (2026-01-31T12:00:00Z), not of now.")
    ] = "",
    kind: Annotated[
        str, typer.Option("--kind", metavar="KIND", help="FILE is a bare quote of tdx, sgx or sev-snp.")
    ] = "",
) -> None:
    """Verify evidence without a network, and show what it proves.

    A file can't prove that it is of now, nor for whom it speaks: that takes a connection ('teegpu connect'). Exits with
    12 where it is refused.
    """
    from teegpu.attest import collateral as collaterals
    from teegpu.attest import verify as verdicts
    from teegpu.attest.evidence import KINDS, Collateral
    from teegpu.attest.policy import Policy
    from teegpu.errors import refusal

    now = _time(at)
    given = Collateral() if collateral is None else collaterals.read(collateral)
    accepted = None if policy is None else Policy.read(policy)
    binding = None
    if kind:
        if kind not in KINDS:
            raise UsageError(f"--kind {kind}: known are {', '.join(KINDS)}")
        quote = _read(file)
    else:
        evidence = _evidence(file)
        kind, quote, binding = evidence.kind, evidence.quote, evidence.binding
        given = given.over(evidence.collateral)
    if accepted is not None:
        verdicts.check_kind(kind, accepted)
    claims = verdicts.claims_of(kind, quote, given, now)
    console = result_console()
    console.print(f"genuine: {kind}, as of {_stamp(now)}")
    for name, value in {**claims.measurements, **claims.numbers}.items():
        console.print(f"{name}: {value}")
    if claims.tcb_status:
        told = f" ({', '.join(claims.advisories)})" if claims.advisories else ""
        console.print(f"firmware: {claims.tcb_status}{told}, a level of {_stamp(claims.tcb_at or 0)}")
    if claims.platform:
        console.print(f"processor: {claims.platform}")
    if binding is None:
        console.print("speaks for: nothing that is known, it is a quote alone")
    else:
        if claims.report_data != binding.report_data:
            raise refusal("binding", "what the TEE had signed is not what stands beside it")
        console.print(f"speaks for: a {binding.role} with the key {binding.key.hex()}")
        console.print(f"asked with: {binding.nonce.hex()}")
        for name, value in binding.settings.items():
            console.print(f"{name}: {value}")
    if accepted is not None:
        settings = binding.settings if binding is not None else {}
        broken = [*verdicts.refusals(claims, accepted, now), *verdicts.settings_refusals(settings, accepted)]
        for each in broken[1:]:
            message_console().print(str(each), soft_wrap=True)
        if broken:
            raise broken[0]
        console.print(f"the policy {policy} accepts it" + ("" if settings else ", as far as a quote alone can say"))


@app.command("collateral")
def get_collateral(
    file: EvidenceFile,
    url: Annotated[
        str, typer.Option("--url", metavar="URL", help="Ask this service in the place of the vendor's.")
    ] = "",
    out: Out = None,
) -> None:
    """Get what the vendor says now of the processor of some evidence: certificates, revocations, levels of firmware.

    It is signed by the vendor, so it may come from anybody; what is not genuine is found when it is used.
    """
    from teegpu.attest import collateral as collaterals

    _write(json.dumps(collaterals.fetch(_evidence(file), url).to_json(), indent=2) + "\n", out)


@policies.command("new")
def new_policy(
    origin: Annotated[
        str, typer.Option("--from", metavar="URL", help="Write down what this endpoint proves: https://host.")
    ] = "",
    kind: Annotated[
        str, typer.Option("--kind", metavar="KIND", help="A blank one to fill in: tdx, sev-snp or sgx.")
    ] = "",
    collateral: CollateralFile = None,
    out: Out = None,
) -> None:
    """Write a policy for a person to read: from what an endpoint proves, or blank.

    What was seen is not what should be: compare the measurements with those of the image that you built or audited.
    """
    import asyncio

    from teegpu.attest import collateral as collaterals
    from teegpu.attest import policy
    from teegpu.attest.evidence import KINDS

    if bool(origin) == bool(kind):
        raise UsageError("policy new takes one of --from URL and --kind KIND")
    if kind:
        if kind not in KINDS:
            raise UsageError(f"--kind {kind}: known are {', '.join(KINDS)}")
        text = policy.blank(kind)
    else:
        from teegpu.connect.upstream import observe

        given = None if collateral is None else collaterals.read(collateral)
        evidence, claims = asyncio.run(observe(origin, given))
        text = policy.render(claims, evidence.binding.settings, origin=f"{origin} on {_stamp(time.time())[:10]}")
        message_console().print(
            "this is what was seen, not what should be: read it, and compare the measurements with those that you know",
            soft_wrap=True,
        )
    _write(text, out)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: can't be read: {error.strerror}") from None


def _evidence(file: Path) -> Evidence:
    from teegpu.attest.evidence import Evidence, read_json

    return Evidence.from_json(read_json(_read(file)))


def _write(text: str, out: Path | None) -> None:
    if out is None:
        typer.echo(text, nl=False)
        return
    from teegpu import files

    try:
        files.replace(out, text, mode=0o644)
    except OSError as error:
        raise ConfigError(f"--out {out}: can't be written: {error.strerror}") from None
    message_console().print(f"written to {out}", soft_wrap=True)


def _time(text: str) -> int:
    if not text:
        return int(time.time())
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"--at {text}: a time is written as 2026-01-31T12:00:00Z") from None
    return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())


def _stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
