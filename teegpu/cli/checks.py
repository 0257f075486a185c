"""``teegpu checks``: make ahead, look at and remove the secret vectors with which servers' products are checked."""

from __future__ import annotations

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teegpu.cli.common import ConfigFile, sigterm_as_interrupt
from teegpu.cli.shielding import AsJson, Model, Offline, Quiet, Subject, Threads, say, settings, shown, subject

if TYPE_CHECKING:
    from teegpu.tee.shield.keyfiles import SecretVectors

app = typer.Typer(
    help="Make ahead the secret vectors with which products are verified (run --verify). A run makes them itself where "
    "they are missing.",
    no_args_is_help=True,
    add_completion=False,
)


class Kind(StrEnum):
    """What is checked: products that did not wrap (two-server, pads), masked ones (lwe), floats (none)."""

    WHOLE = "whole"
    MASKED = "masked"
    PLAIN = "plain"


FOR = {
    Kind.WHOLE: "for the modes two-server and pads",
    Kind.MASKED: "for the mode lwe",
    Kind.PLAIN: "for plain runs (within a tolerance)",
}


@app.command()
def make(
    kind: Annotated[
        Kind,
        typer.Option("--for", help="whole: the modes two-server and pads; masked: lwe; plain: runs without privacy."),
    ] = Kind.WHOLE,
    anew: Annotated[bool, typer.Option("--anew", help="Draw new ones, in place of those that there are.")] = False,
    model: Model = None,
    offline: Offline = None,
    threads: Threads = None,
    quiet: Quiet = False,
    config_file: ConfigFile = None,
) -> None:
    """Draw the vectors and compute what they give with each matrix: the weights are read once."""
    config = settings(model, offline, config_file, threads)
    with sigterm_as_interrupt(), shown(quiet=quiet) as notify, subject(config, notify, quiet=quiet) as found:
        from teegpu.units import human_bytes, human_seconds

        text = "computing what secret vectors give with each matrix"
        began = time.perf_counter()
        keys = _classes()[kind].load(
            found.store,
            found.spec,
            found.digest,
            checks=config.shield.checks,
            folder=found.data,
            progress=lambda share: notify(text, share),
            remake=anew,
            notify=say,
        )
        seconds = time.perf_counter() - began
        if keys.path is not None and not quiet:
            size = human_bytes(keys.path.stat().st_size)
            say(f"{keys.checks} bits of vectors for {found.name}: {keys.path}, {size}, in {human_seconds(seconds)}")


@app.command()
def show(model: Model = None, offline: Offline = None, config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show whether the vectors for a model are there, and how sure a check with them is."""
    config = settings(model, offline, config_file)
    with shown() as notify, subject(config, notify) as found:
        from teegpu.tee.shield import verify
        from teegpu.units import human_bytes

        checks = config.shield.checks
        paths = _paths(found, checks)
        sizes = {kind: path.stat().st_size if path.exists() else None for kind, path in paths.items()}
        if as_json:
            document = {
                "model": found.name,
                "digest": found.digest,
                "checks": checks,
                "soundness": verify.soundness(checks),
                "files": {kind: {"path": str(path), "size_bytes": sizes[kind]} for kind, path in paths.items()},
            }
            typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
            return
        typer.echo(f"{found.name}: a wrong product is accepted with a probability of 2^-{checks} at most")
        for kind, path in paths.items():
            size = sizes[kind]
            there = "not made yet" if size is None else f"{path}, {human_bytes(size)}"
            typer.echo(f"{FOR[kind]}: {there}")


@app.command()
def rm(model: Model = None, offline: Offline = None, config_file: ConfigFile = None) -> None:
    """Remove the vectors of a model: the next run that verifies draws new ones."""
    config = settings(model, offline, config_file)
    with shown() as notify, subject(config, notify) as found:
        from teegpu.tee.shield import sealed

        removed = 0
        for path in _paths(found, config.shield.checks).values():
            with sealed.explaining(path):
                removed += path.exists()
                path.unlink(missing_ok=True)
        say(f"removed {removed} file{'s' * (removed != 1)} of {found.name}")


def _classes() -> dict[Kind, type[SecretVectors]]:
    from teegpu.tee.shield.plainverify import PlainKeys
    from teegpu.tee.shield.verify import Keys
    from teegpu.tee.shield.wholeverify import WholeKeys

    return {Kind.WHOLE: WholeKeys, Kind.MASKED: Keys, Kind.PLAIN: PlainKeys}


def _paths(found: Subject, checks: int) -> dict[Kind, Path]:
    return {kind: keys.key_path(found.data, found.digest, checks) for kind, keys in _classes().items()}
