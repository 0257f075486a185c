"""The report of a run for a terminal: readable at 60 columns, and without colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from teegpu.report import facts, look
from teegpu.report.grid import HEADING, TOTAL, Grid, Row
from teegpu.report.opening import opening
from teegpu.report.sections import Section, Strip, sections

SHADES = " ▁▂▃▄▅▆▇█"
ASCII_SHADES = " .:-=+*#%@"

LABEL_COLUMNS = 16
"""A label keeps so many columns, however narrow the terminal is."""

_STYLES = {HEADING: "bold cyan", TOTAL: "bold"}


def tables(document: look.Document) -> list[RenderableType]:
    """The report of a ``teegpu.report/1`` document, section by section; print them one after the other.

    Strings of the document become text, never markup or escape sequences, and what it lacks is left out or a dash.
    """
    blocks: list[RenderableType] = [header(document)]
    blocks += [_section(section) for section in sections(document)]
    blocks += [block for block in (_advice(document), _remarks(document)) if block is not None]
    return [blocks[0], *(Group(Text(), block) for block in blocks[1:])]


def header(document: look.Document) -> RenderableType:
    """What the run was and how fast: a few lines."""
    told = facts.status(document)
    first = Text(f"run {look.text(document, 'id') or '(without an id)'}", style="bold")
    if started := look.text(document, "started_at"):
        first.append(f" · {started}", style="not bold dim")
    found = [first]
    if told:
        found.append(Text(told, style="bold yellow"))
    found += [Text(" · ".join(told)) for told in (facts.setup(document), facts.details(document)) if told]
    if latency := facts.latency(document):
        found.append(Text(" · ".join(latency), style="bold"))
    for told_of in (facts.environment(document), facts.server(document)):
        if told_of:
            found.append(Text(" · ".join(told_of), style="dim"))
    if note := look.text(document, "note"):
        found.append(Text(f"note: {note}"))
    lines = opening(document)
    wide = max((len(label) for label, _ in lines), default=0)
    found += [Text.assemble((f"{label:<{wide}}  ", "bold cyan"), told) for label, told in lines]
    return Group(*found)


def _section(section: Section) -> RenderableType:
    return LayerStrip(section) if isinstance(section, Strip) else grid_table(section)


def grid_table(grid: Grid) -> RenderableType:
    """One grid under its title: labels to the left, figures to the right."""
    columns = grid.columns
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    # on a terminal that is too narrow for it all, the labels are left and figures take two lines
    labels = max(cell_len(row.cells[0]) for row in grid.rows)
    table.add_column(overflow="fold", min_width=min(labels, LABEL_COLUMNS))
    for _ in range(columns - 1):
        table.add_column(justify="right", overflow="fold")
    for row in grid.rows:
        table.add_row(*_cells(row, columns))
    return Group(Text(grid.title, style="bold underline"), table, *(Text(note, style="dim") for note in grid.notes))


def _cells(row: Row, columns: int) -> Iterator[Text]:
    for place in range(columns):
        yield Text(row.cells[place] if place < len(row.cells) else "", style=_STYLES.get(row.kind, ""))


class LayerStrip:
    """One line of characters per part, a character per layer, fuller for longer; the worst layer is marked and named.

    All lines share one scale. Where the layers are more than the columns, neighbours share a character, the longest of
    them counting. On a terminal without Unicode the shades are ASCII.
    """

    def __init__(self, strip: Strip) -> None:
        self.strip = strip

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shades = ASCII_SHADES if options.ascii_only else SHADES
        title, *lines = strip_lines(self.strip, options.max_width, shades)
        yield Text(title, style="bold underline")
        for number, line in enumerate(lines):
            dim = Style(dim=True) if number >= len(lines) - 2 else Style.null()
            yield Segment(line, dim)
            yield Segment.line()


def strip_lines(strip: Strip, width: int, shades: str = SHADES) -> list[str]:
    """Title, a line per part and one for all of them, the layers' numbers, and the worst layer."""
    names = [*strip.parts, "all"]
    label = max(cell_len(name) for name in names) + 4
    columns = max(8, width - label - 1)
    merged = -(-len(strip.layers) // columns)
    starts = range(0, len(strip.layers), merged)
    rows = {name: _merge(values, merged) for name, values in {**strip.parts, "all": strip.totals}.items()}
    # parts share a scale; all of them together have their own, or the parts would be pale
    most = max(max(rows[name]) for name in strip.parts)
    lines = [strip.title]
    for name, values in rows.items():
        top = max(values) if name == "all" else most
        lines.append(f"  {name}".ljust(label) + "|" + "".join(_shade(value, top, shades) for value in values) + "|")
    ruler = ""
    for place, start in enumerate(starts):
        told = str(strip.layers[start])
        if place == 0 or (place % 10 == 0 and place >= len(ruler) + 1):
            ruler = ruler.ljust(place) + told
    lines.append("  layer".ljust(label + 1) + ruler)
    mark = " " * (label + 1 + strip.worst // merged) + "^"
    told = f" {strip.worst_text}"
    if cell_len(mark + told) > width:
        mark = mark[: max(2, cell_len(mark) - cell_len(told) - 1)].rstrip("^").rstrip()
        told = f"{strip.worst_text} ^"
        lines.append(told.rjust(label + 2 + strip.worst // merged))
    else:
        lines.append(mark + told)
    return lines


def _merge(values: Sequence[float], size: int) -> list[float]:
    return [max(values[start : start + size]) for start in range(0, len(values), size)]


def _shade(value: float, most: float, shades: str) -> str:
    """What took any time is never blank."""
    if value <= 0 or most <= 0:
        return shades[0]
    return shades[max(1, min(len(shades) - 1, round(value / most * (len(shades) - 1))))]


def _advice(document: look.Document) -> RenderableType | None:
    entries = facts.advice(document)
    if not entries:
        return None
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for number, entry in enumerate(entries, 1):
        told = Text(entry["text"])
        more = [part for part in (entry["setting"], facts.saving(entry)) if part]
        if more:
            told.append("\n" + " · ".join(more), style="bold green")
        table.add_row(Text(f"{number}."), told)
    return Group(Text("Advice", style="bold underline"), table)


def _remarks(document: look.Document) -> RenderableType | None:
    found = facts.remarks(document)
    return Group(*(Text(f"! {line}", style="yellow") for line in found)) if found else None
