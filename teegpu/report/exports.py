"""A document as Markdown, CSV and SVG, and the strings of a record made harmless for each of them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator

from rich.console import Console, Group, RenderableType
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from teegpu import formats
from teegpu.report import facts, look
from teegpu.report.grid import HEADING, TOTAL, Grid
from teegpu.report.opening import opening
from teegpu.report.sections import Strip, sections
from teegpu.report.tables import strip_lines

PLAIN_WIDTH = 100
"""Width of tables that are not for a terminal."""

FORMATS = ("table", "json", "csv", "md", "html", "trace", "svg")

COLUMNS = ("run", "status", "model", "phase", "metric", "value")
"""CSV: one row for each figure. ``phase`` is empty for what belongs to none; units are in the metric's name."""

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~])")


def escape(text: str) -> str:
    """``text`` as it is, in Markdown: no emphasis, no link, nobody named, no HTML."""
    return _MARKDOWN.sub(r"\\\1", text).replace("&", "&amp;").replace("://", ":&#8203;//").replace("@", "&#64;")


def cell(text: str) -> str:
    """``text`` for a cell of CSV: a spreadsheet would take one that begins like a formula for one."""
    return f"'{text}" if text[:1] in "=+-@\t" and text else text


def as_csv(document: look.Document) -> str:
    """Every number of phases, latency, limit, link, memory and requests, one a row (``COLUMNS``)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    run = [cell(look.text(document, "id")), cell(look.text(document, "status")), cell(facts.model(document))]
    for phase in facts.PHASES:
        for name, value in look.numbers(look.at(document, "phases", phase)):
            writer.writerow([*run, phase, cell(name), value])
    for part in ("latency", "limit", "link", "memory", "requests"):
        for name, value in look.numbers(look.at(document, part), part):
            writer.writerow([*run, "", cell(name), value])
    return out.getvalue()


def as_markdown(document: look.Document) -> str:
    """The report for pasting into an issue: the same rows as on a terminal."""
    title = f"### Run {escape(look.text(document, 'id') or '(without an id)')}"
    told = [facts.status(document), *(" · ".join(part) for part in _about(document))]
    blocks = [title, "\n".join(f"- {escape(line)}" for line in told if line)]
    if note := look.text(document, "note"):
        blocks.append(f"> {escape(note)}")
    if lines := opening(document):
        blocks.append("\n".join(f"- **{label}:** {escape(line)}" for label, line in lines))
    for section in sections(document):
        if isinstance(section, Strip):
            heading, *rows = strip_lines(section, 100)
            blocks.append(f"#### {heading}\n\n```text\n" + "\n".join(row.rstrip() for row in rows) + "\n```")
        else:
            blocks += _grid(section)
    if advice := facts.advice(document):
        entries = []
        for entry in advice:
            setting = f"`{_code(entry['setting'])}`" if entry["setting"] else ""
            parts = (escape(entry["text"]), setting, facts.saving(entry))
            entries.append("1. " + " · ".join(part for part in parts if part))
        blocks.append("#### Advice\n\n" + "\n".join(entries))
    if remarks := facts.remarks(document):
        blocks.append("\n".join(f"> **{escape(line)}**" for line in remarks))
    return "\n\n".join(blocks) + "\n"


def _about(document: look.Document) -> list[list[str]]:
    parts = (facts.setup, facts.details, facts.latency, facts.environment, facts.server)
    return [part(document) for part in parts]


def _code(text: str) -> str:
    return text.replace("`", "'")


def _grid(grid: Grid) -> list[str]:
    """A table for each run of rows below one heading row: Markdown has headings only at the top."""
    blocks = [f"#### {escape(grid.title)}"]
    table: list[list[str]] = []
    for row in grid.rows:
        cells = [escape(part.strip()) for part in row.cells]
        if row.kind == HEADING and table:
            blocks.append(formats.markdown(table))
            table = []
        table.append([f"**{part}**" if part else "" for part in cells] if row.kind == TOTAL else cells)
    blocks.append(formats.markdown(table))
    if grid.notes:
        blocks.append(escape(" ".join(grid.notes)))
    return blocks


# SVG, as a terminal shows it

_THEME = TerminalTheme(
    (13, 17, 23),
    (230, 237, 243),
    [(72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34),
     (88, 166, 255), (188, 140, 255), (57, 197, 207), (177, 186, 196)],
    [(110, 118, 129), (255, 161, 152), (86, 211, 100), (227, 179, 65),
     (121, 192, 255), (210, 168, 255), (86, 212, 221), (255, 255, 255)],
)  # fmt: skip

_SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img" \
xml:space="preserve">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; \
font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""As rich's own, without the fonts that it would fetch from elsewhere. librsvg drops spaces at the beginning of a text
unless they are to be preserved."""


def as_svg(blocks: list[RenderableType], title: str, width: int) -> str:
    """What a terminal of ``width`` columns would show, as an image that needs nothing from elsewhere."""
    console = Console(
        file=io.StringIO(),
        width=width,
        record=True,
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
        markup=False,
        highlight=False,
        emoji=False,
        _environ={},
    )
    for block in blocks:
        console.print(block)
    return console.export_svg(title=title, theme=_THEME, code_format=_SVG, unique_id="report")


def as_plain(blocks: list[RenderableType], width: int) -> str:
    """The same as lines of text without colour and without spaces at their ends. What is no table keeps its lines, of
    whatever length: whoever searches them finds them whole."""
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False, highlight=False, _environ={})
    with console.capture() as captured:
        for part in _parts(blocks):
            console.print(part, soft_wrap=isinstance(part, Text))
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def _parts(blocks: Iterable[RenderableType]) -> Iterator[RenderableType]:
    for block in blocks:
        if isinstance(block, Group):
            yield from _parts(block.renderables)
        else:
            yield block
