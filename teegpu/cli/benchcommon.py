"""What the commands of ``teegpu bench`` share: their options, and how a benchmark is run and its result written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from teegpu.cli import interrupts
from teegpu.cli.common import message_console
from teegpu.cli.destination import Destination
from teegpu.errors import TeegpuError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from teegpu.bench.measure import Notify, Progress
    from teegpu.config import Config
    from teegpu.model.folder import ModelFolder

Model = Annotated[
    str | None, typer.Option(help="Catalogue name, Hugging Face id, folder or .gguf file.", show_default=False)
]
Offline = Annotated[bool | None, typer.Option("--offline", help="Never use the network to find the model.")]
Device = Annotated[str | None, typer.Option(help="Where the GPU server computes: auto, cpu, cuda or cuda:n.")]
Format = Annotated[
    str, typer.Option("--format", metavar="FORMAT", help="table, json, csv or md; else as the file's name says.")
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Write the result there, not to standard output.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


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
        if self._quietly.path is not None and self.form == "json":
            from teegpu.bench import render

            self._quietly.write(render.render(document, self.form))

    def write(self, document: dict[str, Any]) -> None:
        from teegpu.bench import render

        self._destination.write(render.render(document, self.form))


def load_settings(model: str | None, offline: bool | None, flags: Mapping[str, object], file: Path | None) -> Config:
    from teegpu import config, machine

    machine.share_cores()
    return config.load({"model.name": model, "model.offline": offline, **flags}, file)


def find_folder(settings: Config, output: Output) -> ModelFolder:
    from teegpu.cli.models import find_model

    return find_model(settings, quiet=output.quiet)


def conduct(benchmark: Benchmark, output: Output, *, keep: bool = False) -> None:
    """Runs it and writes its result, however it ended, as long as there is one. ``keep``: also after each step."""
    from teegpu.cli.benchprogress import shown

    try:
        with shown(quiet=output.quiet) as notify:
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

    def told(step: Progress) -> None:
        notify(step)
        if step.outcome and _measured(document := benchmark.document("interrupted")):
            output.keep(document)

    return told


def _measured(document: dict[str, Any]) -> bool:
    """Whether there is any figure in it."""
    return any(entry.get("samples", True) or entry.get("cold") for entry in document["results"])
