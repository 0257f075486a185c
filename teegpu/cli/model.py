"""``teegpu model``: what models there are, fetching one, what is in one, and making one with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teegpu.cli.common import ConfigFile, result_console, sigterm_as_interrupt
from teegpu.cli.progress import shown
from teegpu.config import load
from teegpu.errors import ModelError

if TYPE_CHECKING:
    from teegpu.model.folder import ModelFolder
    from teegpu.model.spec import ModelSpec

app = typer.Typer(help="List, fetch, inspect and make models.", no_args_is_help=True, add_completion=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ModelName = Annotated[
    str, typer.Argument(metavar="NAME", help="A name from 'model list', a Hugging Face id, a folder or a .gguf file.")
]


@app.command("list")
def list_models(config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show the models that have a short name, and which of them are on this machine."""
    from teegpu.model import catalog

    cache = load({}, config_file).model.cache_path
    rows: list[dict[str, Any]] = []
    for entry in catalog.ENTRIES.values():
        found = catalog.find_local(entry.name, cache_dir=cache)
        rows.append(
            {
                "name": entry.name,
                "about": entry.about,
                "source": str(entry.source),
                "download_bytes": entry.size_bytes,
                "licence": entry.licence,
                "path": None if found is None else str(found.path),
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("name", "source", "size", "licence", "here"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        here = "yes" if row["path"] else "no"
        table.add_row(row["name"], row["source"], _size(row["download_bytes"]), row["licence"], here)
    result_console().print(table)


@app.command()
def pull(
    name: ModelName,
    force: Annotated[bool, typer.Option("--force", help="Fetch it again, in place of what is there.")] = False,
    offline: Annotated[
        bool | None, typer.Option("--offline/--online", help="Keep off the network.", show_default=False)
    ] = None,
    config_file: ConfigFile = None,
) -> None:
    """Fetch a model (and convert it where needed); prints the folder that it is in."""
    from teegpu.model import catalog, reader

    config = load({"model.offline": offline}, config_file).model
    with sigterm_as_interrupt(), shown() as notify:
        folder = catalog.resolve(
            name, cache_dir=config.cache_path, offline=config.offline, progress=notify, refresh=force
        )
        reader.read_spec(folder)  # a folder of the user's own may hold anything
    typer.echo(str(folder.path))


@app.command()
def info(name: ModelName, config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show the dimensions, size and digest of a model that is on this machine."""
    from teegpu.model import catalog, reader
    from teegpu.model.weights import WeightStore

    config = load({}, config_file).model
    with sigterm_as_interrupt(), shown() as notify:
        folder = catalog.find_local(name, cache_dir=config.cache_path)
        if folder is None:
            what = "converted" if catalog.kind_of(name) == "gguf" else "on this machine"
            raise ModelError(f"model '{name}' is not {what} yet: run 'teegpu model pull {name}' first")
        spec = reader.read_spec(folder)
        with WeightStore(folder, spec) as weights:
            notify("reading the weights for their digest", None)
            facts = _facts(folder, spec, weights.size_bytes, weights.digest())
            facts["dtype"] = str(weights.stored_dtype("layers.0.q_proj")).removeprefix("torch.")
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    readable = facts | {
        "parameters": f"{facts['parameters']:,}",
        "weight_bytes": f"{facts['weight_bytes']:,} ({_size(facts['weight_bytes'])})",
        "sliding_window": facts["sliding_window"] or "none",
        "rope": ", ".join(f"{key}={value}" for key, value in facts["rope"].items()),
        "tied_embeddings": "yes" if facts["tied_embeddings"] else "no",
        "eos_token_ids": ", ".join(map(str, facts["eos_token_ids"])) or "none",
    }
    for key, value in readable.items():  # lines rather than a table, which would fold a digest or a path
        typer.echo(f"{key.replace('_', ' '):<18}  {value}")


@app.command("random")
def make_random(
    shape: Annotated[
        str, typer.Argument(metavar="SHAPE", help="A shape such as tinyllama-1.1b, or layers=4,hidden=256, or both.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new folder to write.")],
    seed: Annotated[int, typer.Option(help="Another seed gives other weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
) -> None:
    """Make a model with random weights for benchmarks; prints its folder."""
    from teegpu.model import random

    with sigterm_as_interrupt(), shown() as notify:
        folder = random.write(shape, out, seed, dtype, progress=notify)
    typer.echo(str(folder.path))


def _facts(folder: ModelFolder, spec: ModelSpec, weight_bytes: int, digest: str) -> dict[str, Any]:
    windows = sorted({window for window in spec.layer_windows if window is not None})
    return {
        "name": spec.name,
        "path": str(folder.path),
        "architecture": spec.architecture,
        "parameters": spec.parameters,
        "weight_bytes": weight_bytes,
        "digest": digest,
        "layers": spec.layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "context_tokens": spec.max_positions,
        "sliding_window": windows[0] if windows else None,
        "rope": spec.rope,
        "tied_embeddings": spec.tied_embeddings,
        "eos_token_ids": list(spec.eos_token_ids),
    }


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"
