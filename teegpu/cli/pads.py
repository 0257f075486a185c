"""``teegpu pads``: make, look at and remove the one-time pads of ``run --privacy pads``."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Annotated, Any

import typer

from teegpu.cli.common import ConfigFile, result_console, sigterm_as_interrupt
from teegpu.cli.shielding import AsJson, Model, Offline, Quiet, Threads, say, settings, shown, subject

app = typer.Typer(
    help="Make and look at the one-time pads of 'run --privacy pads'. Each is made ahead, and used once.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def make(
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to make pads for, those of prompts and those of answers.")
    ],
    heads: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Tokens whose logits are computed: those of answers, and one for each prompt.",
            show_default="a quarter of the tokens",
        ),
    ] = None,
    up_to: Annotated[bool, typer.Option("--up-to", help="Make no more than are missing for so many.")] = False,
    beside: Annotated[
        bool, typer.Option("--beside", hidden=True, help="Go on until standard input ends, when nothing else computes.")
    ] = False,
    model: Model = None,
    offline: Offline = None,
    threads: Threads = None,
    quiet: Quiet = False,
    config_file: ConfigFile = None,
) -> None:
    """Make pads, and add them to those that there are. It takes about as long as the products themselves.

    Ctrl-C keeps what is whole.
    """
    if beside:
        _stand_back()
    config = settings(model, offline, config_file, threads)
    wanted = max(8, tokens // 4) if heads is None else heads
    with sigterm_as_interrupt(), shown(quiet=quiet) as notify, subject(config, notify, quiet=quiet) as found:
        from teegpu.tee.shield.padmaker import PadMaker
        from teegpu.tee.shield.padstore import token_bytes
        from teegpu.units import human_bytes

        sizes = {kind: token_bytes(found.spec, kind) for kind in ("body", "head")}
        if not quiet:
            need = tokens * sizes["body"] + wanted * sizes["head"]
            say(
                f"a token takes {human_bytes(sizes['body'])} for the layers, and {human_bytes(sizes['head'])} for "
                f"lm_head where its logits are wanted: {human_bytes(need)} for {tokens:,} and {wanted:,}, in "
                f"{found.data}"
            )
        maker = PadMaker(found.store, found.spec, found.digest, found.data, found.name)
        try:
            maker.run(tokens, wanted, notify, up_to=up_to)
            while beside:
                time.sleep(_LOOK_SECONDS)
                maker.run(tokens, wanted, notify, up_to=True)
        finally:
            if not quiet:
                for line in _summary(maker.made.tokens, maker.made.seconds, sizes):
                    say(line)


_LOOK_SECONDS = 1.0
"""How often a pool is looked at that is made beside a run."""


def _stand_back() -> None:
    """Computes from now on only while nothing else wants to, and ends with standard input."""

    def end() -> None:
        sys.stdin.buffer.read()
        signal.raise_signal(signal.SIGTERM)

    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    threading.Thread(target=end, daemon=True, name="end of standard input").start()


def _summary(tokens: dict[str, int], seconds: dict[str, float], sizes: dict[str, float]) -> list[str]:
    """What was made, and what it cost."""
    from teegpu.units import human_bytes, human_seconds

    lines = []
    for kind, what in (("body", "the layers"), ("head", "lm_head")):
        if tokens[kind]:
            each = human_seconds(seconds[kind] / tokens[kind])
            lines.append(
                f"made pads of {what} for {tokens[kind]:,} tokens, {human_bytes(tokens[kind] * sizes[kind])}, in "
                f"{human_seconds(seconds[kind])}: {each} a token"
            )
    return lines or ["no pads were made"]


@app.command()
def show(config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show the pads that there are, for each model, and what they cost to make."""
    from rich.table import Table

    from teegpu.units import human_bytes, human_seconds

    config = settings(None, None, config_file)
    pools = _pools(config.shield.dir)
    if as_json:
        typer.echo(json.dumps(pools, indent=2, ensure_ascii=False))
        return
    if not pools:
        say("no pads: 'teegpu pads make --tokens N' makes some")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("model", "for the layers", "for lm_head", "on disk", "made in", "digest"):
        table.add_column(heading, overflow="fold")
    for pool in pools:
        costs = pool["seconds_per_token"]
        cost = " + ".join(human_seconds(costs[kind]) for kind in ("body", "head") if kind in costs)
        left = pool["tokens_left"]
        counts = [f"{left[kind]:,} tokens" for kind in ("body", "head")] if left else ["unknown", "unknown"]
        size = human_bytes(pool["size_bytes"])
        table.add_row(pool["model"], *counts, size, f"{cost} a token" if cost else "–", pool["digest"][:16])
    result_console().print(table)
    for pool in pools:
        if pool["trouble"]:
            say(f"{pool['model']}: {pool['trouble']}")


def _pools(directory: str) -> list[dict[str, Any]]:
    from teegpu.errors import ShieldError
    from teegpu.tee.shield import padstore, sealed

    root = sealed.data_folder(directory) / "pads"
    found = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.name.startswith("."):
            continue
        entry: dict[str, Any] = {"model": folder.name, "digest": "", "folder": str(folder), "tokens_left": None}
        entry |= {"size_bytes": 0, "seconds_per_token": {}, "trouble": ""}
        try:
            content = padstore.read_pool(folder)
            entry |= {"model": content["name"], "digest": content["model"]}
            entry["seconds_per_token"] = content.get("seconds_per_token", {})
            entry["size_bytes"] = sum(part.path.stat().st_size for part in padstore.parts_in(folder))
            entry["tokens_left"] = padstore.tokens_left(folder, sealed.SealKey.load())
        except FileNotFoundError:
            continue
        except ShieldError as error:
            entry["trouble"] = str(error)
        found.append(entry)
    return found


@app.command()
def rm(
    model: Model = None,
    offline: Offline = None,
    config_file: ConfigFile = None,
) -> None:
    """Remove the pads of a model, and what could read them."""
    config = settings(model, offline, config_file)
    with sigterm_as_interrupt(), shown() as notify, subject(config, notify) as found:
        from teegpu.tee.shield import padstore, sealed
        from teegpu.units import human_bytes

        folder = padstore.pool_folder(found.data, found.digest)
        try:
            freed = padstore.destroy(folder, sealed.SealKey.load())
        except FileNotFoundError:
            say(f"there are no pads for {found.name} in {found.data}")
            return
        say(f"removed the pads for {found.name}: {human_bytes(freed)}")
