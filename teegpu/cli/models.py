"""The configured model, and the progress of finding, fetching, converting and loading one, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from teegpu.cli.common import message_console
from teegpu.errors import ConfigError

if TYPE_CHECKING:
    from teegpu.config import Config
    from teegpu.model.folder import ModelFolder

Notify = Callable[[str, float | None], None]
"""Takes what is being done, and the share that is done, from 0 to 1, or None where that is unknown."""


@contextmanager
def shown(*, quiet: bool = False) -> Iterator[Notify]:
    """A function that shows what it is told: on a terminal as a bar that vanishes at the end, else a line per step."""
    console = message_console()
    if quiet:
        yield lambda text, share: None  # noqa: ARG005
        return
    if not console.is_terminal:
        yield _lines()
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None, visible=False)
        current = ""

        def show(text: str, share: float | None) -> None:
            nonlocal current
            if text != current:
                current = text
                progress.reset(task, description=text, visible=True)
            progress.update(task, total=None if share is None else 1.0, completed=share or 0.0)

        yield show


def _lines() -> Notify:
    console = message_console()
    last = ""

    def show(text: str, share: float | None) -> None:  # noqa: ARG001 (a share has no place in a log)
        nonlocal last
        if text != last:
            last = text
            console.print(text)

    return show


def find_model(config: Config, *, quiet: bool = False, name: str = "") -> ModelFolder:
    """The folder of ``name`` (``model.name``), fetched and converted first where it is not there. Raises
    ``ModelError``."""
    from teegpu.model import catalog

    model = config.model
    with shown(quiet=quiet) as progress:
        return catalog.resolve(name or model.name, cache_dir=model.cache_path, offline=model.offline, progress=progress)


def check_draft(config: Config) -> None:
    """Raises ``ConfigError`` where ``run.draft_model`` would have nothing to do."""
    if config.run.draft_model and not config.run.speculate:
        raise ConfigError("run.draft_model: it guesses run.speculate tokens a step, and that is 0: give --speculate N")


def find_draft(config: Config, *, quiet: bool = False) -> ModelFolder | None:
    """The folder of ``run.draft_model``, as ``find_model`` finds it; None where there is none."""
    name = config.run.draft_model
    return find_model(config, quiet=quiet, name=name) if name else None
