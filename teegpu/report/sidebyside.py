"""A comparison (``teegpu.compare/1``) for a terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import string
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from teegpu import formats
from teegpu.formats import NOTHING
from teegpu.report.exports import cell, escape
from teegpu.report.grid import HEADING, Grid, Row
from teegpu.report.measures import Measure, relative_change, signed_percent
from teegpu.report.tables import grid_table

Comparison = Mapping[str, Any]

NARROW = 74
"""Below this width a table leaves out the absolute differences; the change in percent stays."""

_GROUPS = (("latency.", "Latency"), ("phases.prefill.", "Prefill"), ("phases.decode.", "Decode"), ("", "Whole run"))

COLUMNS = ("run", "figure", "value", "reference", "difference", "change", "verdict")
"""CSV: a row for each run and figure; ``reference`` is the first run's figure, ``change`` a fraction of it."""


def letter(place: int) -> str:
    """What a run is called in a table: A, B, C; after Z they are numbered."""
    return string.ascii_uppercase[place] if place < len(string.ascii_uppercase) else f"#{place + 1}"


def compared(comparison: Comparison, width: int | None = None) -> list[RenderableType]:
    """What ``compare`` prints, for ``width`` columns (None: as wide as it takes)."""
    blocks: list[RenderableType] = [Group(*map(Text, _legend(comparison)))]
    if comparison["warnings"]:
        blocks.append(Group(*(Text(f"! {line}", style="yellow") for line in comparison["warnings"])))
    blocks += [grid_table(grid) for grid in grids(comparison, narrow=width is not None and width < NARROW)]
    if told := _thresholds(comparison):
        blocks.append(Group(*(Text(line, style="bold red" if line.startswith("FAILED") else "green") for line in told)))
    return [blocks[0], *(Group(Text(), block) for block in blocks[1:])]


def _legend(comparison: Comparison) -> list[str]:
    """A line for each run."""
    found = []
    for place, run in enumerate(comparison["runs"]):
        note = f"note: {run['note']}" if run["note"] else ""
        parts = [run["id"] or "(without an id)", run["model"], run["started_at"], note]
        found.append(f"{letter(place)}: " + " · ".join(part for part in parts if part))
    return found


def _thresholds(comparison: Comparison) -> list[str]:
    return [
        f"FAILED {entry['reason']}" if entry["failed"] else f"passed {entry['condition']} ({entry['run']})"
        for entry in comparison["thresholds"]
    ]


def grids(comparison: Comparison, *, narrow: bool = False) -> list[Grid]:
    """Two runs: one table. More: all values side by side, then each run against the first. None where no run has a
    figure."""
    if not comparison["figures"]:
        return []
    places = range(len(comparison["runs"]))
    tables = []
    if len(places) > 2:
        tables.append(_grid(comparison, "All runs", [letter(place) for place in places], lambda _, cells: cells))
    for place in places[1:]:
        headings = ["A", letter(place), *([] if narrow else ["difference"]), "change"]

        def pair(figure: Mapping[str, Any], cells: list[str], place: int = place) -> list[str]:
            apart = [] if narrow else [_difference(figure, place)]
            return [cells[0], cells[place], *apart, _change(figure, place)]

        tables.append(_grid(comparison, f"{letter(place)} against A", headings, pair))
    return tables


def _grid(comparison: Comparison, title: str, headings: list[str], write: Any) -> Grid:
    """Figures in their groups; ``write`` makes the cells of a row from a figure and all of its values in words."""
    rows, left = [], list(comparison["figures"])
    for prefix, group in _GROUPS:
        own = [figure for figure in left if figure["figure"].startswith(prefix)]
        left = [figure for figure in left if figure not in own]
        if own:
            rows.append(Row((group, *headings), HEADING))
        for figure in own:
            shown = _measure(figure).shown
            cells = [NOTHING if value is None else shown(value) for value in figure["values"]]
            rows.append(Row((f"  {figure['label'].removeprefix(group.lower() + ' ')}", *write(figure, cells))))
    return Grid(title, tuple(rows))


def _measure(figure: Mapping[str, Any]) -> Measure:
    return Measure(figure["figure"], figure["label"])


def _difference(figure: Mapping[str, Any], place: int) -> str:
    difference = figure["differences"][place]
    if difference is None:
        return NOTHING
    return ("+" if difference > 0 else "") + _measure(figure).shown(difference)


def _change(figure: Mapping[str, Any], place: int) -> str:
    change = relative_change(figure["values"][0], figure["values"][place])
    return NOTHING if change is None else f"{signed_percent(change)} {figure['verdicts'][place]}".rstrip()


def compared_markdown(comparison: Comparison) -> str:
    def items(lines: list[str]) -> Iterator[str]:
        if lines:
            yield "\n".join(lines)

    blocks = [*items([f"- {escape(line)}" for line in _legend(comparison)])]
    blocks += items([f"> **{escape(line)}**" for line in comparison["warnings"]])
    for grid in grids(comparison):
        body = [[escape(grid.title), *grid.rows[0].cells[1:]]]
        for row in grid.rows:
            first, *rest = (escape(part.strip()) for part in row.cells)
            body.append([f"**{first}**", *[""] * len(rest)] if row.kind == HEADING else [first, *rest])
        blocks.append(formats.markdown(body))
    blocks += items([f"- {escape(line)}" for line in _thresholds(comparison)])
    return "\n\n".join(blocks) + "\n"


def compared_csv(comparison: Comparison) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for place, run in enumerate(comparison["runs"]):
        for figure in comparison["figures"]:
            values = [figure["values"][place], figure["values"][0]]
            values += [figure["differences"][place], figure["changes"][place]]
            writer.writerow([cell(run["id"]), cell(figure["figure"]), *values, figure["verdicts"][place]])
    return out.getvalue()
