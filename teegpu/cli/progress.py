"""Progress of fetching, converting and loading models, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from teegpu.cli.common import message_console

Notify = Callable[[str, float | None], None]
"""Told what is being done, and the share that is done, from 0 to 1, or None where that is unknown."""


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
        task = progress.add_task("", total=None, start=True)
        current = ""

        def show(text: str, share: float | None) -> None:
            nonlocal current
            if text != current:
                current = text
                progress.reset(task, description=text)
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
