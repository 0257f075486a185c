"""Saved results of the ladder as one SVG: a row for each rung, a column for each result, which is to say each link.

Each column has a linear scale of its own that begins at zero, since links differ by orders of magnitude; every bar has
its figure beside it. The SVG has its own white ground and needs no style from outside, so it reads the same on a light
page and on a dark one. The colours are those of Okabe and Ito, which colour-blind people tell apart. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

from teegpu.bench.rungs import RUNGS, Track
from teegpu.errors import UsageError, nearest
from teegpu.units import human_seconds
from transports.errors import LinkSpecError
from transports.netem.spec import LinkSpec

WIDTH = 880
PHASES = ("prefill", "decode")

_LEFT, _RIGHT, _GAP = 186, 12, 14
_FIGURE = 52
"""Room for the figure after the longest bar."""
_ACROSS = 4
"""Columns beside each other; more go below."""
_ROW, _BAR, _SPACE = 24, 15, 12
_HEAD, _PANEL_HEAD, _FOOT = 66, 30, 20

_COLOURS: dict[Track, str] = {
    "prefill": "#0072b2",
    "decode": "#0072b2",
    "beside": "#56b4e9",
    "baseline": "#999999",
    "case": "#0072b2",
}
_LOCAL, _INK, _DIM, _LINE = "#d55e00", "#222222", "#555555", "#dddddd"


def check_phase(phase: str) -> None:
    """Raises ``UsageError`` for a phase that there is none of."""
    if phase not in PHASES:
        raise UsageError(f"--phase {phase} is not one of {', '.join(PHASES)}{nearest(phase, list(PHASES))}")


@dataclass(frozen=True)
class Bar:
    """Seconds of a rung. ``limit``: what it can't go below, None where that is not known, or without a server."""

    label: str
    track: Track
    median: float
    least: float
    largest: float
    limit: float | None
    cold: bool


class Row(NamedTuple):
    name: str
    label: str
    track: Track


@dataclass(frozen=True)
class Panel:
    """One result: ``of`` says of what model and prompt, which is the same for all panels of a picture."""

    of: str
    where: str
    heading: str
    bars: Mapping[str, Bar]

    @classmethod
    def read(cls, document: Mapping[str, Any], phase: str) -> Panel:
        """Raises ``LookupError``, ``TypeError``, ``ValueError``, ``AttributeError`` for a document that is damaged."""
        settings, machine = document["settings"], document["machine"]
        tokens = f"{settings['prompt_tokens']:,} tokens"
        cores = machine["cores"]
        return cls(
            of=f"{document['model']['name']}: {_TITLES[phase].format(tokens=tokens)}",
            where=f"{machine['cpu']}, {cores} core{'s' * (cores != 1)}, teegpu {document['versions']['teegpu']}",
            heading=link_name(settings["link"], settings["endpoint"]),
            bars={entry["rung"]: _bar(entry, phase) for entry in document["results"] if _is_of(entry, phase)},
        )


_TITLES = {"prefill": "prefill of {tokens}, in seconds", "decode": "decode after {tokens}, in milliseconds a token"}


def link_name(link: str, endpoint: str) -> str:
    """``1 Gbit/s, 5 ms``; what a link is called above its column."""
    if not link:
        return "server at the endpoint" if endpoint else "loopback"
    try:
        spec = LinkSpec.parse(link)
    except LinkSpecError as error:
        raise ValueError(str(error)) from None
    rtt = human_seconds(spec.rtt_seconds)
    if spec.up_bytes_per_second != spec.down_bytes_per_second:
        return link
    if math.isinf(spec.up_bytes_per_second):
        return f"no limit, {rtt}"
    megabits = spec.up_bytes_per_second * 8 / 1e6
    rate = f"{megabits / 1e3:g} Gbit/s" if megabits >= 1e3 else f"{megabits:g} Mbit/s"
    return f"{rate}, {rtt}"


def _is_of(entry: Mapping[str, Any], phase: str) -> bool:
    """Whether a picture of ``phase`` shows this rung."""
    tracks = ("prefill", "beside", "baseline", "case") if phase == "prefill" else ("decode", "baseline", "case")
    return entry["track"] in tracks and phase in entry


def _bar(entry: Mapping[str, Any], phase: str) -> Bar:
    figures = entry[phase]
    seconds = figures["seconds" if phase == "prefill" else "seconds_per_token"]
    limit = figures["limit_seconds"]
    if limit is not None and phase == "decode":
        limit = limit / (figures["steps"] * figures["tokens_per_step"])
    if not entry["case"]["remote"]:
        limit = None
    bar = Bar(
        entry["label"], entry["track"], seconds["median"], seconds["min"], seconds["max"], limit, bool(entry["cold"])
    )
    if not all(math.isfinite(value) and value >= 0 for value in (bar.median, bar.least, bar.largest, bar.limit or 0)):
        raise ValueError("a time is a number that is not below zero")
    return bar


def plot(panels: Sequence[Panel], phase: str) -> str:
    """The SVG. Raises ``UsageError`` where the panels are not of one model and prompt, or have no bar."""
    others = sorted({panel.of for panel in panels})
    if len(others) > 1:
        raise UsageError(f"these results are not of one model and prompt, but of {'; '.join(others)}: draw them apart")
    known = {name: Row(name, bar.label, bar.track) for panel in panels for name, bar in panel.bars.items()}
    # In the ladder's order, whatever the order of the files.
    places = {name: place for place, name in enumerate(RUNGS)}
    rows = sorted(known.values(), key=lambda row: places.get(row.name, len(places)))
    if not rows:
        raise UsageError(f"there is no {phase} in these results: nothing to draw")
    blocks = [panels[start : start + _ACROSS] for start in range(0, len(panels), _ACROSS)]
    tall = _PANEL_HEAD + sum(height for _, height in _heights(rows)) + _SPACE
    shapes: list[str] = []
    for place, block in enumerate(blocks):
        shapes += _block(block, rows, phase, _HEAD + place * tall)
    notes = _legend(panels, rows)
    top = _HEAD + len(blocks) * tall + 8
    shapes += [
        f'<text x="20" y="{top + place * 18 + 6}" font-size="12" fill="{_DIM}">{line}</text>'
        for place, line in enumerate(notes)
    ]
    return _svg(panels[0], top + len(notes) * 18 + _FOOT - 8, shapes)


