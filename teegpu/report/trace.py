"""A run's events as a Chrome trace (JSON), for Perfetto (ui.perfetto.dev) or chrome://tracing.

Tracks hold slices that are nested or apart, never in partial overlap: what overlaps (requests in flight, and what is
placed within them) is laid into as many lanes as it takes. Entries of a track come in the order of their times, and
what holds others before them: a reader that sorts may drop a slice that comes after those that it holds. The clocks of
runner and server are not compared: a request's server time stands inside its span where ``metrics.summary.exposed``
assumes it.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from teegpu.record import events as ev
from teegpu.report import facts, look
from teegpu.stats.summary import server_parts
from teegpu.units import printable

RUNNER, LINK, SERVER = 1, 2, 3
"""Process ids of the trace."""

THREAD, CODEC, SLOTS = 1, 2, 100
UP, DOWN = 1, 10_000
"""Thread ids; of those that need lanes, the first."""

MAX_LANES = 4096

Slice = dict[str, Any]


def trace(events: Iterable[ev.Event], document: look.Document) -> Iterator[str]:
    """The trace as pieces of JSON text. Times are microseconds since the first event."""
    run = look.text(document, "id")
    other = {"run": run, "model": facts.model(document), "setup": " · ".join(facts.setup(document))}
    yield '{"displayTimeUnit": "ms", "otherData": ' + json.dumps(other) + ', "traceEvents": [\n'
    first = True
    for entry in trace_events(events):
        yield ("" if first else ",\n") + json.dumps(entry, ensure_ascii=False)
        first = False
    yield "\n]}\n"


def trace_events(events: Iterable[ev.Event]) -> Iterator[Slice]:
    """The entries of ``traceEvents``: laps as they come, then requests and their parts, counters, names of tracks."""
    writer = _Writer()
    for event in events:
        yield from writer.take(event)
    yield from writer.finish()


@dataclass
class _Lanes:
    """Gives intervals that come in the order of their beginnings to the first lane that is free."""

    free: list[int] = field(default_factory=list)
    taken: list[tuple[int, int]] = field(default_factory=list)
    used: int = 0

    def place(self, start_ns: int, end_ns: int) -> int | None:
        """The lane of an interval; None where there are too many already."""
        while self.taken and self.taken[0][0] <= start_ns:
            heapq.heappush(self.free, heapq.heappop(self.taken)[1])
        if not self.free:
            if self.used == MAX_LANES:
                return None
            self.free.append(self.used)
            self.used += 1
        lane = heapq.heappop(self.free)
        heapq.heappush(self.taken, (end_ns, lane))
        return lane


class _Writer:
    def __init__(self) -> None:
        self._origin_ns: int | None = None
        self._last_ns = 0
        self._phase: tuple[str, int] | None = None
        self._moments: list[tuple[int, int, Slice]] = []
        self._numbers = itertools.count()
        self._rpcs: list[ev.Rpc] = []

    def take(self, event: ev.Event) -> Iterator[Slice]:
        if isinstance(event, ev.Lap):
            yield from self._lap(event)
        elif isinstance(event, ev.Rpc):
            if event.received_ns >= event.sent_ns >= self._origin(event.sent_ns):
                self._rpcs.append(event)
        elif isinstance(event, ev.PhaseBegan):
            yield from self._end_phase(self._last_ns, 0, 0)
            self._origin(event.at_ns)
            self._last_ns = max(self._last_ns, event.at_ns)
            yield from self._moments_until(self._last_ns)
            self._phase = event.phase, event.chunks
            yield self._mark("B", self._last_ns, printable(event.phase), cat="phase")
        elif isinstance(event, ev.PhaseEnded):
            self._last_ns = max(self._last_ns, event.at_ns)
            yield from self._end_phase(self._last_ns, event.tokens, event.passes)
        elif isinstance(event, ev.TokensMade):
            self._instant(event.at_ns, "token" if event.tokens == 1 else f"{event.tokens} tokens")
        elif isinstance(event, ev.Retried):
            args = {"request": event.request_id, "layer": event.layer, "endpoint": event.endpoint}
            self._instant(event.at_ns, f"retry: {printable(event.reason)}", args)
        elif isinstance(event, ev.Noted):
            self._instant(event.at_ns, printable(event.text))

    def _origin(self, at_ns: int) -> int:
        if self._origin_ns is None:
            self._origin_ns = self._last_ns = at_ns
        return self._origin_ns

    def _microseconds(self, at_ns: int) -> float:
        return (at_ns - self._origin(at_ns)) / 1000

    def _mark(self, kind: str, at_ns: int, name: str, **more: Any) -> Slice:
        """An entry without a length on the runner's thread."""
        return {"ph": kind, "name": name, "pid": RUNNER, "tid": THREAD, "ts": self._microseconds(at_ns), **more}

    def _instant(self, at_ns: int, name: str, args: dict[str, Any] | None = None) -> None:
        """A moment is told while the lap that it falls into goes on, and that begins before it."""
        at_ns = max(at_ns, self._origin(at_ns))
        entry = self._mark("i", at_ns, name, s="t") | ({"args": args} if args else {})
        heapq.heappush(self._moments, (at_ns, next(self._numbers), entry))

    def _moments_until(self, at_ns: int) -> Iterator[Slice]:
        while self._moments and self._moments[0][0] < at_ns:
            yield heapq.heappop(self._moments)[2]

    def _slice(self, pid: int, tid: int, name: str, start_ns: int, end_ns: int, category: str, **args: Any) -> Slice:
        return {
            "ph": "X",
            "pid": pid,
            "tid": tid,
            "name": name,
            "cat": category,
            "ts": self._microseconds(start_ns),
            "dur": (end_ns - start_ns) / 1000,
            "args": args,
        }

    def _lap(self, lap: ev.Lap) -> Iterator[Slice]:
        self._origin(lap.start_ns)
        # a record may be damaged: what is left of it must still make a line
        start, end = max(lap.start_ns, self._last_ns), lap.end_ns
        if end <= start:
            return
        self._last_ns = end
        yield from self._moments_until(start)
        track = CODEC if lap.part == ev.SERIALIZATION else THREAD
        args: dict[str, Any] = {"chunk": lap.chunk}
        if lap.layer != ev.NO_LAYER:
            args["layer"] = lap.layer
        if lap.request_id:
            args["request"] = lap.request_id
        yield self._slice(RUNNER, track, lap.op, start, end, lap.part, **args)

    def _end_phase(self, at_ns: int, tokens: int, passes: int) -> Iterator[Slice]:
        if self._phase is not None:
            name, chunks = self._phase
            self._phase = None
            yield from self._moments_until(at_ns)
            args = {"tokens": tokens, "passes": passes, "chunks": chunks}
            yield self._mark("E", at_ns, printable(name), cat="phase", args=args)

    # Once all events are known

    def finish(self) -> Iterator[Slice]:
        yield from self._end_phase(self._last_ns, 0, 0)
        yield from (entry for _, _, entry in sorted(self._moments))
        self._rpcs.sort(key=lambda rpc: (rpc.sent_ns, rpc.received_ns))
        slots = _Lanes()
        up: list[_Part] = []
        down: list[_Part] = []
        server: list[_Part] = []
        for rpc in self._rpcs:
            lane = slots.place(rpc.sent_ns, rpc.received_ns)
            if lane is None:
                continue
            parts = _layout(rpc)
            up.append(parts[0])
            down.append(parts[-1])
            server.append(_Part("request", parts[1].start_ns, parts[-1].start_ns, rpc, tuple(parts[1:-1])))
            yield self._request(rpc, SLOTS + lane)
            for part in parts:
                yield from self._part(RUNNER, SLOTS + lane, part)
        tracks = {"link up": (LINK, UP, up), "link down": (LINK, DOWN, down), "GPU server": (SERVER, UP, server)}
        names = [(RUNNER, THREAD, "TEE thread"), (RUNNER, CODEC, "serialization")]
        names += _lane_names(RUNNER, SLOTS, "requests in flight", slots.used)
        for name, (pid, first, placed) in tracks.items():
            lanes = _Lanes()
            for part in sorted(placed, key=lambda part: (part.start_ns, part.end_ns)):
                lane = lanes.place(part.start_ns, part.end_ns)
                if lane is not None:
                    yield from self._part(pid, first + lane, part)
                    for inner in part.inner:
                        yield from self._part(pid, first + lane, inner)
            names += _lane_names(pid, first, name, lanes.used)
        yield from self._counters()
        yield from _metadata(names)

    def _request(self, rpc: ev.Rpc, tid: int) -> Slice:
        args: dict[str, Any] = {
            "request": rpc.request_id,
            "chunk": rpc.chunk,
            "bytes_up": rpc.bytes_up,
            "bytes_down": rpc.bytes_down,
            "endpoint": rpc.endpoint,
            "attempts": rpc.attempts,
        }
        if rpc.layer != ev.NO_LAYER:
            args["layer"] = rpc.layer
        if rpc.compression_seconds:
            args["compression_seconds"] = rpc.compression_seconds
        return self._slice(RUNNER, tid, printable(rpc.label), rpc.sent_ns, rpc.received_ns, "request", **args)

    def _part(self, pid: int, tid: int, part: _Part) -> Iterator[Slice]:
        if part.end_ns <= part.start_ns:
            return
        args: dict[str, Any] = {"request": part.rpc.request_id, "layer": part.rpc.layer}
        if part.name == "link up":
            args["bytes"] = part.rpc.bytes_up
        elif part.name == "link down":
            args["bytes"] = part.rpc.bytes_down
        elif part.name == "compute":
            args["operations"] = {
                printable(name): {"count": count, "seconds": seconds}
                for name, (count, seconds) in part.rpc.operations.items()
            }
        yield self._slice(pid, tid, printable(part.rpc.label) if part.inner else part.name, part.start_ns, part.end_ns,
                          "server" if pid == SERVER else "link", **args)  # fmt: skip

    def _counters(self) -> Iterator[Slice]:
        """Requests in flight, and the bytes that have crossed the link so far (up when a request is sent)."""
        changes = [(rpc.sent_ns, 1, rpc.bytes_up, 0) for rpc in self._rpcs]
        changes += [(rpc.received_ns, -1, 0, rpc.bytes_down) for rpc in self._rpcs]
        flying = up = down = 0
        changes.sort(key=lambda change: change[0])
        for place, (at_ns, step, sent, received) in enumerate(changes):
            flying, up, down = flying + step, up + sent, down + received
            if place + 1 < len(changes) and changes[place + 1][0] == at_ns:
                continue
            common = {"ph": "C", "pid": LINK, "tid": 0, "ts": self._microseconds(at_ns)}
            yield common | {"name": "requests in flight", "args": {"requests": flying}}
            yield common | {"name": "bytes so far", "args": {"up": up, "down": down}}


