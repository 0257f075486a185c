"""``teegpu report``: what was recorded of runs, for people, for other programs, and for CI."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teegpu.cli.advising import advised
from teegpu.cli.common import Commands, ConfigFile, message_console, result_console
from teegpu.cli.destination import STDOUT, Destination
from teegpu.errors import RecordError, ThresholdError, UsageError
from teegpu.files import there
from teegpu.units import plural

if TYPE_CHECKING:
    from rich.console import RenderableType

    from teegpu.record.events import Event
    from teegpu.record.run import RunFolder
    from teegpu.record.store import RunStore
    from teegpu.report.listing import Line

app = Commands(
    help="Show where the time of a run went, compare runs, and write what was recorded for other programs.",
    no_args_is_help=True,
    add_completion=False,
)

Format = Annotated[
    str,
    typer.Option(
        "--format", metavar="FORMAT", help="table, json, csv, md, html, trace or svg; else as the file's name says."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="The same as --format json.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Write it there; '-' is standard output.", show_default=False),
]
Brief = Annotated[bool, typer.Option("--brief", help="Only how it went, what took most, and what to do.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file of --out if it is there.")]
Run = Annotated[
    str, typer.Argument(metavar="ID", help="A run of 'teegpu report list', a unique beginning of it, 'last', or a file "
                        "that 'teegpu run --json' wrote.")
]  # fmt: skip

SVG_WIDTH = 88


@app.command()
def show(
    run: Run,
    form: Format = "",
    as_json: AsJson = False,
    brief: Brief = False,
    out: Out = None,
    force: Force = False,
    config_file: ConfigFile = None,
) -> None:
    """Show a run.

    Formats: table for a terminal; json, the document teegpu.report/1; csv, a row for each figure (run, status, model,
    phase, metric, value); md, for an issue; html, one page with charts; trace, for ui.perfetto.dev; svg, the tables as
    an image.
    """
    _show(run, form, as_json, brief, out, force, config_file)


def last(**given: Any) -> None:
    """Show the newest run."""
    show("last", **given)


_options = [each for each in inspect.signature(show, eval_str=True).parameters.values() if each.name != "run"]
vars(last)["__signature__"] = inspect.Signature(_options)
last.__annotations__ = {each.name: each.annotation for each in _options}
app.command()(last)


@app.command("list")
def list_runs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="The newest N; 0: all.")] = 20,
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help="table or json.")] = "",
    as_json: AsJson = False,
    config_file: ConfigFile = None,
) -> None:
    """List the recorded runs, newest first."""
    import json
    from datetime import UTC, datetime

    from teegpu.report.listing import entry, listing

    as_json = _form(form, as_json, None, ("table", "json")) == "json"
    runs = _store(config_file).all()
    newest = runs[:limit] if limit else runs
    chosen = [one for one in map(_line, newest) if one is not None]
    if as_json:
        text = json.dumps({"schema": "teegpu.runs/1", "runs": [entry(line) for line in chosen]}, indent=2)
        Destination(None, force=False).write(text + "\n")
        return
    if not chosen:
        message_console().print(_NO_RUNS)
        return
    console = result_console()
    for line in listing(chosen, datetime.now(UTC), console.width if console.is_terminal else None):
        console.print(line, soft_wrap=not console.is_terminal)
    if len(runs) > len(newest):
        message_console().print(f"and {len(runs) - len(newest)} older ones: --limit 0 lists all")


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="A B [C…]", help="Runs as for 'show'; A is what the others are held against.")
    ],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Exit with code 9 where a run after A meets it. 'tpot_median_seconds>5%': more than 5 % above A; "
            "'ttft_seconds>1.5': above 1.5; 'decode.tokens_per_second<-5%': more than 5 % below A. A figure is named "
            "by its path in the JSON document. Give it several times.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="table, json, csv or md; else as the file's name says.")
    ] = "",
    as_json: AsJson = False,
    out: Out = None,
    force: Force = False,
    config_file: ConfigFile = None,
) -> None:
    """Compare runs: their figures side by side, and the differences to the first."""
    from teegpu.report import comparison, sidebyside

    form = _form(form, as_json, out, ("table", "json", "csv", "md"))
    destination = Destination(out, force=force)
    if len(runs) < 2:
        raise UsageError("compare needs two runs at least: 'teegpu report list' has them")
    store = _store(config_file)
    documents = [_document(_find(store, run), store) for run in runs]
    compared = comparison.comparison(documents, fail_if or ())
    if form == "table":
        _print(lambda width: sidebyside.compared(compared, width), destination)
    elif form == "json":
        from teegpu.formats import as_json as json_text

        destination.write(json_text(compared))
    else:
        destination.write((sidebyside.compared_csv if form == "csv" else sidebyside.compared_markdown)(compared))
    failures = comparison.failures(compared)
    if failures:
        raise ThresholdError("; ".join(failures))


@app.command()
def rm(
    runs: Annotated[list[str] | None, typer.Argument(metavar="ID…", help="Runs, as for 'show'.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All runs that have ended.")] = False,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Those that began longer ago: 12h, 7d, 4w.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    config_file: ConfigFile = None,
) -> None:
    """Delete the records of runs. Runs that are still going are kept."""
    if not (runs or everything or older_than):
        raise UsageError("name the runs to delete, or give --all or --older-than AGE")
    if runs and (everything or older_than):
        raise UsageError("--all and --older-than choose the runs themselves: leave the ids out")
    seconds = None if older_than is None else _age(older_than)
    store = _store(config_file)
    chosen = [store.find(name) for name in dict.fromkeys(runs)] if runs else _ended(store, seconds)
    chosen = list({run.id: run for run in chosen}.values())
    if not chosen:
        message_console().print("there is nothing to delete")
        return
    if not (yes or _confirmed(chosen)):
        message_console().print("nothing is deleted")
        return
    for run in chosen:
        if run.status == "running" and there(run.path):  # another who removes it holds it as a run does
            raise RecordError(f"run {run.id} is still going: end it first, then delete its record")
    for number, run in enumerate(chosen):
        try:
            store.remove(run)
        except RecordError as error:
            raise RecordError(f"{error} ({number} of {len(chosen)} are deleted)") from None
    message_console().print(f"deleted {plural(len(chosen), 'record')}")


_NO_RUNS = "no runs are recorded yet: 'teegpu run \"Hello\"' makes one (record.keep must be true)"


def _store(config_file: Path | None) -> RunStore:
    from teegpu import config
    from teegpu.record.store import open_store

    return open_store(config.load({}, config_file))


def _find(store: RunStore, name: str) -> RunFolder | Path:
    """The run, or the file that is meant. Raises ``RecordError``."""
    path = Path(name)
    try:
        if (path.suffix == ".json" or "/" in name) and path.is_file():
            return path
    except OSError as error:
        raise RecordError(f"{path} can't be read: {error.strerror}") from None
    return store.find(name)


def _document(found: RunFolder | Path, store: RunStore) -> dict[str, Any]:
    """The document of a run. One that did not end by itself has not been advised yet."""
    from teegpu.report import look
    from teegpu.stats.document import recorded

    if isinstance(found, Path):
        return look.read(found)
    document = look.check(recorded(found), f"the record of run {found.id}")
    if not document.get("advice") and document.get("status") in ("interrupted", "running"):
        return advised(document, store)
    return document


def _events(found: RunFolder | Path) -> Iterable[Event]:
    """The events of a run, none for a document without a record. What is damaged is told to the user."""
    if isinstance(found, Path):
        return
    reader = found.events()
    try:
        while events := reader.read(8192):
            yield from events
        for line in reader.damage:
            message_console().print(f"damaged record: {line}")
    finally:
        reader.close()


def _form(form: str, as_json: bool, out: Path | None, known: Sequence[str]) -> str:
    from teegpu.formats import choose

    if as_json and form not in ("", "json"):
        raise UsageError(f"--json and --format {form} are two formats: give one of them")
    return "json" if as_json else choose(form, out.name if out is not None else "", known)


def _show(
    name: str, form: str, as_json: bool, brief: bool, out: Path | None, force: bool, config_file: Path | None
) -> None:
    from teegpu.report import exports, facts
    from teegpu.report.tables import header, tables

    form = _form(form, as_json, out, exports.FORMATS)
    if brief and form != "table":
        raise UsageError(f"--brief is for a terminal, and {form} has everything: leave one out")
    destination = Destination(out, force=force)
    if form in ("html", "trace", "svg") and out is None and sys.stdout.isatty():
        raise UsageError(f"--format {form} is not for a terminal: give --out FILE, or '--out {STDOUT}' if it is meant")
    store = _store(config_file)
    found = _find(store, name)
    document = _document(found, store)
    if form == "table":
        _print(lambda _: [header(document)] if brief else tables(document), destination)
    elif form == "trace":
        destination.write(_trace(found, document))
    else:
        title = f"teegpu report {'last' if name == 'last' else f'show {name}'}"
        # JSON is the only format with the text, of a run that was to save it
        private = form == "json" and any(answer.get("text") for answer in facts.answers(document))
        destination.write(_export(form, found, document, title), private=private)


def _export(form: str, found: RunFolder | Path, document: dict[str, Any], title: str) -> str:
    from teegpu.report import exports

    if form == "json":
        from teegpu.formats import as_json

        return as_json(document)
    if form == "csv":
        return exports.as_csv(document)
    if form == "md":
        return exports.as_markdown(document)
    if form == "svg":
        from teegpu.report.tables import tables

        return exports.as_svg(tables(document), title, SVG_WIDTH)
    from teegpu.report.page import page

    return page(document, _events(found))


def _trace(found: RunFolder | Path, document: dict[str, Any]) -> Iterable[str]:
    if isinstance(found, Path):
        raise RecordError(f"{found} has no events to make a trace of: name a recorded run ('teegpu report list')")
    from teegpu.report import look
    from teegpu.report.trace import trace

    if look.at(document, "record", "truncated") is True:
        message_console().print("the trace ends before the run does: record.events_mib was reached")
    return trace(_events(found), document)


def _print(blocks: Any, destination: Destination) -> None:
    """``blocks(width)`` are printed as the terminal can take them, or written as plain text."""
    console = result_console()
    if destination.path is None and console.is_terminal:
        for block in blocks(console.width):
            console.print(block)
        return
    from teegpu.report.exports import PLAIN_WIDTH, as_plain

    rendered: list[RenderableType] = blocks(PLAIN_WIDTH)
    destination.write(as_plain(rendered, PLAIN_WIDTH))


def _line(run: RunFolder) -> Line | None:
    """A run for the list. One that can't be read has a line that says so, and one that went meanwhile has none."""
    from teegpu.report import look
    from teegpu.report.listing import Line
    from teegpu.stats.document import recorded
    from teegpu.units import printable

    try:
        return Line(run.id, run.status, look.check(recorded(run), f"the record of run {run.id}"))
    except RecordError as error:
        return Line(run.id, "unreadable", {}, printable(str(error))) if there(run.path) else None


