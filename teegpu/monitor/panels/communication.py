"""The link: its share of the time, its calls and bytes, now and over the run."""

from __future__ import annotations

from itertools import pairwise

from teegpu.facts import TRANSPORTS
from teegpu.formats import NOTHING
from teegpu.monitor import words
from teegpu.monitor.draw import Line, Look, Span, area, cells, columns, fit, gauge, pairs, sparkline, table, wrapped
from teegpu.monitor.snapshot import Moment, Parts, Snapshot
from teegpu.units import human_bytes, plural


def communication(state: Snapshot, width: int, height: int, look: Look) -> list[Line]:
    """Share, calls, latency, bytes: the whole of it in a few lines."""
    if not state.facts.remote:
        return [(("all is computed in the TEE: there is no communication", "dim"),)]
    lines = [share_line(state, width, look), *pairs(_figures(state), width, name_width=11)]
    room = height - len(lines) - 1
    if room >= 2:
        chart = share_chart(state, width, room, look)
        lines = [lines[0], *chart, (), *lines[1:]]
    return lines[:height]


def share_line(state: Snapshot, width: int, look: Look) -> Line:
    phase = state.current
    text = words.percent(phase.parts.communication_share) if phase.parts.total else NOTHING
    lead: list[Span] = [(text, "bold network"), (f" of {state.phase}" if state.phase else "", "dim"), ("  ", "")]
    room = width - sum(cells(part) for part, _ in lead)
    if look.letters:
        return fit((*lead, *gauge(phase.parts.communication_share, room, "network", look)), width)
    return fit((*lead, (sparkline(_shares(state), room, top=1.0), "network")), width)


def _shares(state: Snapshot) -> list[float]:
    return [moment.parts.communication_share for moment in state.history]


def _figures(state: Snapshot) -> list[tuple[str, str | list[Span]]]:
    latency = state.latency
    rows: list[tuple[str, str | list[Span]]] = [
        (
            "RPC calls",
            [
                (f"{state.rpc_calls:,}", "bold"),
                (f", {state.rpcs_per_token:.0f} per token" if state.decode.tokens else "", ""),
            ],
        ),
        ("per-op", [("would have made ", "dim"), (f"{state.per_op_calls:,}", "bold"), (" by now", "dim")]),
        (
            "latency",
            [(words.span_of(latency.median), "bold"), (f" median, {words.span_of(latency.p95)} p95", "")]
            if latency.calls
            else NOTHING,
        ),
        ("up", _bytes(state.prefill.bytes_up + state.decode.bytes_up, state.up_rate)),
        ("down", _bytes(state.prefill.bytes_down + state.decode.bytes_down, state.down_rate)),
        (
            "in flight",
            [
                (f"{state.in_flight:,}", "bold"),
                ("   retries ", "dim"),
                (f"{state.retries:,}", "bad" if state.retries else ""),
            ],
        ),
        ("compressed", compression(state)),
    ]
    return rows


def _bytes(count: int, per_second: float) -> list[Span]:
    return [(human_bytes(count), "bold"), (f"  {words.rate(per_second)}", "dim")]


def compression(state: Snapshot) -> str:
    transport = TRANSPORTS.get(state.facts.transport)
    if transport is None or not transport.compresses:
        return "off"
    raw = sum(p.raw_bytes_up + p.raw_bytes_down for p in (state.prefill, state.decode))
    crossed = sum(p.bytes_up + p.bytes_down for p in (state.prefill, state.decode))
    seconds = state.prefill.compression_seconds + state.decode.compression_seconds
    if raw <= crossed:
        return "nothing that would pay"
    return f"{human_bytes(raw - crossed)} saved ({1 - crossed / raw:.0%}) in {words.span_of(seconds)}"


def share_chart(state: Snapshot, width: int, height: int, look: Look) -> list[Line]:
    """Communication's share of the time over the whole run, 0 to 100 %."""
    if look.letters:
        marks = [((sparkline(_shares(state), width, top=1.0), "network"),)]
        return [fit(line, width) for line in marks]
    return area(_shares(state), width, height, "network", top=1.0)


def over_time(state: Snapshot, width: int, height: int, look: Look) -> list[Line]:
    """The parts' shares of each moment, stacked: what fills the time, from the run's begin until now."""
    if not state.history:
        return [(("nothing has been computed yet", "dim"),)]
    shares = [moment.parts.divided(moment.parts.total) for moment in _merged(state.history, width)]
    lines = columns(shares, width, max(1, height - 1), look, top=1.0)
    return [*lines, _axis(state.seconds, width)]


def _axis(seconds: float, width: int) -> Line:
    right = words.clock(seconds)
    return (("0 s", "dim"), (" " * max(1, width - 3 - len(right)), ""), (right, "dim"))


