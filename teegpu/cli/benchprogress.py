"""Progress of a benchmark on stderr, without a thread that would disturb what is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from teegpu.cli.common import message_console

if TYPE_CHECKING:
    from teegpu.bench.measure import Notify, Progress


@contextmanager
def shown(*, quiet: bool = False) -> Iterator[Notify]:
    """A function that shows each step as a line when it is over; on a terminal also a bar that vanishes at the end."""
    console = message_console()
    if quiet:
        yield lambda _: None
        return
    if not console.is_terminal:
        yield lambda step: console.print(line(step), soft_wrap=True) if step.outcome else None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
    # Drawn when a step begins or ends, never while one is measured.
    with Bar(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=None)

        def show(step: Progress) -> None:
            if step.outcome:
                bar.console.print(line(step), soft_wrap=True)
            now = f"{step.label}, {step.stage}{_left(step)}"
            bar.update(task, total=step.total, completed=step.done, description=now)
            bar.refresh()

        yield show


def line(step: Progress) -> str:
    """``[3/48] fused zmq fp16, repeat 1 of 5: prefill 1.394 s, decode 31.2 tokens/s; about 2 min left``."""
    return f"[{step.done}/{step.total}] {step.label}, {step.stage}: {step.outcome}{_left(step)}"


def _left(step: Progress) -> str:
    from teegpu.bench.measure import duration

    if step.seconds_left is None or step.done >= step.total:
        return ""
    return f"; {duration(step.seconds_left)} left"
