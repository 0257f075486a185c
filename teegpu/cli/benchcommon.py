"""What the commands of ``teegpu bench`` share: options, how one is run, its progress, and where its result goes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, get_type_hints

import typer

from teegpu.cli import interrupts
from teegpu.cli.common import ConfigFile, message_console
from teegpu.cli.destination import Destination
from teegpu.cli.flags import Flags, takes_settings
from teegpu.errors import TeegpuError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from teegpu.bench.measure import Notify, Progress
    from teegpu.config import Config
    from teegpu.model.folder import ModelFolder


@dataclass(frozen=True)
class Shared:
    """The options of every benchmark that give no setting, each declared here alone; see ``benchmark``. ``flags``:
    those that give one."""

    flags: Flags
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="table, json, csv or md; else as the file's name says.")
    ] = ""
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the result there, not to standard output.")
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False
    config_file: ConfigFile = None

    def settings(self, flags: Mapping[str, object] | None = None) -> Config:
        """The settings in force, with these ``flags`` too; and this process takes its cores as they say."""
        from teegpu import config, machine

        machine.share_cores()
        return config.load({**self.flags, **(flags or {})}, self.config_file)

    def output(self) -> Output:
        return Output(self.form, self.out, self.quiet)

    def folder(self, settings: Config) -> ModelFolder:
        from teegpu.cli.models import find_model

        return find_model(settings, quiet=self.quiet)


def benchmark(function: Callable[..., None]) -> Callable[..., None]:
    """A command of ``function``, whose first argument is ``Shared``: the command has its other options, and after them
    those of ``Shared``, and of ``bench`` and ``bench-<its name>`` in the table of settings."""
    own = inspect.signature(function)
    hints, shared_hints = get_type_hints(function, include_extras=True), get_type_hints(Shared, include_extras=True)
    _, *parameters = [parameter.replace(annotation=hints[name]) for name, parameter in own.parameters.items()]
    names = [field.name for field in fields(Shared)]
    parameters += [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=shared_hints[field.name],
        )
        for field in fields(Shared)
    ]

    @functools.wraps(function)
    def command(**given: Any) -> None:
        function(Shared(**{name: given.pop(name) for name in names}), **given)

    vars(command)["__signature__"] = own.replace(parameters=parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del vars(command)["__wrapped__"]
    return takes_settings("bench", f"bench-{function.__name__}", panels=False)(command)


class Benchmark(Protocol):
    name: str

    @property
    def failures(self) -> Sequence[str]: ...

    def run(self, notify: Notify) -> None: ...

    def document(self, status: str) -> dict[str, Any]: ...


class Output:
    """Where the result goes, and how. Raises ``UsageError`` at once for a place that can't be written to."""

    def __init__(self, form: str, out: Path | None, quiet: bool) -> None:
        from teegpu.bench import render

        self.form = render.choose(form, out.name if out is not None else "")
        self.quiet = quiet
        self._destination = Destination(out, force=True, quiet=quiet)
        self._quietly = Destination(out, force=True, quiet=True)

    def keep(self, document: dict[str, Any]) -> None:
        """Writes what there is so far, where the result is a JSON file: so much survives whatever ends the process."""
        if self._quietly.path is not None and not self._quietly.flows and self.form == "json":
            from teegpu.bench import render

            self._quietly.write(render.render(document, self.form))

    def write(self, *documents: Mapping[str, Any]) -> None:
        """One result, or several of the ladder side by side."""
        from teegpu.bench import render

        if len(documents) == 1:
            self._destination.write(render.render(documents[0], self.form))
        else:
            self._destination.write(render.side_by_side(documents, markdown=self.form == "md"))


def conduct(benchmark: Benchmark, output: Output, *, keep: bool = False) -> None:
    """Runs it and writes its result, however it ended, as long as there is one. ``keep``: also after each step."""
    try:
        with progress(quiet=output.quiet) as notify:
            benchmark.run(_keeping(benchmark, output, notify) if keep else notify)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            interrupts.handled()
        document = benchmark.document("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        if _measured(document):
            output.write(document)
        elif isinstance(error, KeyboardInterrupt):
            message_console().print("interrupted before anything was measured", soft_wrap=True)
        raise
    failures = benchmark.failures
    document = benchmark.document("failed" if failures else "complete")
    if _measured(document):
        output.write(document)
    if failures:
        cases = len(document["results"])
        raise TeegpuError(f"{len(failures)} of {cases} case{'s' * (cases != 1)} failed: {failures[0]}")


def _keeping(benchmark: Benchmark, output: Output, notify: Notify) -> Notify:
    """``notify``, with what there is so far written after each step that ended."""

    def keeping(step: Progress) -> None:
        notify(step)
        if step.outcome and _measured(document := benchmark.document("interrupted")):
            output.keep(document)

    return keeping


def _measured(document: dict[str, Any]) -> bool:
    """Whether there is any figure in it."""
    return any(entry.get("samples", True) or entry.get("cold") for entry in document["results"])


# Progress on stderr, without a thread that would disturb what is measured


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Notify]:
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
