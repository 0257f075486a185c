"""Charts of the page as data: shares of a phase, its timeline, its layers. ``templates/page.html`` draws them as SVG;
each has a title and a description in words, and each shape says on its own what it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from teegpu.report.parts import PARTS, breakdown
from teegpu.report.sections import Strip
from teegpu.report.timeline import Timeline
from teegpu.units import human_seconds

WIDTH = 960
LABEL_FROM = 0.075
"""A segment of at least this share of the width has its label in it."""


@dataclass(frozen=True)
class Shape:
    """``paths``: (class, path of an SVG), of what ``title`` says."""

    title: str
    paths: list[tuple[str, str]]


@dataclass(frozen=True)
class Label:
    """``anchor``: the side of ``x`` that the text is on, as SVG names it."""

    text: str
    x: float
    y: float
    anchor: str = "middle"
    kind: str = "label"


@dataclass
class Chart:
    """In a field of ``width`` and ``height``; ``lines`` are paths of its axes."""

    kind: str
    name: str
    caption: str
    title: str
    description: str
    height: float
    shapes: list[Shape] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    width: int = WIDTH

    @property
    def id(self) -> str:
        """Unique on the page."""
        return f"{self.kind}-{self.name}"


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.1f} {y:.1f}h{width:.2f}v{height:.1f}h-{width:.2f}z"


def charts(name: str, phase: Mapping[str, Any], timeline: Timeline | None, layers: Strip | None) -> Iterable[Chart]:
    """Those of a phase that there are figures for."""
    yield _shares(name, phase)
    if timeline is not None and timeline.steps:
        yield _over_time(name, timeline)
    if layers is not None:
        yield _by_layer(name, layers)


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


def _shares(name: str, phase: Mapping[str, Any]) -> Chart:
    """One bar: what share of the phase's wall time each part has."""
    tenths = {part: value for part, value in shares(phase).items() if value}
    described = ", ".join(f"{PARTS[part].label} {value / 10:.1f} %" for part, value in tenths.items())
    title = f"{name.capitalize()}: shares of the time"
    chart = Chart("shares", name, "Shares of the time", title, described, 40)
    x = 0.0
    for part, value in tenths.items():
        width, label, figure = value / 1000 * WIDTH, PARTS[part].label, f"{value / 10:.1f}%"
        chart.shapes.append(Shape(f"{label}: {figure}", [(part, _box(x, 0, max(width - 1, 0.5), 40))]))
        if width >= LABEL_FROM * WIDTH:
            # a narrow one has only its figure; the legend has the name
            text = f"{label} {figure}" if width >= 9 * len(label + figure) + 12 else figure
            chart.labels.append(Label(text, x + width / 2, 25.5, kind="inside"))
        x += width
    return chart


def _over_time(name: str, timeline: Timeline) -> Chart:
    """What the runner's time went into, step by step from the left to the right."""
    height, seconds = 150, max(timeline.seconds, timeline.step_seconds)
    scale = WIDTH / seconds
    steps = f"{human_seconds(seconds)} in steps of {human_seconds(timeline.step_seconds)}"
    title, described = f"{name.capitalize()}: timeline", f"{steps}; each shows what they went into"
    chart = Chart("timeline", name, "Timeline: what each moment went into", title, described, height + 22)
    floors = [0.0] * len(timeline.steps)
    for part in PARTS:
        path = ""
        for place, step in enumerate(timeline.steps):
            start = place * timeline.step_seconds
            length = min(timeline.step_seconds, seconds - start)
            if length <= 0 or not (share := min(1.0 - floors[place], step.get(part, 0.0) / length)) > 0:
                continue
            top = (1 - floors[place] - share) * height
            path += _box(start * scale, top, max(0.4, length * scale), share * height)
            floors[place] += share
        if path:
            chart.shapes.append(Shape(PARTS[part].label, [(part, path)]))
    chart.lines.append(f"M0 {height}H{WIDTH}")
    for quarter, anchor in enumerate(("start", "middle", "middle", "middle", "end")):
        x = quarter / 4 * WIDTH
        chart.lines.append(f"M{x:.1f} {height}v4")
        chart.labels.append(Label(human_seconds(quarter / 4 * seconds), x, height + 18, anchor))
    return chart


def _by_layer(name: str, strip: Strip) -> Chart:
    """A column per layer, its parts stacked; the one that took longest is marked."""
    top, height, totals = 22, 150, strip.totals
    described = f"Worst: {strip.worst_text}"
    chart = Chart("layers", name, "Time by layer", strip.title, described, top + height + 22)
    width = WIDTH / len(strip.layers)
    gap = 1.5 if width > 5 else 0.0
    of_label = {part.label: part.name for part in PARTS.values()}
    for place, layer in enumerate(strip.layers):
        y, told, paths = float(top + height), [], []
        for label, values in strip.parts.items():
            if values[place]:
                size = values[place] / (max(totals) or 1.0) * height
                y -= size
                told.append(f"{label} {human_seconds(values[place])}")
                paths.append((of_label[label], _box(place * width, y, width - gap, size)))
        chart.shapes.append(Shape(f"Layer {layer}: {human_seconds(totals[place])} ({', '.join(told)})", paths))
    worst = (strip.worst + 0.5) * width
    anchor = "start" if worst < WIDTH / 3 else "end" if worst > WIDTH * 2 / 3 else "middle"
    chart.shapes.append(Shape(strip.worst_text, [("mark", f"M{worst - 5:.1f} {top - 8}h10l-5 6z")]))
    chart.labels.append(Label(strip.worst_text, worst, top - 11, anchor, "label strong"))
    for place in range(0, len(strip.layers), max(1, -(-len(strip.layers) * 34 // WIDTH))):
        chart.labels.append(Label(str(strip.layers[place]), (place + 0.5) * width, top + height + 16))
    return chart
