"""Charts as inline SVG, for the page: shares of a phase, its timeline, its layers. Colours are classes of the page's
style; each chart has a title and a description in words, and each shape says on its own what it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from teegpu.report.parts import NAMES, PARTS, breakdown
from teegpu.report.sections import Strip
from teegpu.report.timeline import Timeline
from teegpu.units import human_seconds

WIDTH = 960
LABEL_FROM = 0.075
"""A segment of at least this share of the width has its label in it."""

_PART_OF = {name: part for part, name in NAMES.items()}


def legend(parts: Iterable[str]) -> str:
    """The colours and names of ``parts``, in the order in which the charts stack them."""
    items = "".join(f'<li><span class="key {part}"></span>{escape(NAMES[part])}</li>' for part in parts)
    return f'<ul class="legend">{items}</ul>'


def shares(phase: Mapping[str, Any]) -> dict[str, int]:
    """Tenths of a percent of each exclusive part, as the tables have them: they add up to 1000."""
    parts = breakdown(phase)
    network, serialization = parts.communication
    return {
        "tee": sum(item.tenths for item in parts.tee),
        "serialization": serialization.tenths,
        "network": network.tenths,
        "server": parts.server.tenths,
        "gpu": sum(item.tenths for item in parts.gpu),
        "other": parts.other.tenths,
    }


def share_chart(name: str, phase: Mapping[str, Any]) -> str:
    """One bar: what share of the phase's wall time each part has."""
    tenths = shares(phase)
    told = ", ".join(f"{NAMES[part]} {value / 10:.1f} %" for part, value in tenths.items() if value)
    shapes, x = [], 0.0
    for part, value in tenths.items():
        if not value:
            continue
        width = value / 1000 * WIDTH
        label = f"{value / 10:.1f}%"
        shapes.append(
            f'<g><title>{escape(NAMES[part])}: {label}</title><rect class="{part}" x="{x:.1f}" y="0" '
            f'width="{max(width - 1, 0.5):.1f}" height="40"/>'
        )
        if width >= LABEL_FROM * WIDTH:
            # a narrow one has only its figure; the legend has the name
            text = f"{NAMES[part]} {label}" if width >= 9 * len(NAMES[part] + label) + 12 else label
            shapes.append(f'<text class="on-{part}" x="{x + width / 2:.1f}" y="25.5">{escape(text)}</text>')
        shapes.append("</g>")
        x += width
    return _svg(f"{name}: shares of the time", told, 40, shapes, "shares")


def timeline_chart(name: str, timeline: Timeline) -> str:
    """What the runner's time went into, step by step from the left to the right."""
    height, seconds = 150, max(timeline.seconds, timeline.step_seconds)
    scale = WIDTH / seconds
    shapes = []
    floors = [0.0] * len(timeline.steps)
    for part in PARTS:
        path = []
        for place, step in enumerate(timeline.steps):
            start = place * timeline.step_seconds
            length = min(timeline.step_seconds, seconds - start)
            if length <= 0 or not (share := min(1.0 - floors[place], step.get(part, 0.0) / length)) > 0:
                continue
            x, width = start * scale, max(0.4, length * scale)
            top = (1 - floors[place] - share) * height
            path.append(f"M{x:.1f} {top:.1f}h{width:.2f}v{share * height:.1f}h-{width:.2f}z")
            floors[place] += share
        if path:
            shapes.append(f'<path class="{part}" d="{"".join(path)}"><title>{escape(NAMES[part])}</title></path>')
    shapes += _axis(seconds, height)
    told = (
        f"{human_seconds(seconds)} in steps of {human_seconds(timeline.step_seconds)}; each shows what they went into"
    )
    return _svg(f"{name}: timeline", told, height + 22, shapes, "timeline")


def _axis(seconds: float, height: float) -> list[str]:
    labels = [f'<line class="axis" x1="0" x2="{WIDTH}" y1="{height}" y2="{height}"/>']
    for place, anchor in ((0.0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1.0, "end")):
        x = place * WIDTH
        labels.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{height}" y2="{height + 4}"/>')
        told = human_seconds(place * seconds)
        labels.append(f'<text class="label" text-anchor="{anchor}" x="{x:.1f}" y="{height + 18}">{told}</text>')
    return labels


def layer_chart(strip: Strip) -> str:
    """A column per layer, its parts stacked; the one that took longest is marked."""
    top, height, totals = 22, 150, strip.totals
    most = max(totals) or 1.0
    width = WIDTH / len(strip.layers)
    gap = 1.5 if width > 5 else 0.0
    shapes = []
    for place, layer in enumerate(strip.layers):
        parts = {name: values[place] for name, values in strip.parts.items() if values[place]}
        told = ", ".join(f"{name} {human_seconds(value)}" for name, value in parts.items())
        shapes.append(f"<g><title>Layer {layer}: {human_seconds(totals[place])} ({escape(told)})</title>")
        y = float(top + height)
        for name, value in parts.items():
            size = value / most * height
            y -= size
            shapes.append(
                f'<rect class="{_PART_OF[name]}" x="{place * width:.1f}" y="{y:.1f}" width="{width - gap:.1f}" '
                f'height="{size:.1f}"/>'
            )
        shapes.append("</g>")
    shapes += _layer_labels(strip, width, top, height)
    return _svg(strip.title, f"Worst: {strip.worst_text}", top + height + 22, shapes, "layers")


def _layer_labels(strip: Strip, width: float, top: int, height: int) -> list[str]:
    worst = (strip.worst + 0.5) * width
    anchor = "start" if worst < WIDTH / 3 else "end" if worst > WIDTH * 2 / 3 else "middle"
    labels = [
        f'<path class="mark" d="M{worst - 5:.1f} {top - 8}h10l-5 6z"/>',
        f'<text class="label strong" text-anchor="{anchor}" x="{worst:.1f}" y="{top - 11}">'
        f"{escape(strip.worst_text)}</text>",
    ]
    every = max(1, -(-len(strip.layers) * 34 // WIDTH))
    for place in range(0, len(strip.layers), every):
        labels.append(
            f'<text class="label" text-anchor="middle" x="{(place + 0.5) * width:.1f}" y="{top + height + 16}">'
            f"{strip.layers[place]}</text>"
        )
    return labels


_ids = "abcdefghijklmnopqrstuvwxyz"


def _svg(title: str, description: str, height: float, shapes: Sequence[str], kind: str) -> str:
    name = "".join(char for char in f"{kind}-{title}".lower() if char in _ids or char == "-")
    return (
        f'<svg class="{kind}" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="{name}-t {name}-d" '
        f'xmlns="http://www.w3.org/2000/svg"><title id="{name}-t">{escape(title)}</title>'
        f'<desc id="{name}-d">{escape(description)}</desc>{"".join(shapes)}</svg>'
    )
