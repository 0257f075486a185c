"""Lines of a terminal as data, and the few shapes that are drawn with them. Pure; colours come later.

A ``Line`` is a tuple of spans, each a text and a role (``"tee"``, ``"dim"``, ``"gpu on network"``). Equal lines look
alike, so that a view can tell which of its lines have changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from rich.cells import cell_len, set_cell_size

from teegpu.report.parts import PARTS

Span = tuple[str, str]
Line = tuple[Span, ...]

_LEFT: Final = " ▏▎▍▌▋▊▉"
_LOWER: Final = " ▁▂▃▄▅▆▇█"
_EIGHTHS: Final = 8


@dataclass(frozen=True, slots=True)
class Look:
    """How to draw. ``letters``: parts as letters and not as colours."""

    letters: bool = False


def plain(line: Line) -> str:
    return "".join(text for text, _ in line)


def length(line: Line) -> int:
    return sum(cells(text) for text, _ in line)


def cells(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)


def clip(text: str, width: int) -> str:
    """``text`` in at most ``width`` cells; an ellipsis says that there was more."""
    if cells(text) <= width:
        return text
    return set_cell_size(text, max(0, width - 1)).rstrip() + "…" if width > 0 else ""


def fit(line: Line, width: int) -> Line:
    """``line`` in exactly ``width`` cells."""
    room = width
    out: list[Span] = []
    for text, role in line:
        size = cells(text)
        if size > room:
            text, size = clip(text, room), room
            text += " " * (room - cells(text))
        if text:
            out.append((text, role))
        room -= size
        if room <= 0:
            break
    if room > 0:
        out.append((" " * room, ""))
    return tuple(out)


def sides(left: Iterable[Span], right: Iterable[Span], width: int) -> Line:
    """``left`` and ``right`` at the two ends of a line; where they do not both fit, ``left`` is cut."""
    left, right = tuple(left), tuple(right)
    room = width - length(right)
    if room < 4:
        return fit(left, width)
    return (*fit(left, room - 1), (" ", ""), *right)


def wrapped(parts: Sequence[Sequence[Span]], joint: Span, width: int) -> list[Line]:
    """``parts`` joined into lines of at most ``width``, none of them torn apart."""
    lines: list[list[Span]] = []
    used = 0
    for part in parts:
        size = length(tuple(part))
        if lines and used + cells(joint[0]) + size <= width:
            lines[-1] += [joint, *part]
            used += cells(joint[0]) + size
        else:
            lines.append(list(part))
            used = size
    return [tuple(line) for line in lines]


# Bars


def stacked(values: Sequence[float], width: int, look: Look, *, scale: float | None = None) -> list[Span]:
    """One bar of ``PARTS`` in ``width`` cells, to an eighth of a cell. A full bar is ``scale`` (default: their sum)."""
    total = sum(values)
    whole = total if scale is None else scale
    if width <= 0:
        return []
    if whole <= 0 or total <= 0:
        return [(" " * width, "on track")]
    steps = width * (1 if look.letters else _EIGHTHS)
    edges: list[tuple[int, str]] = []
    sum_so_far = 0.0
    for role, value in zip(PARTS, values, strict=False):
        sum_so_far += value
        edges.append((min(steps, round(sum_so_far / whole * steps)), role))
    return _lettered(edges, width) if look.letters else _coloured(edges, width)


def _lettered(edges: Sequence[tuple[int, str]], width: int) -> list[Span]:
    spans: list[Span] = []
    at = 0
    for edge, role in edges:
        if edge > at:
            spans.append((PARTS[role].letter * (edge - at), role))
            at = edge
    if at < width:
        spans.append((" " * (width - at), ""))
    return spans


def _coloured(edges: Sequence[tuple[int, str]], width: int) -> list[Span]:
    spans: list[Span] = []
    cell = 0
    pending: tuple[int, str] | None = None  # eighths of the open cell that are filled, and with what
    for edge, role in [*edges, (width * _EIGHTHS, "track")]:
        if pending is not None:
            filled, first = pending
            if edge <= cell * _EIGHTHS + filled:
                continue
            if edge < (cell + 1) * _EIGHTHS and role != "track":
                # A third part in one cell: two colours are all that it can have, so the larger neighbour wins it.
                if edge - cell * _EIGHTHS - filled > filled:
                    pending = (edge - cell * _EIGHTHS, role)
                else:
                    pending = (edge - cell * _EIGHTHS, first)
                continue
            spans.append((_LEFT[filled], f"{first} on {role}"))
            cell += 1
            pending = None
        full = edge // _EIGHTHS
        if full > cell:
            spans.append((" " * (full - cell), f"on {role}"))
            cell = full
        rest = edge - cell * _EIGHTHS
        if rest > 0:
            pending = (rest, role)
    return spans


def gauge(fraction: float, width: int, role: str, look: Look) -> list[Span]:
    """How much of something is done."""
    fraction = min(1.0, max(0.0, fraction))
    if look.letters:
        full = round(fraction * width)
        return [("#" * full, role), ("-" * (width - full), "dim")]
    eighths = round(fraction * width * _EIGHTHS)
    full, rest = divmod(eighths, _EIGHTHS)
    spans: list[Span] = [(" " * full, f"on {role}")] if full else []
    if rest:
        spans.append((_LEFT[rest], f"{role} on track"))
    empty = width - full - bool(rest)
    if empty:
        spans.append((" " * empty, "on track"))
    return spans


# Charts over time


def resampled(values: Sequence[float], width: int) -> list[float]:
    """``values`` as ``width`` of them: means of neighbours where there are more, each several times where there are
    fewer."""
    count = len(values)
    if not count or width <= 0:
        return []
    if count <= width:
        return [values[index * count // width] for index in range(width)]
    edges = [index * count // width for index in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def sparkline(values: Sequence[float], width: int, *, top: float | None = None) -> str:
    """From the first value to the latest, one row high. ``top`` is the full height (default: the largest)."""
    shown = resampled(values, width) or [0.0] * max(0, width)
    highest = max(shown, default=0.0) if top is None else top
    return "".join(_LOWER[1 + min(7, int(value / highest * 8))] if highest else _LOWER[1] for value in shown)


def area(values: Sequence[float], width: int, height: int, role: str, *, top: float) -> list[Line]:
    """A filled curve of ``height`` rows, from the first value to the latest."""
    shown = resampled(values, width) or [0.0] * max(0, width)
    levels = [round(min(1.0, value / top) * height * _EIGHTHS) if top else 0 for value in shown]
    rows: list[Line] = []
    for row in range(height):
        floor = (height - 1 - row) * _EIGHTHS
        marks = "".join(_LOWER[min(_EIGHTHS, max(0, level - floor))] for level in levels)
        rows.append(((marks, role),))
    return rows


def columns(
    stacks: Sequence[Sequence[float]], width: int, height: int, look: Look, *, top: float | None = None
) -> list[Line]:
    """Stacked columns of ``PARTS`` in ``width`` cells, from the first to the latest."""
    count = len(PARTS)
    series = [
        resampled([stack[index] if index < len(stack) else 0.0 for stack in stacks], width) for index in range(count)
    ]
    shown = list(zip(*series, strict=True)) if stacks else []
    highest = max((sum(stack) for stack in shown), default=0.0) if top is None else top
    grid = [_column(stack, height, highest, look) for stack in shown]
    rows: list[Line] = []
    for row in range(height):
        spans: list[Span] = []
        for column in grid:
            text, role = column[row]
            if spans and spans[-1][1] == role:
                spans[-1] = (spans[-1][0] + text, role)
            else:
                spans.append((text, role))
        rows.append(tuple(spans))
    return rows


def _column(stack: Sequence[float], height: int, highest: float, look: Look) -> list[Span]:
    """From top to bottom, one span a row."""
    steps = height * _EIGHTHS
    edges: list[tuple[int, str]] = []
    sum_so_far = 0.0
    for role, value in zip(PARTS, stack, strict=False):
        sum_so_far += value
        edges.append((min(steps, round(sum_so_far / highest * steps)) if highest else 0, role))

    def at(step: int) -> str:
        return next((role for edge, role in edges if step < edge), "")

    spans: list[Span] = []
    for row in reversed(range(height)):
        bottom = at(row * _EIGHTHS)
        if not bottom:
            spans.append((" ", ""))
            continue
        end = next(edge for edge, role in edges if role == bottom) - row * _EIGHTHS
        if look.letters:
            spans.append((PARTS[bottom].letter if end >= _EIGHTHS // 2 or at(row * _EIGHTHS + end) else " ", bottom))
        elif end >= _EIGHTHS:
            spans.append((" ", f"on {bottom}"))
        else:
            above = at(row * _EIGHTHS + end)
            spans.append((_LOWER[end], f"{bottom} on {above}" if above else bottom))
    return spans


# Tables


def table(rows: Sequence[Sequence[Span]], width: int, *, gap: int = 2, left: int = 1) -> list[Line]:
    """``rows`` (headings first) in columns: the first ``left`` of them to the left, the others to the right."""
    if not rows:
        return []
    widths = [max(cells(row[place][0]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        spans: list[Span] = []
        for place, (text, role) in enumerate(row):
            pad = " " * (widths[place] - cells(text))
            spans.append((text + pad if place < left else pad + text, role))
            if place < len(row) - 1:
                spans.append((" " * gap, ""))
        lines.append(fit(tuple(spans), width))
    return lines


def pairs(rows: Sequence[tuple[str, str | Sequence[Span]]], width: int, *, name_width: int | None = None) -> list[Line]:
    """A name, and what is said of it, on a line each."""
    if name_width is None:
        name_width = max((cells(name) for name, _ in rows), default=0) + 2
    lines = []
    for name, value in rows:
        spans: Sequence[Span] = ((value, ""),) if isinstance(value, str) else value
        lines.append(fit(((name.ljust(name_width), "dim"), *spans), width))
    return lines


def paragraph(text: str, width: int, role: str = "") -> list[Line]:
    """``text`` broken at spaces (and where a word is too long) into lines of ``width`` cells."""
    lines: list[Line] = []
    for source in text.split("\n"):
        line = ""
        for word in source.split(" "):
            joined = f"{line} {word}" if line else word
            if cells(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(((line, role),))
            while cells(word) > width > 0:
                head = set_cell_size(word, width).rstrip()
                if not head:
                    break
                lines.append(((head, role),))
                word = word[len(head) :]
            line = word
        lines.append(((line, role),))
    return lines