def _heights(rows: Sequence[Row]) -> Iterator[tuple[Row, int]]:
    """Each row and its height: those of another track have some space before them."""
    before: Track | None = None
    for row in rows:
        yield row, _ROW + (_SPACE if before not in (None, row.track) else 0)
        before = row.track


def _block(panels: Sequence[Panel], rows: Sequence[Row], phase: str, top: int) -> list[str]:
    width = (WIDTH - _LEFT - _RIGHT) / len(panels)
    bottom = top + _PANEL_HEAD + sum(height for _, height in _heights(rows))
    shapes = []
    y = top + _PANEL_HEAD
    for row, height in _heights(rows):
        y += height
        label = escape(row.label)
        shapes.append(
            f'<text x="{_LEFT - 10}" y="{y - 8}" font-size="13" text-anchor="end" fill="{_INK}">{label}</text>'
        )
    for place, panel in enumerate(panels):
        x = _LEFT + place * width
        shapes.append(
            f'<text x="{x:.1f}" y="{top + 16}" font-size="13" font-weight="bold" fill="{_INK}">'
            f"{escape(panel.heading)}</text>"
        )
        shapes += _panel(panel, rows, phase, x, width - _GAP, top + _PANEL_HEAD, bottom)
    return shapes


def _panel(
    panel: Panel, rows: Sequence[Row], phase: str, left: float, width: float, top: float, bottom: float
) -> list[str]:
    largest = max((bar.largest for bar in panel.bars.values()), default=0.0) or 1.0
    scale = (width - _FIGURE) / largest
    shapes = [f'<line x1="{left:.1f}" x2="{left:.1f}" y1="{top}" y2="{bottom}" stroke="{_LINE}"/>']
    local = panel.bars.get("local")
    if local is not None:
        x = left + local.median * scale
        shapes.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="{_LOCAL}" stroke-width="1.5" '
            'stroke-dasharray="4 3"/>'
        )
    y = top
    for row, height in _heights(rows):
        y += height
        shapes.append(_shown(row, panel.bars.get(row.name), phase, left, y - _ROW, scale))
    return shapes


def _shown(row: Row, bar: Bar | None, phase: str, left: float, top: float, scale: float) -> str:
    middle = top + _ROW / 2
    if bar is None:
        return f'<text x="{left + 5:.1f}" y="{middle + 4:.1f}" font-size="12" fill="{_DIM}">–</text>'
    length = max(bar.median * scale, 1.0)
    title = f"{row.label}: {human_seconds(bar.median)} ({human_seconds(bar.least)} to {human_seconds(bar.largest)})"
    shapes = [
        f"<g><title>{escape(title)}</title>",
        f'<rect x="{left:.1f}" y="{middle - _BAR / 2:.1f}" width="{length:.1f}" height="{_BAR}" '
        f'fill="{_COLOURS[row.track]}"/>',
    ]
    if bar.largest > bar.least:
        shapes.append(
            f'<line x1="{left + bar.least * scale:.1f}" x2="{left + bar.largest * scale:.1f}" y1="{middle:.1f}" '
            f'y2="{middle:.1f}" stroke="{_INK}"/>'
        )
    if bar.limit is not None:
        x = left + min(bar.limit, bar.largest) * scale
        shapes.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{middle - _BAR / 2 - 3:.1f}" y2="{middle + _BAR / 2 + 3:.1f}" '
            f'stroke="{_INK}" stroke-width="2"/>'
        )
    figure = _figure(bar.median if phase == "prefill" else bar.median * 1e3) + ("*" if bar.cold else "")
    x = left + max(length, bar.largest * scale) + 5
    # A white rim keeps it readable where it lies on the dashed line.
    shapes.append(
        f'<text x="{x:.1f}" y="{middle + 4:.1f}" font-size="12" fill="{_INK}" stroke="#ffffff" stroke-width="3" '
        f'paint-order="stroke">{figure}</text></g>'
    )
    return "".join(shapes)


def _figure(value: float) -> str:
    """Three digits that say something."""
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f}"


def _legend(panels: Sequence[Panel], rows: Sequence[Row]) -> list[str]:
    lines = ["Bars: medians; thin line: least to largest; scales differ between columns."]
    bars = [bar for panel in panels for bar in panel.bars.values()]
    if any(bar.limit is not None for bar in bars):
        lines[0] += " Black mark: what link, server and TEE allow at least."
    if any(row.name == "local" for row in rows):
        lines.append(
            f'<tspan fill="{_LOCAL}" font-weight="bold">Dashed</tspan>: local, everything in the TEE. Offloading pays '
            "where a bar ends before it."
        )
    if any(bar.cold for bar in bars):
        lines.append("* one run alone, the first one.")
    return lines


def _svg(panel: Panel, height: int, shapes: Sequence[str]) -> str:
    title = escape(panel.of)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="{title}">\n'
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>\n'
        f'<text x="20" y="30" font-size="17" font-weight="bold" fill="{_INK}">{title}</text>\n'
        f'<text x="20" y="50" font-size="12" fill="{_DIM}">{escape(panel.where)}</text>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )
