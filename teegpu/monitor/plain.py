"""The monitor without a screen: a line every second, or one frame."""

from __future__ import annotations

from rich.text import Text

from teegpu.monitor import words
from teegpu.monitor.draw import Line, Look, fit
from teegpu.monitor.panels import communication, layers, ops, overview, requests
from teegpu.monitor.snapshot import ServingView, Snapshot
from teegpu.monitor.themes import DARK, style
from teegpu.units import plural, printable

FRAME_WIDTH = 100
"""Of a frame that no terminal gives a width."""

_OPERATIONS = 8
_LAYERS = 5


def progress_line(state: Snapshot) -> str:
    """Phase, progress, rate, share: one line for a log."""
    if state.serving is not None:
        return _serving_line(state, state.serving)
    if not state.phase:
        return state.status if not state.notes else f"{state.status}: {printable(state.notes[-1].text)}"
    phase = state.current
    parts = [f"{words.clock(state.seconds)} {phase.name}"]
    if phase.name == "prefill":
        parts.append(f"{phase.tokens:,} of {plural(phase.expected, 'token')}")
    else:
        parts.append(f"{phase.tokens:,} of at most {plural(phase.expected, 'token')}")
    parts.append(words.tokens_rate(phase.tokens_per_second))
    if phase.parts.total:
        parts.append(f"communication {words.percent(phase.parts.communication_share)}")
    if state.rpc_calls:
        parts.append(f"{plural(state.rpc_calls, 'RPC call')}")
    if state.retries:
        parts.append(plural(state.retries, "retry", "retries"))
    if state.retrying:
        parts.append(state.retrying)
    elif phase.running and phase.seconds_left is not None:
        parts.append(f"{'at most' if phase.name == 'decode' else 'about'} {words.clock(phase.seconds_left)} left")
    if state.ended:
        parts.insert(0, state.status)
    return " · ".join(parts)


def _serving_line(state: Snapshot, serving: ServingView) -> str:
    parts = [
        f"{words.clock(state.seconds)} {plural(serving.running, 'sequence')}",
        f"{serving.waiting:,} in line",
        f"{serving.ended:,} ended",
        words.tokens_rate(state.token_rate),
    ]
    for name, spread in (("TTFT", serving.ttft), ("ITL", serving.itl)):
        if spread.p50 is not None and spread.p95 is not None:
            parts.append(f"{name} {words.span_of(spread.p50)} median, {words.span_of(spread.p95)} p95")
    if state.retrying:
        parts.append(state.retrying)
    return " · ".join([state.status, *parts] if state.ended else parts)


def frame(state: Snapshot, width: int, look: Look) -> list[Line]:
    """The overview as lines from top to bottom, as long as it takes."""
    inner = width - 2
    blocks: list[tuple[str, list[Line]]] = [
        *([] if state.serving is None else [("requests", requests.all_of_them(state.serving, inner, 0, look))]),
        ("progress", overview.progress(state, inner, 2, look)),
        ("where the time goes", overview.time(state, inner, 5, look)),
        ("communication", communication.communication(state, inner, 9, look)),
    ]
    slowest = layers.sorted_layers(state, "time")[:_LAYERS]
    if slowest:
        blocks.append((f"slowest layers of {len(state.layers)}", layers.rows(state, slowest, inner, look)))
    if state.ops:
        rows = ops.rows(state, "total", "both", inner, look)
        blocks.append((f"operations, the first {_OPERATIONS}", rows[: _OPERATIONS + 1]))
    blocks.append(("both sides", overview.both_sides(state, inner, 9, look)))
    if state.advice or state.notes or state.error or state.retrying:
        blocks.append(("advice and notes", overview.said(state, inner, 12, look)))
    lines: list[Line] = [overview.header(state, width)]
    for title, block in blocks:
        lines += [(), ((title, "bold"),)]
        lines += [((" ", ""), *fit(line, inner)) for line in block]
    return lines


def as_text(lines: list[Line], theme: str = DARK) -> Text:
    """``lines`` for a console, without spaces at their ends."""
    text = Text()
    for number, line in enumerate(lines):
        if number:
            text.append("\n")
        shown = list(line)
        while shown and not shown[-1][0].strip() and "on " not in shown[-1][1]:
            shown.pop()
        for part, role in shown:
            text.append(part, style(role, theme))
    return text