@dataclass(frozen=True)
class _Part:
    name: str
    start_ns: int
    end_ns: int
    rpc: ev.Rpc
    inner: tuple[_Part, ...] = ()


def _layout(rpc: ev.Rpc) -> list[_Part]:
    """Link up, queue, decode, compute, encode, link down: without a gap from sent to received."""
    claimed = server_parts(rpc)
    network = max(0.0, (rpc.received_ns - rpc.sent_ns) / 1e9 - sum(claimed))
    nbytes = rpc.bytes_up + rpc.bytes_down
    share = rpc.bytes_up / nbytes if nbytes else 0.5
    at = network * share
    bounds = [rpc.sent_ns]
    for seconds in (0.0, *claimed):
        at += seconds
        bounds.append(min(rpc.received_ns, rpc.sent_ns + round(at * 1e9)))
    bounds.append(rpc.received_ns)
    names = "link up", "queue", "decode", "compute", "encode", "link down"
    return [_Part(name, bounds[place], bounds[place + 1], rpc) for place, name in enumerate(names)]


def _lane_names(pid: int, first: int, name: str, used: int) -> list[tuple[int, int, str]]:
    return [(pid, first + lane, name if used == 1 else f"{name} {lane + 1}") for lane in range(used)]


def _metadata(names: Iterable[tuple[int, int, str]]) -> Iterator[Slice]:
    for pid, name in ((RUNNER, "TEE runner"), (LINK, "link"), (SERVER, "GPU server")):
        yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_sort_index", "args": {"sort_index": pid}}
    for pid, tid, name in names:
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}
