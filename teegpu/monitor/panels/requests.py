"""A run that serves several at once: who is under way, how full it is, what they wait for."""

from __future__ import annotations

from teegpu.formats import NOTHING
from teegpu.monitor import words
from teegpu.monitor.draw import Line, Look, Span, fit, gauge, sparkline, table
from teegpu.monitor.snapshot import ServingView, Snapshot, Spread
from teegpu.units import human_bytes, plural

STATES = {"waiting": "dim", "reading": "gpu", "generating": "tee"}


def tiles(state: Snapshot, serving: ServingView) -> list[tuple[str, str, str, str]]:
    """The big figures: (figure, role, caption, what is beside it)."""
    rate = state.token_rate
    return [
        (
            f"{serving.running}",
            "tee" if serving.running else "dim",
            "sequences",
            f"{serving.waiting:,} in line",
        ),
        (
            f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate else NOTHING,
            "gpu",
            "tokens/s",
            "of all together",
        ),
        (_figure(serving.ttft.p50), "serialization", "s to first token", f"p95 {_told(serving.ttft.p95)}"),
        (_figure(serving.itl.p50, 1e3), "network", "ms per token", f"p95 {_told(serving.itl.p95)}"),
    ]


def _figure(seconds: float | None, times: float = 1.0) -> str:
    if seconds is None:
        return NOTHING
    value = seconds * times
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _told(seconds: float | None) -> str:
    return NOTHING if seconds is None else words.span_of(seconds)


def progress(serving: ServingView, width: int, height: int, look: Look) -> list[Line]:
    """How full it is: a line for places, one for memory."""
    told: list[Span] = [(f"{serving.running:,} of {serving.sequences:,}" if serving.sequences else
                         f"{serving.running:,}", "bold")]  # fmt: skip
    if serving.reading:
        told.append((f"{serving.reading:,} reading", ""))
    told.append((f"{serving.waiting:,} in line", "warn" if serving.waiting else "dim"))
    told.append((f"{serving.ended:,} ended", "dim"))
    if serving.failed:
        told.append((f"{serving.failed:,} failed", "bad"))
    room = serving.kv_room
    memory: list[Span] = [(human_bytes(serving.kv_bytes), "bold")]
    if room:
        memory = [(f"{human_bytes(serving.kv_bytes)} of {human_bytes(room)}", "bold")]
    spans = [span for one in told for span in ((" · ", "dim"), one)][1:]
    bar = max(8, min(60, width - 11 - max(44, sum(len(text) for text, _ in spans))))
    shares = serving.running / max(1, serving.sequences), serving.kv_bytes / room if room else 0.0
    lines = [
        fit(((name.ljust(9), "bold"), *gauge(share, bar, role, look), ("  ", ""), *beside), width)
        for name, share, role, beside in zip(("running", "KV"), shares, ("tee", "gpu"), (spans, memory), strict=True)
    ]
    return lines[:height]


def under_way(serving: ServingView, width: int, height: int, look: Look) -> list[Line]:  # noqa: ARG001
    """A row for each request, as many as there is room for; above them how many there were over time."""
    lines: list[Line] = []
    if height >= 6 and serving.load:
        room = max(8, width - 24)
        most = max(1.0, *(running for running, _ in serving.load), *(waiting for _, waiting in serving.load))
        for name, place, role in (("running", 0, "tee"), ("in line", 1, "warn")):
            values = [pair[place] for pair in serving.load]
            now = (serving.running, serving.waiting)[place]
            chart = sparkline(values, room, top=most)
            lines.append(fit(((name.ljust(9), "dim"), (chart, role), (f"{now:>6,}", "bold")), width))
    if not serving.requests:
        return [*lines, fit((("no request is under way", "dim"),), width)]
    head = ("#", "state", "prompt", "made", "first", "tok/s", "age")
    rows: list[list[Span]] = [[(name, "dim") for name in head]]
    for one in serving.requests:
        prompt = f"{one.prompt_tokens:,}"
        if one.state == "reading" and one.read < one.prompt_tokens:
            prompt = f"{one.read:,}/{one.prompt_tokens:,}"
        made = f"{one.made:,}" if not one.max_tokens else f"{one.made:,}/{one.max_tokens:,}"
        rows.append(
            [
                (f"{one.number:,}", "bold"),
                (one.state, STATES.get(one.state, "")),
                (prompt, ""),
                (made, "" if one.made else "dim"),
                (_told(one.ttft_seconds), "" if one.ttft_seconds is not None else "dim"),
                (f"{one.rate:.1f}" if one.rate else NOTHING, ""),
                (words.clock(one.seconds), "dim"),
            ]
        )
    if width < 60:
        rows = [[row[0], row[1], row[3]] for row in rows]
    left = max(2, height - len(lines))
    more = len(rows) - left
    if more > 0:
        rows = rows[: left - 1]
    lines += table(rows, width, left=2)
    if more > 0:
        lines.append(fit(((f"and {plural(more + 1, 'more', 'more')}", "dim"),), width))
    return lines


def all_of_them(serving: ServingView, width: int, height: int, look: Look) -> list[Line]:  # noqa: ARG001
    """What they wait for, and every one of them."""
    rows: list[list[Span]] = [[(name, "dim") for name in ("", "p50", "p95", "p99")]]
    for name, spread in (("in line", serving.queue), ("first token", serving.ttft), ("between", serving.itl)):
        rows.append([(name, "dim"), *_cells(spread)])
    return [*table(rows, width), (), *under_way(serving, width, 1 << 20, look)]


def _cells(spread: Spread) -> list[Span]:
    return [(_told(value), "") for value in (spread.p50, spread.p95, spread.p99)]
