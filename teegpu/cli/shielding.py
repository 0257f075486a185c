"""What the commands around private runs share: the model, its folder of secrets, and how long things took."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teegpu.cli.common import message_console
from teegpu.cli.progress import Notify, shown

if TYPE_CHECKING:
    from teegpu.config import Config
    from teegpu.model.spec import ModelSpec
    from teegpu.model.weights import WeightStore

Model = Annotated[
    str | None, typer.Option(help="Catalogue name, Hugging Face id, folder or .gguf file.", show_default=False)
]
Offline = Annotated[bool | None, typer.Option("--offline", help="Never use the network to find the model.")]
Threads = Annotated[
    int | None, typer.Option(min=0, help="Threads to compute with; 0: all cores.", show_default="run.threads")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON object instead of text.")]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that secrets are made for, and ``data``, the folder of what is made."""

    config: Config
    name: str
    spec: ModelSpec
    store: WeightStore
    digest: str
    data: Path


def settings(model: str | None, offline: bool | None, config_file: Path | None, threads: int | None = None) -> Config:
    from teegpu import config

    return config.load({"model.name": model, "model.offline": offline, "run.threads": threads}, config_file)


@contextlib.contextmanager
def subject(config: Config, notify: Notify, *, quiet: bool = False) -> Iterator[Subject]:
    """The configured model, found (and fetched where that is needed), and torch set to the threads of the runner."""
    import torch

    from teegpu import machine
    from teegpu.cli.models import find_model
    from teegpu.model.reader import read_spec
    from teegpu.model.weights import WeightStore
    from teegpu.tee.shield import sealed

    folder = find_model(config, quiet=quiet)
    torch.set_num_threads(config.run.threads or machine.available_cores())
    machine.keep_freed_memory()
    spec = read_spec(folder)
    with WeightStore(folder, spec) as store, torch.inference_mode():
        data = sealed.data_folder(config.shield.dir)
        notify("reading the weights for their digest", None)
        yield Subject(config, folder.name, spec, store, store.digest(), data)


def say(text: str) -> None:
    """A line for people, on stderr."""
    message_console().print(text, soft_wrap=True)


__all__ = ["AsJson", "Model", "Notify", "Offline", "Quiet", "Subject", "Threads", "say", "settings", "shown", "subject"]
