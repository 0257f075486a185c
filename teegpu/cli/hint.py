"""``teegpu hint``: make, look at and remove the hints of ``run --privacy lwe``, which is experimental."""

from __future__ import annotations

import json
import time

import typer

from teegpu.cli.common import ConfigFile, sigterm_as_interrupt
from teegpu.cli.shielding import AsJson, Model, Offline, Quiet, Threads, say, settings, shown, subject

app = typer.Typer(
    help="Make and look at the hints of 'run --privacy lwe'. The mode is experimental: nobody outside of this project "
    "has reviewed it.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def make(
    model: Model = None,
    offline: Offline = None,
    threads: Threads = None,
    quiet: Quiet = False,
    config_file: ConfigFile = None,
) -> None:
    """Compute the hints of all matrices of a model, once. An interrupt leaves none of them."""
    config = settings(model, offline, config_file, threads)
    with sigterm_as_interrupt(), shown(quiet=quiet) as notify, subject(config, notify, quiet=quiet) as found:
        from teegpu.tee.shield import lwe
        from teegpu.units import about_seconds, human_bytes, human_seconds

        size = human_bytes(lwe.hint_bytes(found.spec))
        if not quiet:
            say(f"the hints of {found.name} take {size}, on the disk in {found.data} and in a run's memory")
        began = time.perf_counter()
        text, told = "computing hints", 0

        def progress(share: float) -> None:
            nonlocal text, told
            if int(share * 10) > told:  # a line for each tenth, where there is no bar
                told = int(share * 10)
                left = (time.perf_counter() - began) / share * (1 - share)
                text = f"computing hints: {share:.0%}, about {about_seconds(left)} left"
            notify(text, share)

        path = lwe.make_hints(
            found.store,
            found.spec,
            found.digest,
            found.data,
            progress=progress,
            waiting=lambda: notify("waiting for another process that makes hints", None),
        )
        if not quiet:
            say(f"made {path}, {size}, in {human_seconds(time.perf_counter() - began)}")


@app.command()
def show(model: Model = None, offline: Offline = None, config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show whether the hints of a model are there, and their size."""
    config = settings(model, offline, config_file)
    with shown() as notify, subject(config, notify) as found:
        from teegpu.tee.shield import lwe, samplers
        from teegpu.units import human_bytes

        path = lwe.hint_path(found.data, found.digest)
        there = path.exists()
        size = lwe.hint_bytes(found.spec)
        if as_json:
            document = {
                "model": found.name,
                "digest": found.digest,
                "path": str(path),
                "there": there,
                "size_bytes": size,
                "dimension": lwe.DIMENSION,
                "sigma": samplers.SIGMA,
            }
            typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
            return
        state = str(path) if there else "not made yet ('teegpu hint make')"
        typer.echo(f"{found.name}: {human_bytes(size)}, {state}")
        typer.echo(
            f"dimension {lwe.DIMENSION:,}, modulus 2^32, errors of standard deviation {samplers.SIGMA}; experimental"
        )


@app.command()
def rm(model: Model = None, offline: Offline = None, config_file: ConfigFile = None) -> None:
    """Remove the hints of a model."""
    config = settings(model, offline, config_file)
    with shown() as notify, subject(config, notify) as found:
        from teegpu.tee.shield import lwe, sealed

        path = lwe.hint_path(found.data, found.digest)
        with sealed.explaining(path):
            there = path.exists()
            path.unlink(missing_ok=True)
        say(f"removed {path}" if there else f"there are no hints of {found.name} in {found.data}")
