"""A document as the sections of its report: titles, rows and captions, in plain strings. How they look is for others:
``tables`` (terminal), ``exports`` (Markdown), ``page`` (HTML)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from teegpu.formats import NOTHING
from teegpu.report import facts, look
from teegpu.report.grid import HEADING, PLAIN, TOTAL, Grid, Row
from teegpu.report.parts import PARTS, Breakdown, Item, breakdown, took_place
from teegpu.report.privacy import privacy_grid
from teegpu.units import count, human_bytes, human_seconds, plural, times


@dataclass(frozen=True)
class Strip:
    """Seconds per layer of a phase: ``parts`` maps a part's name to one figure for each of ``layers``."""

    title: str
    layers: tuple[int, ...]
    parts: Mapping[str, tuple[float, ...]]

    @property
    def totals(self) -> list[float]:
        return [sum(values) for values in zip(*self.parts.values(), strict=True)]

    @property
    def worst(self) -> int:
        """The place of the layer that took longest."""
        totals = self.totals
        return totals.index(max(totals))

    @property
    def worst_text(self) -> str:
        totals = sorted(self.totals)
        median = totals[len(totals) // 2]
        told = f"layer {self.layers[self.worst]}: {human_seconds(totals[-1])}"
        return f"{told}, {times(totals[-1] / median)} the median" if median and len(totals) > 2 else told


Section = Grid | Strip


def sections(document: look.Document) -> list[Section]:
    """Everything that there are figures for, in the order of the report."""
    found: list[Section] = [*request_grids(document)]
    for name in facts.PHASES:
        phase = look.mapping(document, "phases", name)
        if took_place(phase):
            found.append(phase_grid(name, phase))
            if (layers := strip(name, phase)) is not None:
                found.append(layers)
    return [*found, *run_grids(document)]


def run_grids(document: look.Document) -> list[Grid]:
    """What is not of one phase, as far as there are figures for it."""
    found = (privacy_grid(document), link_grid(document), limit_grid(document), endpoint_grid(document))
    return [grid for grid in found if grid is not None]


# Requests, where several were served at once


def request_grids(document: look.Document) -> list[Grid]:
    """What requests waited for, and what a step of so many brought; nothing for a run that served nobody."""
    requests = facts.requests(document)
    if not requests:
        return []
    ended = look.mapping(requests, "ended")
    rows = [Row(("", "p50", "p95", "p99", "most"), HEADING)]
    for name, label in (("queue", "In line"), ("ttft", "First token"), ("itl", "Between tokens"), ("e2e", "Whole")):
        values = [look.number(requests, f"{name}_seconds", place) for place in ("p50", "p95", "p99", "max")]
        rows.append(Row((f"  {label}", *(NOTHING if value is None else human_seconds(value) for value in values))))
    capacity = look.mapping(document, "settings", "capacity")
    told = [f"{plural(look.amount(requests, 'arrived'), 'request')} arrived"]
    told += [f"{look.amount(ended, reason):,.0f} ended by {reason}" for reason in sorted(ended)]
    told += [f"{look.amount(requests, 'open'):,.0f} are under way"] if look.amount(requests, "open") else []
    sequences, most = look.amount(capacity, "sequences"), look.amount(requests, "most_running")
    load = [f"{most:,.0f} ran at once at most" + (f", of {sequences:,.0f}" if sequences else "")]
    load.append(f"{look.amount(requests, 'most_waiting'):,.0f} were in line")
    kv, room = look.amount(requests, "most_kv_bytes"), look.amount(capacity, "kv_bytes")
    load.append(f"keys and values took {human_bytes(kv)}" + (f" of {human_bytes(room)}" if room else ""))
    if gave_way := look.amount(requests, "gave_way"):
        load.append(f"{gave_way:,.0f} had to give way")
    if reused := look.amount(requests, "reused_tokens"):
        load.append(
            f"{reused:,.0f} of {plural(look.amount(requests, 'prompt_tokens'), 'prompt token')} were still known"
        )
    grids = [Grid("Requests", tuple(rows), (f"{', '.join(told)}.", f"{'; '.join(load)}."))]
    batches = look.entries(requests, "batches")
    if batches:
        rows = [Row(("Sequences at once", "steps", "a step", "tokens/s"), HEADING)]
        least = 1
        for batch in batches:
            upto, steps, seconds = (look.amount(batch, name) for name in ("upto", "steps", "seconds"))
            least = int(upto) // 2 + 1
            label = f"  {upto:.0f}" if upto <= least else f"  {least} to {upto:.0f}"
            each = human_seconds(seconds / steps) if steps else NOTHING
            rate = f"{look.amount(batch, 'tokens') / seconds:,.1f}" if seconds else NOTHING
            rows.append(Row((label, count(steps), each, rate)))
        grids.append(Grid("Steps that only generate", tuple(rows)))
    return grids


# One phase


def phase_grid(name: str, phase: Mapping[str, Any]) -> Grid:
    """The sections and rows of the report on a phase; their shares add up to 100.0 %."""
    parts = breakdown(phase)
    tokens, wall = look.amount(phase, "tokens"), parts.wall
    title = f"{name.capitalize()}: {plural(tokens, 'token')} in {human_seconds(wall)}"
    if tokens and wall:
        title += f", {tokens / wall:,.1f} tokens/s"
    if not look.amount(phase, "seconds"):
        title += " (not ended)"
    communication, gpu, tee = sum_of(parts.communication), sum_of(parts.gpu), sum_of(parts.tee)
    rows = [
        Row(("Communication Overhead", "count", "total s", "avg ms", "share"), HEADING),
        *(_operation(item, wall) for item in parts.communication),
        _sum("Total", parts.communication, communication, wall),
        Row(("GPU Operations", "count", "busy s", "avg ms", "share"), HEADING),
        *(_operation(item, wall) for item in parts.gpu),
        _sum("Total", parts.gpu, sum(item.seconds for item in parts.gpu), wall),
        Row(("TEE Operations", "count", "total s", "avg ms", "share"), HEADING),
        *(_operation(item, wall) for item in parts.tee),
        _sum("Total", parts.tee, tee, wall),
        Row(("Where the time went", "", "total s", "", "share"), HEADING),
        _sum("GPU Compute", parts.gpu, gpu, wall, PLAIN),
        _sum("TEE Compute", parts.tee, tee, wall, PLAIN),
        _sum("Communication", parts.communication, communication, wall, PLAIN),
        _sum("Server overhead", [parts.server], parts.server.exposed, wall, PLAIN),
        _sum("Other", [parts.other], parts.other.exposed, wall, PLAIN),
        _sum("TOTAL", parts.items, wall, wall),
    ]
    return Grid(title, tuple(rows), tuple(_captions(parts)))


def sum_of(items: list[Item]) -> float:
    """Their part of the wall in seconds."""
    return sum(item.exposed for item in items)


def _operation(item: Item, wall: float) -> Row:
    average = NOTHING if item.average is None else f"{item.average * 1e3:,.3f}"
    shown = NOTHING if item.count is None else f"{item.count:,}"
    return Row((f"  {item.name}", shown, f"{item.seconds:,.3f}", average, _tenths(item.tenths, wall)))


def _sum(name: str, items: list[Item], seconds: float, wall: float, kind: str = TOTAL) -> Row:
    return Row((f"  {name}", "", f"{seconds:,.3f}", "", _tenths(sum(item.tenths for item in items), wall)), kind)


def _tenths(tenths: int, wall: float) -> str:
    return f"{tenths / 10:.1f}%" if wall else NOTHING


def _captions(parts: Breakdown) -> list[str]:
    found = []
    busy, exposed = sum(item.seconds for item in parts.gpu), sum_of(parts.gpu)
    if busy:
        told = f"GPU: busy for {human_seconds(busy)}, and the runner waited for {human_seconds(exposed)} of it"
        found.append(f"{told}; shares are of what it waited for.")
    if parts.server.exposed:
        found.append("Server overhead: waiting while requests queued there, and for its own serialization.")
    if any(item.name == "ATTENTION" for item in parts.tee):
        found.append("ATTENTION: scores, softmax and values in one.")
    if parts.excess > 0.01:
        found.append(f"The parts of this record exceed its wall time by {parts.excess:.1%}: shares are of their sum.")
    return found


def strip(name: str, phase: Mapping[str, Any]) -> Strip | None:
    """The layers of a phase; None where the record has none."""
    layers = {int(place): layer for layer in look.entries(phase, "layers")
              if (place := look.number(layer, "layer")) is not None}  # fmt: skip
    places = sorted(layers)
    parts = {}
    for part in PARTS:
        values = tuple(look.amount(layers[place], f"{part}_seconds") for place in places)
        if any(values):
            parts[PARTS[part].label] = values
    return Strip(f"{name.capitalize()}, by layer", tuple(places), parts) if parts else None


# The link, both phases side by side

_Figure = Callable[[Mapping[str, Any]], str]


def _at(*path: str, shown: Callable[[float], str]) -> _Figure:
    def figure(phase: Mapping[str, Any]) -> str:
        value = look.number(phase, *path)
        return NOTHING if value is None else shown(value)

    return figure


def _rate(way: str) -> _Figure:
    def figure(phase: Mapping[str, Any]) -> str:
        seconds, nbytes = look.number(phase, "seconds"), look.number(phase, f"bytes_{way}")
        return f"{human_bytes(nbytes / seconds)}/s" if seconds and nbytes is not None else NOTHING

    return figure


def _per_token(phase: Mapping[str, Any]) -> str:
    value = look.number(phase, "rpcs_per_token")
    if value is None:
        calls, tokens = look.number(phase, "rpc_calls"), look.number(phase, "tokens")
        value = calls / tokens if tokens and calls is not None else None
    return NOTHING if value is None else f"{value:,.2f}"


def _tried(phase: Mapping[str, Any]) -> bool:
    """Whether the codec was at work at all."""
    return any(look.amount(phase, "compression", name) for name in ("tried_bytes", "compressed_bytes", "seconds"))


def _spent(phase: Mapping[str, Any]) -> str:
    return human_seconds(look.amount(phase, "compression", "seconds")) if _tried(phase) else NOTHING


def _saved(way: str) -> _Figure:
    def figure(phase: Mapping[str, Any]) -> str:
        saved, raw = (look.number(phase, "compression", f"{kind}_bytes_{way}") for kind in ("saved", "raw"))
        if saved is None or not _tried(phase):
            return NOTHING
        sign = "-" if saved < 0 else ""
        return f"{sign}{human_bytes(abs(saved))}" + (f" ({saved / raw:.1%})" if raw else "")

    return figure


def _sum_of(*paths: tuple[str, ...]) -> _Figure:
    def figure(phase: Mapping[str, Any]) -> str:
        values = [look.number(phase, *path) for path in paths]
        known = [value for value in values if value is not None]
        return human_seconds(sum(known)) if len(known) == len(values) else NOTHING

    return figure


_LINK: tuple[tuple[str, _Figure], ...] = (
    ("RPC calls", _at("rpc_calls", shown=count)),
    ("RPCs per token", _per_token),
    ("Retries", _at("rpc_retries", shown=count)),
    ("RPC latency, median", _at("rpc_latency", "median_seconds", shown=human_seconds)),
    ("RPC latency, p95", _at("rpc_latency", "p95_seconds", shown=human_seconds)),
    ("RPC latency, worst", _at("rpc_latency", "max_seconds", shown=human_seconds)),
    ("Bytes up", _at("bytes_up", shown=human_bytes)),
    ("Bytes down", _at("bytes_down", shown=human_bytes)),
    ("Rate up", _rate("up")),
    ("Rate down", _rate("down")),
    ("Compression saved up", _saved("up")),
    ("Compression saved down", _saved("down")),
    ("Compression spent, busy", _spent),
    ("Communication, exposed", _sum_of(("serialization_seconds",), ("network_seconds",))),
    ("Communication, busy", _sum_of(("serialization_seconds",), ("busy", "network_seconds"))),
    ("GPU compute, exposed", _at("gpu_seconds", shown=human_seconds)),
    ("GPU compute, busy", _at("busy", "gpu_seconds", shown=human_seconds)),
    ("Server queueing, busy", _at("busy", "queue_seconds", shown=human_seconds)),
    ("Server codec, busy", _at("busy", "server_serialization_seconds", shown=human_seconds)),
)


def link_grid(document: look.Document) -> Grid | None:
    """What crossed the link; None where nothing did."""
    phases = {name: look.mapping(document, "phases", name) for name in facts.PHASES}
    used = [name for name, phase in phases.items() if took_place(phase)]
    if not any(look.amount(phases[name], "rpc_calls") for name in used):
        return None
    rows = [Row(("", *used), HEADING)]
    for label, figure in _LINK:
        cells = [figure(phases[name]) for name in used]
        if any(cell != NOTHING for cell in cells):
            rows.append(Row((f"  {label}", *cells)))
    notes = ["Exposed: the runner waited. Busy: sums over requests, which may overlap; not parts of the wall time."]
    return Grid("Link and overlap", tuple(rows), (*_link_facts(document), *notes))


def _link_facts(document: look.Document) -> list[str]:
    link = look.mapping(document, "link")
    known = []
    if (rtt := look.number(link, "rtt_seconds")) is not None:
        known.append(f"RTT {human_seconds(rtt)}")
    for way in ("up", "down"):
        if (speed := look.number(link, f"bandwidth_{way}_bytes_per_second")) is not None:
            known.append(f"{way} {human_bytes(speed)}/s")
    source = look.text(link, "source")
    return [f"Link ({source or 'known'}): {', '.join(known)}."] if known else []


# Limit and servers


def limit_grid(document: look.Document) -> Grid | None:
    """The least that the run could have taken, and how near it came; None in a record without any of it."""
    limit = look.mapping(document, "limit")
    labels = {
        "link_seconds": "Link: bytes and rounds",
        "gpu_seconds": "GPU compute, busy",
        "tee_seconds": "TEE compute",
        "bound_seconds": "Limit",
    }
    values = {name: look.number(limit, name) for name in labels}
    if not any(values.values()):
        return None
    rows = [Row(("", "seconds"), HEADING)]
    for name, label in labels.items():
        value = values[name]
        shown = NOTHING if value is None else f"{value:,.3f}"
        rows.append(Row((f"  {label}", shown), TOTAL if name == "bound_seconds" else PLAIN))
    ratio = look.number(limit, "ratio")
    if ratio is not None:
        rows.append(Row(("  This run took", times(ratio)), TOTAL))
    notes = ["Not known without the link's speed."] if values["bound_seconds"] is None else []
    return Grid("Limit", tuple(rows), tuple(notes))


def endpoint_grid(document: look.Document) -> Grid | None:
    """The servers, where there were several or one was asked again."""
    servers = look.entries(document, "endpoints")
    if len(servers) < 2 and not any(look.amount(server, "retries") for server in servers):
        return None
    rows = [Row(("", "RPC calls", "up", "down", "retries"), HEADING)]
    for server in servers:
        address = look.text(server, "address") or NOTHING
        cells = [count(look.amount(server, "rpc_calls"))]
        cells += [human_bytes(look.amount(server, f"bytes_{way}")) for way in ("up", "down")]
        rows.append(Row((f"  {address}", *cells, count(look.amount(server, "retries")))))
    return Grid("Servers", tuple(rows))