def _begun(run: RunFolder) -> Line:
    """A run of which only its beginning matters."""
    from teegpu.report.listing import Line

    try:
        return Line(run.id, run.status, run.meta())
    except RecordError:
        return Line(run.id, "unreadable", {})


def _ended(store: RunStore, older_than_seconds: float | None) -> list[RunFolder]:
    from datetime import UTC, datetime

    now = datetime.now(UTC)
    chosen = []
    for run in store.all():
        if run.status == "running":
            continue
        age = _begun(run).age_seconds(now)
        if older_than_seconds is None or (age is not None and age > older_than_seconds):
            chosen.append(run)
    return chosen


def _age(text: str) -> float:
    """``7d`` in seconds. Raises ``UsageError``."""
    found = re.fullmatch(r"(\d{1,6})([smhdw])", text.strip().lower())
    if found is None:
        raise UsageError(f"--older-than {text} is not an age such as 12h, 7d or 4w")
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[found[2]]


def _confirmed(runs: Sequence[RunFolder]) -> bool:
    """What the user answers. Raises ``UsageError`` where there is nobody to ask."""
    what = f"run {runs[0].id}" if len(runs) == 1 else f"{len(runs)} runs"
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(f"there is no terminal to ask on whether to delete the record of {what}: give --yes")
    sys.stderr.write(f"Delete the record of {what}? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
