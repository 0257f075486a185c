"""``teegpu model``: what models there are, fetching one, what is in one, and making one with random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teegpu.cli.common import Commands, ConfigFile, result_console, sigterm_as_interrupt
from teegpu.cli.models import shown
from teegpu.config import load
from teegpu.errors import ModelError

if TYPE_CHECKING:
    from teegpu.model.folder import ModelFolder
    from teegpu.model.spec import ModelSpec
    from teegpu.model.weights import WeightStore

app = Commands(help="List, fetch, inspect and make models.", no_args_is_help=True, add_completion=False)

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
        try:
            found = catalog.find_local(entry.name, cache_dir=cache)
        except ModelError:  # it is there, and can't be used
            found = None
        rows.append(
            {
                "name": entry.name,
                "about": entry.about,
                "source": str(entry.source),
                "architecture": entry.spec.architecture,
                "parameters": entry.spec.parameters,
                "download_bytes": entry.download_bytes,
                "licence": entry.licence,
                "path": None if found is None else str(found.path),
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("name", "source", "download", "licence", "here"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        here = "yes" if row["path"] else "no"
        table.add_row(row["name"], row["source"], _size(row["download_bytes"]), row["licence"], here)
    result_console().print(table)


@app.command()
def families(as_json: AsJson = False) -> None:
    """Show what models can be computed, with which plans and private modes, and which are refused; as Markdown."""
    from teegpu.model import families

    if not as_json:
        typer.echo(families.page(), nl=False)
        return
    found = {}
    tables = {"families": families.table(), "refused_plans": families.refused_plans(), "refused": families.refused()}
    for key, (headings, *rows) in tables.items():
        found[key] = [dict(zip(headings, row, strict=True)) for row in rows]
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False))


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
    """Show what a model that is on this machine is, takes and can be computed with: dimensions, memory, plans."""
    from teegpu.model import catalog, reader
    from teegpu.model.weights import WeightStore

    config = load({}, config_file).model
    with sigterm_as_interrupt(), shown() as notify:
        folder = catalog.find_local(name, cache_dir=config.cache_path)
        if folder is None:
            what = "converted" if catalog.kind_of(name) == "gguf" else "on this machine"
            raise ModelError(f"model '{name}' is not {what} yet: run 'teegpu model pull {name}' first")
        folder = folder.pinned()
        spec = reader.read_spec(folder)
        with WeightStore(folder, spec, checked=True) as weights:
            notify("reading the weights for their digest", None)
            facts = _facts(folder, spec, weights) | {"memory_bytes": _memory(spec, weights)}
            facts["dtype"] = str(weights.stored_dtype("layers.0.q_proj")).removeprefix("torch.")
            if weights.quantisation is not None:
                facts |= {"dtype": "quantised", "quantisation": weights.quantisation.about}
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    readable = facts | {
        "parameters": f"{facts['parameters']:,}",
        "weight_bytes": f"{facts['weight_bytes']:,} ({_size(facts['weight_bytes'])})",
        "quantisation": facts["quantisation"] or "none",
        "sliding_window": facts["sliding_window"] or "none",
        "rope": ", ".join(f"{key}={value}" for key, value in facts["rope"].items()),
        "tied_embeddings": "yes" if facts["tied_embeddings"] else "no",
        "eos_token_ids": ", ".join(map(str, facts["eos_token_ids"])) or "none",
    }
    for key in ("manifest", "memory_bytes", "plans", "privacy"):
        del readable[key]
    for key, value in readable.items():  # lines rather than a table, which would fold a digest or a path
        typer.echo(f"{key.replace('_', ' '):<18}  {value}")
    for what, size_bytes in facts["memory_bytes"].items():
        typer.echo(f"memory: {what:<34}  {_size(size_bytes)}")
    for line in _computed_with(facts):
        typer.echo(line)


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


def _facts(folder: ModelFolder, spec: ModelSpec, weights: WeightStore) -> dict[str, Any]:
    from teegpu.model import families
    from teegpu.model.manifest import digest_of, manifest

    parts = manifest(folder, spec, weights.digest())
    windows = sorted({window for window in spec.layer_windows if window is not None})
    return {
        "name": spec.name,
        "path": str(folder.path),
        "architecture": spec.architecture,
        "parameters": spec.parameters,
        "weight_bytes": weights.size_bytes,
        "quantisation": None,
        "digest": digest_of(parts),
        "weights_digest": weights.digest(),
        "manifest": parts,
        **spec.dimensions,
        "context_tokens": spec.max_positions,
        "sliding_window": windows[0] if windows else None,
        "rope": spec.rope,
        "tied_embeddings": weights.tied,
        "eos_token_ids": list(spec.eos_token_ids),
        "plans": families.plans(spec.architecture),
        "privacy": families.private(),
    }


def _computed_with(facts: Mapping[str, Any]) -> Iterator[str]:
    """Lines of its plans, of those that each private mode takes, and of why others are refused."""
    from teegpu.model import families

    plans = (name if how == families.YES else f"{name} ({how})" for name, how in facts["plans"].items())
    yield f"{'plans':<18}  {', '.join(plans)}"
    for mode, refused in facts["privacy"].items():
        yield f"{f'privacy {mode}':<18}  {', '.join(plan for plan, why in refused.items() if not why)}"
    for plan, modes, why in families.refused_plans()[1:]:
        yield f"{f'refused {plan}':<18}  with --privacy {modes}: {why}"


def _memory(spec: ModelSpec, weights: WeightStore) -> dict[str, int]:
    """What each side takes for the model, in bytes, by what it is for; code, buffers and activations come on top."""
    vectors = sum(shape[0] for shape in spec.weights.values() if len(shape) == 1)
    table = spec.vocab_size * spec.hidden_size
    matrices = sum(math.prod(shape) for shape in spec.weights.values() if len(shape) == 2) - table
    tee = 4 * vectors + table * weights.stored_dtype("embed_tokens").itemsize
    server = vectors + matrices + table
    return {
        "TEE, beside a server": tee,
        "TEE, all in it (fp32)": tee + 4 * matrices,
        "TEE, all in it (bf16)": tee + 2 * matrices,
        "TEE, for 1,000 tokens of context": 1000 * spec.layers * 2 * spec.kv_heads * spec.head_dim * 4,
        "server (fp32)": 4 * server,
        "server (bf16)": 2 * server,
        "server, more for private runs": matrices,
    }


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"