def _merged(history: tuple[Moment, ...], width: int) -> list[Moment]:
    """At most ``width`` moments: neighbours are added together."""
    count = len(history)
    if count <= width or width <= 0:
        return list(history)
    edges = [index * count // width for index in range(width + 1)]
    merged = []
    for first, last in pairwise(edges):
        group = history[first:last]
        parts = Parts(*(sum(values) for values in zip(*(moment.parts for moment in group), strict=True)))
        rest = (sum(values) for values in zip(*(moment.moved for moment in group), strict=True))
        merged.append(Moment(group[0].at_seconds, sum(moment.seconds for moment in group), parts, *rest))
    return merged


def rates(state: Snapshot, width: int, height: int, look: Look) -> list[Line]:
    """Bytes each way, tokens and calls a second over the run: a curve each."""
    moments = _merged(state.history, max(8, width - 36))
    calls = f"{moments[-1].rpc_calls / moments[-1].seconds:,.0f}/s" if moments else NOTHING
    figures = words.rate(state.up_rate), words.rate(state.down_rate), words.tokens_rate(state.token_rate), calls
    names = ("up", "tee"), ("down", "gpu"), ("tokens", "accent"), ("calls", "serialization")
    curves = [
        (name, [moment.moved[place] / moment.seconds for moment in moments], role, figures[place])
        for place, (name, role) in enumerate(names)
    ]
    rows = max(1, height // len(curves))
    room = max(8, width - 22)
    lines: list[Line] = []
    for name, values, role, now in curves:
        top = max(values, default=0.0)
        chart = (
            [((sparkline(values, room), role),)]
            if rows == 1 or look.letters
            else area(values, room, max(1, rows - (rows > 2)), role, top=top)
        )
        for number, row in enumerate(chart):
            label = name if number == 0 else ""
            lines.append(fit(((label.ljust(8), "dim"), *row, ((now if number == 0 else "").rjust(14), "bold")), width))
        if rows > 2:
            lines.append(())
    return lines[:height]


def latencies(state: Snapshot, width: int, height: int, look: Look) -> list[Line]:
    """A histogram of the latest calls' round trips."""
    latency = state.latency
    if not latency.calls:
        return [(("no call yet", "dim"),)]
    figures = [("median", latency.median), ("p95", latency.p95), ("max", latency.largest)]
    head = wrapped(
        [[(words.span_of(value), "bold"), (f" {name}", "dim")] for name, value in figures], ("  ", ""), width
    )
    bins = list(latency.histogram)
    while len(bins) > max(1, height - 1):  # the smallest neighbours go together
        place = min(range(len(bins) - 1), key=lambda index: bins[index][1] + bins[index + 1][1])
        bins[place : place + 2] = [(bins[place + 1][0], bins[place][1] + bins[place + 1][1])]
    most = max(count for _, count in bins)
    room = max(4, width - 18)
    lines: list[Line] = [fit(head[0], width)]
    for upto, count in bins:
        bar = gauge(count / most, room, "accent", look)
        lines.append(
            fit(((f"≤ {words.span_of(upto)}".rjust(10), "dim"), (" ", ""), *bar, (f"{count:,}".rjust(6), "")), width)
        )
    return lines


def endpoints(state: Snapshot, width: int, height: int, look: Look) -> list[Line]:  # noqa: ARG001
    """Who answers, and how much."""
    if not state.endpoints:
        return [(("no server has answered yet", "dim"),)]
    rows: list[list[Span]] = [[(name, "dim") for name in ("server", "calls", "retries", "up", "down")]]
    for one in state.endpoints:
        figures = (human_bytes(one.bytes_up), human_bytes(one.bytes_down))
        retries: Span = (f"{one.retries:,}", "bad" if one.retries else "")
        rows.append([(one.address, "bold"), (f"{one.rpc_calls:,}", ""), retries, *((text, "") for text in figures)])
    if width < 44:  # the bytes are on the overview too
        rows = [row[:3] for row in rows]
    lines = table(rows, width)
    lines += pairs(
        [
            ("in flight", f"{state.in_flight:,}"),
            ("compressed", compression(state)),
            ("as per-op", plural(state.per_op_calls, "call")),
            ("queue", f"{words.span_of(_queue(state))} a call"),
            ("keys", words.keys(state.facts)),
        ],
        width,
    )
    if state.retrying:
        lines.append(fit(((f"server lost: {state.retrying}", "bad"),), width))
    return lines


def _queue(state: Snapshot) -> float:
    """Seconds that a call waited at the server, on average."""
    return (state.prefill.queue_seconds + state.decode.queue_seconds) / max(1, state.rpc_calls)
