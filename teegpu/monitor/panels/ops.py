"""The operations of both sides, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from teegpu.monitor import words
from teegpu.monitor.draw import Line, Look, Span, fit, gauge
from teegpu.monitor.snapshot import Snapshot

SORTS = ("total", "count", "average", "name")
PHASES = ("both", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class Operation:
    name: str
    where: str
    count: int
    seconds: float

    @property
    def average(self) -> float:
        return self.seconds / self.count if self.count else 0.0


def operations(state: Snapshot, order: str, phase: str) -> list[Operation]:
    """Those of one phase or of both together, in order."""
    sums: dict[tuple[str, str], tuple[int, float]] = {}
    for op in state.ops:
        if phase in ("both", op.phase):
            count, seconds = sums.get((op.name, op.where), (0, 0.0))
            sums[op.name, op.where] = count + op.count, seconds + op.seconds
    found = [Operation(name, where, *total) for (name, where), total in sums.items()]
    keys = {
        "total": lambda op: (-op.seconds, op.name),
        "count": lambda op: (-op.count, op.name),
        "average": lambda op: (-op.average, op.name),
        "name": lambda op: (op.name, op.where),
    }
    return sorted(found, key=keys[order])


def rows(state: Snapshot, order: str, phase: str, width: int, look: Look) -> list[Line]:
    """Headings, and a line for each operation. Shares are of the phase's wall time; a GPU operation's seconds are the
    server's busy time, which may overlap with other things."""
    found = operations(state, order, phase)
    phases = [view for view in (state.prefill, state.decode) if phase in ("both", view.name)]
    wall = sum(view.seconds for view in phases)
    size = max(0, min(40, width - 72))
    lines = [_line(("operation", "where", "count", "total", "average", "share"), "dim", [], width, order)]
    for op in found:
        share = op.seconds / wall if wall else 0.0
        bar = [("  ", ""), *gauge(share, size, op.where, look)] if size >= 6 else []
        where = "GPU" if op.where == "gpu" else "TEE"
        texts = (
            op.name, where, f"{op.count:,}", words.span_of(op.seconds), words.span_of(op.average), words.percent(share),
        )  # fmt: skip
        lines.append(_line(texts, op.where, bar, width))
    if len(lines) == 1:
        lines.append(fit((("no operation yet", "dim"),), width))
    return lines


def _line(texts: tuple[str, ...], role: str, bar: list[Span], width: int, order: str = "") -> Line:
    name, where, *figures = texts
    marks = {"total": 1, "count": 0, "average": 2}
    spans: list[Span] = [(f" {name:<18}", "dim" if role == "dim" else ""), (f"{where:<6}", role)]
    for place, text in enumerate(figures):
        head = marks.get(order) == place
        spans.append((f"{text + (' ▾' if head else ''):>11}", "bold" if head else "dim" if role == "dim" else ""))
    return fit((*spans, *bar), width)
