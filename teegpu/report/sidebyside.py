"""A comparison (``teegpu.compare/1``) for a terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from teegpu import formats
from teegpu.formats import NOTHING
from teegpu.report import look
from teegpu.report.comparison import signed_percent
from teegpu.report.exports import cell, escape
from teegpu.report.grid import HEADING, Grid, Row
from teegpu.report.measures import Measure
from teegpu.report.tables import grid_table

Comparison = Mapping[str, Any]

NARROW = 74
"""Below this width a table leaves out the absolute differences; the change in percent stays."""

_GROUPS = (("latency.", "Latency"), ("phases.prefill.", "Prefill"), ("phases.decode.", "Decode"), ("", "Whole run"))


def letter(place: int) -> str:
    """What a run is called in a table: A, B, C; after Z they are numbered."""
    return string.ascii_uppercase[place] if place < len(string.ascii_uppercase) else f"#{place + 1}"


def compared(comparison: Comparison, width: int | None = None) -> list[RenderableType]:
    """What ``compare`` prints, for ``width`` columns (None: as wide as it takes)."""
    blocks: list[RenderableType] = [Group(*(Text(line) for line in legend(comparison)))]
    if comparison["warnings"]:
        blocks.append(Group(*(Text(f"! {line}", style="yellow") for line in comparison["warnings"])))
    blocks += [grid_table(grid) for grid in grids(comparison, narrow=width is not None and width < NARROW)]
    if told := thresholds(comparison):
        blocks.append(Group(*(Text(line, style="bold red" if line.startswith("FAILED") else "green") for line in told)))
    return [blocks[0], *(Group(Text(), block) for block in blocks[1:])]


def legend(comparison: Comparison) -> list[str]:
    """A line for each run."""
    found = []
    for place, run in enumerate(comparison["runs"]):
        note = run["note"]
        parts = [run["id"] or "(without an id)", run["model"], run["started_at"], f"note: {note}" if note else ""]
        found.append(f"{letter(place)}: " + " · ".join(part for part in parts if part))
    return found


def thresholds(comparison: Comparison) -> list[str]:
    return [
        f"FAILED {entry['reason']}" if entry["failed"] else f"passed {entry['condition']} ({entry['run']})"
        for entry in comparison["thresholds"]
    ]


def grids(comparison: Comparison, *, narrow: bool = False) -> list[Grid]:
    """Two runs: one table. More: all values side by side, then each run against the first."""
    runs = len(comparison["runs"])
    tables = [_pair(comparison, place, narrow=narrow) for place in range(1, runs)]
    return tables if runs <= 2 else [_overview(comparison), *tables]


def _overview(comparison: Comparison) -> Grid:
    headings = [letter(place) for place in range(len(comparison["runs"]))]
    rows = []
    for title, figures in _grouped(comparison):
        rows.append(Row((title, *headings), HEADING))
        rows += [
            Row((f"  {label}", *(_value(measure, value) for value in figure["values"])))
            for label, measure, figure in figures
        ]
    return Grid("All runs", tuple(rows))


def _pair(comparison: Comparison, place: int, *, narrow: bool) -> Grid:
    rows = []
    headings = ["A", letter(place), *([] if narrow else ["difference"]), "change"]
    for title, figures in _grouped(comparison):
        rows.append(Row((title, *headings), HEADING))
        for label, measure, figure in figures:
            cells = [_value(measure, figure["values"][0]), _value(measure, figure["values"][place])]
            if not narrow:
                cells.append(_difference(measure, figure["differences"][place]))
            rows.append(Row((f"  {label}", *cells, _change(figure, place))))
    return Grid(f"{letter(place)} against A", tuple(rows))


def _grouped(comparison: Comparison) -> Iterator[tuple[str, list[tuple[str, Measure, Mapping[str, Any]]]]]:
    """Title, and (label, measure, figure) of those that belong under it."""
    left = list(comparison["figures"])
    for prefix, title in _GROUPS:
        own = [figure for figure in left if figure["figure"].startswith(prefix)]
        left = [figure for figure in left if figure not in own]
        if own:
            lead = title.lower() + " "
            yield (
                title,
                [
                    (figure["label"].removeprefix(lead), Measure(figure["figure"], figure["label"]), figure)
                    for figure in own
                ],
            )


def _value(measure: Measure, value: float | None) -> str:
    return NOTHING if value is None else measure.shown(value)


def _difference(measure: Measure, difference: float | None) -> str:
    if difference is None:
        return NOTHING
    sign = "+" if difference > 0 else ""
    return sign + measure.shown(difference)


def _change(figure: Mapping[str, Any], place: int) -> str:
    change = figure["changes"][place]
    if change is None:
        difference = figure["differences"][place]
        if difference is None:
            return NOTHING
        change = float("inf") if difference > 0 else float("-inf")
    return f"{signed_percent(change)} {figure['verdicts'][place]}".rstrip()


def compared_markdown(comparison: Comparison) -> str:
    blocks = ["\n".join(f"- {escape(line)}" for line in legend(comparison))]
    if comparison["warnings"]:
        blocks.append("\n".join(f"> **{escape(line)}**" for line in comparison["warnings"]))
    for grid in grids(comparison):
        heading = [escape(grid.title), *grid.rows[0].cells[1:]]
        body = []
        for row in grid.rows:
            cells = [escape(part.strip()) for part in row.cells]
            body.append([f"**{cells[0]}**", *[""] * (len(cells) - 1)] if row.kind == HEADING else cells)
        blocks.append(formats.markdown([heading, *body]))
    if told := thresholds(comparison):
        blocks.append("\n".join(f"- {escape(line)}" for line in told))
    return "\n\n".join(blocks) + "\n"


COMPARE_COLUMNS = ("run", "figure", "value", "reference", "difference", "change", "verdict")


def compared_csv(comparison: Comparison) -> str:
    """A row for each run and figure; ``reference`` is the first run's figure, ``change`` a fraction of it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COMPARE_COLUMNS)
    for place, run in enumerate(comparison["runs"]):
        for figure in comparison["figures"]:
            values: Sequence[Any] = figure["values"]
            row = [values[place], values[0], figure["differences"][place], figure["changes"][place]]
            writer.writerow([cell(run["id"]), cell(figure["figure"]), *row, figure["verdicts"][place]])
    return out.getvalue()


def failures(comparison: Comparison) -> list[str]:
    """Why thresholds were missed, a line each."""
    return [look.text(entry, "reason") for entry in comparison["thresholds"] if entry["failed"]]
