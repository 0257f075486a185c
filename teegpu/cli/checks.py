"""``teegpu checks``: make ahead, look at and remove the secret vectors with which servers' products are checked."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from teegpu.cli.common import ConfigFile, sigterm_as_interrupt
from teegpu.cli.shielding import AsJson, Model, Offline, Quiet, Threads, say, settings, shown, subject

app = typer.Typer(
    help="Make ahead the secret vectors with which products are verified (run --verify). A run makes them itself where "
    "they are missing.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def make(
    plain: Annotated[
        bool, typer.Option("--plain", help="Those for runs without privacy, whose products are floats.")
    ] = False,
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
        from teegpu.tee.shield.plainverify import PlainKeys
        from teegpu.tee.shield.verify import Keys
        from teegpu.units import human_bytes, human_seconds

        text = "computing what secret vectors give with each matrix"
        began = time.perf_counter()
        loader = PlainKeys if plain else Keys
        keys = loader.load(
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
            say(f"{keys.checks} vectors for {found.name}: {keys.path}, {size}, in {human_seconds(seconds)}")


@app.command()
def show(model: Model = None, offline: Offline = None, config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show whether the vectors for a model are there, and how sure a check with them is."""
    config = settings(model, offline, config_file)
    with shown() as notify, subject(config, notify) as found:
        from teegpu.tee.shield import plainverify, verify
        from teegpu.units import human_bytes

        checks = config.shield.checks
        paths = {
            "exact": verify.key_path(found.data, found.digest, checks),
            "plain": plainverify.key_path(found.data, found.digest, checks),
        }
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
        for kind, what in (("exact", "for private runs"), ("plain", "for plain runs (within a tolerance)")):
            size = sizes[kind]
            there = "not made yet" if size is None else f"{paths[kind]}, {human_bytes(size)}"
            typer.echo(f"{what}: {there}")


@app.command()
def rm(model: Model = None, offline: Offline = None, config_file: ConfigFile = None) -> None:
    """Remove the vectors of a model: the next run that verifies draws new ones."""
    config = settings(model, offline, config_file)
    with shown() as notify, subject(config, notify) as found:
        from teegpu.tee.shield import plainverify, sealed, verify

        removed = 0
        for module in (verify, plainverify):
            path = module.key_path(found.data, found.digest, config.shield.checks)
            with sealed.explaining(path):
                removed += path.exists()
                path.unlink(missing_ok=True)
        say(f"removed {removed} file{'s' * (removed != 1)} of {found.name}")
