"""Events to snapshots. Pure: no clock, no I/O. Memory stays bounded however long the run is.

``metrics.summary.Summary`` keeps the sums. What a live view needs beside them is taken from differences of those sums,
at the end of a pass and every few hundred events, so that an event costs little more than the summary itself.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from teegpu.facts import PER_OP
from teegpu.monitor import snapshot as snap
from teegpu.monitor.history import PassSeries, Rates, Series
from teegpu.monitor.snapshot import (
    NO_TIME,
    Facts,
    LayerView,
    Moment,
    Note,
    OpView,
    Parts,
    PhaseView,
    RequestView,
    ServingView,
    Snapshot,
    Spread,
)
from teegpu.monitor.whereabouts import Whereabouts
from teegpu.record import events as ev
from teegpu.stats.requests import READING, Open
from teegpu.stats.summary import Summary
from teegpu.stats.totals import Latencies, PhaseTotal

SLICE: Final = 256
"""Events between two looks at the sums: some tens of milliseconds of a quick decode."""

MAX_TEXT: Final = 200_000
"""Characters of generated text that are kept: the last ones."""

MAX_LAYERS: Final = 1024
"""Layers that are shown: more than any model has, but a damaged record may name any number."""

MAX_REQUESTS: Final = 256
"""Requests that are shown: the oldest of those under way."""

_NOTES: Final = 100
_ENDPOINTS: Final = 64
_PARTS: Final = len(NO_TIME)

Sums = dict[int, Parts]


class LiveState:
    """Takes the events of one run in order, and gives a ``Snapshot`` whenever it is asked for one.

    ``meta`` is the record's; ``update_meta`` replaces it as more becomes known. ``focus`` is the layer whose history
    goes into the snapshots. Not thread-safe.
    """

    def __init__(self, meta: Mapping[str, Any] | None = None) -> None:
        self.meta: Mapping[str, Any] = meta or {}
        self.facts: Facts = Facts.of(self.meta)
        self.summary = Summary()
        self.events = 0
        self.tokens = 0
        self.first_ns: int | None = None
        self.last_ns = 0
        self._number = 0
        self._phase = ""
        self._running = False
        self._began_ns = 0
        self._expected: dict[str, tuple[int, int]] = {}
        self._phase_tokens: dict[str, int] = {}
        self._prompt = 0
        self._where = Whereabouts()
        self._pass_base: Sums = {}
        self._last_pass: Sums = {}
        self._pass_phase = ""
        self._passes: PassSeries | None = None
        self._whole_passes: tuple[str, int, int, int] | None = None
        self._series = Series(10)
        self._counted: tuple[float, ...] = (0.0,) * 10
        self._rates = Rates()
        self._load = Series(3)
        self._loaded: tuple[float, int] = (0.0, 0)
        self._retries = 0
        self._retrying: tuple[int, str, int] | None = None
        self._notes: deque[Note] = deque(maxlen=_NOTES)
        self._samples: deque[ev.Sampled] = deque(maxlen=8)
        self._text: deque[str] = deque()
        self._text_length = 0
        self.text_known = self.text_private = False
        self._tpot: tuple[int, float | None] = (0, None)
        self.advice: tuple[str, ...] = ()
        self.focus = 0

    def update_meta(self, meta: Mapping[str, Any]) -> None:
        self.meta = meta
        self.facts = Facts.of(meta)

    # Taking events

    def add(self, events: Sequence[ev.Event]) -> None:
        """Takes ``events``, which follow those that were given before."""
        for start in range(0, len(events), SLICE):
            part = events[start : start + SLICE] if len(events) > SLICE else events
            self._add(part)
            self._look()

    def _add(self, events: Sequence[ev.Event]) -> None:
        """One slice. What ends a pass ends a run of events for the summary too, so that its sums are those of whole
        passes."""
        given = 0
        where = self._where
        for index, event in enumerate(events):
            kind = type(event)
            if kind is ev.Lap:
                where.lap(event)  # type: ignore[arg-type]
            elif kind is ev.Rpc:
                self._rpc(event)  # type: ignore[arg-type]
            elif kind in _RARE:
                self.summary.add(events[given : index + 1])
                given = index + 1
                self._rare(event)
        self.summary.add(events[given:] if given else events)
        self.events += len(events)
        if events:
            self._seen(events[-1])

    def _seen(self, event: ev.Event) -> None:
        at = time_of(event)
        if at is not None:
            self.last_ns = max(self.last_ns, at)

    def _rpc(self, rpc: ev.Rpc) -> None:
        self._where.answered(rpc)
        self._retrying = None

    def _rare(self, event: ev.Event) -> None:
        self._seen(event)
        if isinstance(event, ev.TokensMade):
            self.tokens += event.tokens
            self._phase_tokens[self._phase] = self._phase_tokens.get(self._phase, 0) + event.tokens
            if self._phase == ev.DECODE:
                self._pass_ended()
        elif isinstance(event, ev.PhaseBegan):
            self._began(event)
        elif isinstance(event, ev.PhaseEnded):
            if event.phase == ev.PREFILL:
                self._pass_ended()
            self._running = False
            self._where.clear()
        elif isinstance(event, ev.Retried):
            self._retries += 1
            since, _, count = self._retrying or (event.at_ns, "", 0)
            self._retrying = (since, event.reason, count + 1)
            self._where.lost(event.request_id)
        elif isinstance(event, ev.Noted):
            self.note(event.text, event.at_ns)
        elif isinstance(event, ev.Sampled):
            self._samples.append(event)
        elif isinstance(event, ev.TextMade):
            self.add_text(event.text)
        elif isinstance(event, ev.Stepped):
            self._stepped(event)
        elif self.first_ns is None and not isinstance(event, ev.Lap | ev.Rpc | ev.Speculated):
            self.first_ns = event.at_ns

    def _stepped(self, event: ev.Stepped) -> None:
        """How many ran and waited in the step, weighted by its length."""
        if self.first_ns is None:
            self.first_ns = event.began_ns
        seconds = max(0, event.at_ns - event.began_ns) / 1e9
        at = max(0.0, (event.at_ns - self.first_ns) / 1e9 - 1e-9)
        self._load.add(at, (seconds, seconds * event.running, seconds * event.waiting))

    def _began(self, event: ev.PhaseBegan) -> None:
        if self.first_ns is None:
            self.first_ns = event.at_ns
        if event.phase == ev.PREFILL:
            self._prompt += 1
        self._phase, self._running, self._began_ns = event.phase, True, event.at_ns
        self._expected[event.phase] = (event.tokens, max(1, event.chunks))
        self._phase_tokens[event.phase] = 0
        self._where.begin(event.at_ns, event.phase == ev.PREFILL, max(1, event.chunks))
        self._pass_base = self._sums()
        self._pass_phase = event.phase
        self._last_pass = {}
        self._whole_passes = None
        if event.phase == ev.PREFILL:
            # What the prompt before has left is not this one's.
            self._phase_tokens[ev.DECODE] = 0
            self._expected.pop(ev.DECODE, None)

    def note(self, text: str, at_ns: int | None = None) -> None:
        """A line for the user, of the run or of the monitor itself."""
        at_ns = self.last_ns if at_ns is None else at_ns
        self._notes.append(Note(max(0.0, (at_ns - (self.first_ns or at_ns)) / 1e9), text))

    def add_text(self, text: str) -> None:
        """Text that was generated."""
        self.text_known = True
        self._text.append(text)
        self._text_length += len(text)
        while self._text_length > MAX_TEXT and len(self._text) > 1:
            self._text_length -= len(self._text.popleft())

    def add_private_text(self, text: str) -> None:
        """Text that reaches the monitor on a way of its own: it is in no record."""
        self.text_private = True
        self.add_text(text)

    # Sums and their differences

    def _sums(self) -> Sums:
        phase = self.summary.phases.get(self._phase)
        return {layer: Parts.of(total) for layer, total in phase.layers.items()} if phase is not None else {}

    def _difference(self, sums: Sums) -> Sums:
        base = self._pass_base
        return {
            layer: Parts(*(new - old for new, old in zip(parts, base.get(layer, NO_TIME), strict=True)))
            for layer, parts in sums.items()
        }

    def _pass_ended(self) -> None:
        sums = self._sums()
        self._last_pass = done = self._difference(sums)
        self._pass_base = sums
        total = self.summary.phases.get(self._phase)
        self._whole_passes = (self._phase, total.rpc_calls, total.tokens, total.passes) if total is not None else None
        self._where.pass_ended()
        layers = self._layer_count()
        if not layers:
            return
        if self._passes is None:
            self._passes = PassSeries(_PARTS * layers)
        self._passes.add([value for layer in range(layers) for value in done.get(layer, NO_TIME)])

    def _layer_count(self) -> int:
        if self.facts.layers:
            return min(self.facts.layers, MAX_LAYERS)
        highest = max((max(total.layers, default=-1) for total in self.summary.phases.values()), default=-1)
        return min(highest + 1, MAX_LAYERS)

    def _look(self) -> None:
        """Adds what has changed since the last look to the series."""
        if self.first_ns is None:
            return
        totals = self._totals()
        at = (self.last_ns - self.first_ns) / 1e9
        # What happened since the last look belongs before now: a reading on the border is the stretch that ends there.
        self._series.add(max(0.0, at - 1e-9), [new - old for new, old in zip(totals, self._counted, strict=True)])
        self._counted = totals
        self._rates.add(at, (totals[6], totals[7], totals[8]))

    def _totals(self) -> tuple[float, ...]:
        parts = NO_TIME
        up = down = calls = 0
        for total in self.summary.phases.values():
            parts = parts.plus(Parts.of(total))
            up, down, calls = up + total.bytes_up, down + total.bytes_down, calls + total.rpc_calls
        return (*parts, up, down, self.tokens, calls)

    # The snapshot

    def snapshot(
        self,
        now_ns: int | None = None,
        *,
        status: str = snap.RUNNING,
        error: str = "",
        behind: bool = False,
        replay: str = "",
        document: dict[str, Any] | None = None,
    ) -> Snapshot:
        """The run at ``now_ns``, a reading of its own clock (None: at its last event)."""
        self._number += 1
        ended = status in snap.ENDED
        now = self.last_ns if now_ns is None or ended else max(now_ns, self.last_ns)
        age = (now - self.first_ns) / 1e9 if self.first_ns is not None else 0.0
        prefill, decode = self._phase_view(ev.PREFILL, now, ended), self._phase_view(ev.DECODE, now, ended)
        rates = self._rates.at(age) or (0.0, 0.0, 0.0)
        calls = prefill.rpc_calls + decode.rpc_calls
        text = "".join(self._text)
        if len(self._text) > 1:
            self._text = deque([text])
        return Snapshot(
            number=self._number,
            status=status,
            error=error,
            seconds=age,
            facts=self.facts,
            phase=self._phase,
            prompt=self._prompt,
            prefill=prefill,
            decode=decode,
            ttft_seconds=self.summary.ttft_seconds,
            tpot_median_seconds=self._tpot_median(ended),
            layer=self._where.layer if self._running and not ended else -1,
            layers=self._layers(),
            layers_phase=self._pass_phase,
            now=self._now_parts(age),
            ops=self._ops(),
            chunks=self._where.chunks(now, self._layer_count()) if self._running and not ended else (),
            history=self._history(),
            focus=self.focus,
            layer_history=self.layer_history(self.focus),
            layer_history_passes=self._passes.passes if self._passes else 1,
            latency=latency_of(self.summary.phases.get(self._phase)),
            rpc_calls=calls,
            rpcs_per_token=self._rpcs_per_token(),
            per_op_calls=self._per_op_calls(prefill, decode),
            up_rate=rates[0],
            down_rate=rates[1],
            token_rate=rates[2],
            in_flight=self._where.in_flight if not ended else 0,
            retries=self._retries,
            retrying=self._retrying_text(now) if not ended else "",
            endpoints=self._endpoint_views(),
            runner_bytes=self._samples[-1].runner_bytes if self._samples else 0,
            runner_peak_bytes=self.summary.memory.runner_bytes,
            server_bytes=self._samples[-1].server_bytes if self._samples else 0,
            runner_cores=self._cores(),
            notes=tuple(self._notes),
            advice=self.advice,
            text=text,
            text_known=self.text_known,
            text_private=self.text_private,
            tokens=self.tokens,
            events=self.events,
            serving=self._serving(now),
            behind=behind,
            replay=replay,
            document=document,
        )

    def _serving(self, now_ns: int) -> ServingView | None:
        requests, facts = self.summary.requests, self.facts
        if not requests and not facts.serves:
            return None
        under_way = list(requests.open.values())
        length = self._load.seconds
        return ServingView(
            sequences=facts.sequences,
            kv_room=facts.kv_room,
            running=requests.running,
            reading=sum(one.state == READING for one in under_way),
            waiting=requests.waiting,
            kv_bytes=requests.kv_bytes,
            arrived=requests.arrived,
            ended=sum(requests.ended.values()),
            failed=requests.ended.get("error", 0),
            queue=_spread(requests.queue),
            ttft=_spread(requests.ttft),
            itl=_spread(requests.itl),
            requests=tuple(_request(one, now_ns) for one in under_way[:MAX_REQUESTS]),
            load=tuple(_load(length, *row) for _, row in self._load.rows()),
        )

    def _phase_view(self, name: str, now_ns: int, ended: bool) -> PhaseView:
        total = self.summary.phases.get(name, PhaseTotal())
        under_way = self._running and self._phase == name
        running = under_way and not ended
        expected, chunks = self._expected.get(name, (0, 1))
        made = self._phase_tokens.get(name, 0)
        open_seconds = (now_ns - self._began_ns) / 1e9 if under_way else 0.0
        fraction, left, rate = self._progress(name, under_way, expected, made, open_seconds, total)
        if name == ev.PREFILL and expected:
            made = round(expected * (fraction or 0.0))
        return PhaseView(
            name=name,
            running=running,
            passes=total.passes,
            tokens=made,
            expected=expected,
            chunks=chunks,
            seconds=total.seconds + (max(0, now_ns - self.last_ns) / 1e9 if running else 0.0),
            tokens_per_second=rate,
            fraction=fraction,
            seconds_left=left if running else None,
            parts=Parts.of(total),
            rpc_calls=total.rpc_calls,
            bytes_up=total.bytes_up,
            bytes_down=total.bytes_down,
            raw_bytes_up=total.raw_bytes_up,
            raw_bytes_down=total.raw_bytes_down,
            compression_seconds=total.busy.compression_seconds,
            queue_seconds=total.busy.queue_seconds,
        )

    def _progress(
        self, name: str, under_way: bool, expected: int, made: int, seconds: float, total: PhaseTotal
    ) -> tuple[float | None, float | None, float]:
        """(fraction done, seconds left, tokens per second); ``seconds`` are those of the phase that is under way."""
        if not under_way:
            return (1.0 if total.passes else None), None, total.tokens_per_second
        if name == ev.PREFILL:
            fraction = self._where.progress(self._layer_count())
            left = seconds * (1 - fraction) / fraction if fraction > 0.02 else None
            return fraction, left, expected * fraction / seconds if seconds else 0.0
        rate = made / seconds if seconds else 0.0
        return (made / expected if expected else None), ((expected - made) / rate if rate else None), rate

    def _tpot_median(self, ended: bool) -> float | None:
        """As the report has it. Sorting all of them is not free, so it is done anew when a few more have come."""
        count = len(self.summary.tpot_seconds)
        before, value = self._tpot
        if count != before and (ended or count >= before + max(1, before // 32)):
            value = self.summary.tpot_percentile(0.5)
            self._tpot = (count, value)
        return value

    def _layers(self) -> tuple[LayerView, ...]:
        phase = self.summary.phases.get(self._pass_phase)
        if phase is None or not phase.layers:
            return ()
        sums = self._sums() if self._phase == self._pass_phase else {}
        running = self._difference(sums)
        passes = max(1, phase.passes)
        views = []
        for layer in range(self._layer_count()):
            now = running.get(layer, NO_TIME)
            if not any(now):
                now = self._last_pass.get(layer, NO_TIME)
            whole = phase.layers.get(layer)
            views.append((layer, now, Parts.of(whole).divided(passes) if whole is not None else NO_TIME))
        worst = max(views, key=lambda view: view[2].total)[0]
        return tuple(LayerView(layer, now, mean, layer == worst) for layer, now, mean in views)

    def _now_parts(self, age: float) -> Parts:
        """Of the last second or so: what the bar 'now' shows."""
        length = self._series.seconds
        sums = NO_TIME
        for at, row in self._series.rows()[-max(1, math.ceil(1.0 / length)) :]:
            if at >= age - 1.0 - length:
                sums = sums.plus(Parts(*row[:_PARTS]))
        return sums

    def _ops(self) -> tuple[OpView, ...]:
        return tuple(
            OpView(name, op, total.where, total.count, total.seconds)
            for name, phase in self.summary.phases.items()
            for op, total in phase.ops.items()
        )

    def _history(self) -> tuple[Moment, ...]:
        length = self._series.seconds
        return tuple(Moment(at, length, Parts(*row[:_PARTS]), *row[_PARTS:]) for at, row in self._series.rows())

    def layer_history(self, layer: int) -> tuple[Parts, ...]:
        """Means per pass of ``layer`` from the run's begin until now, at most 240 of them."""
        if self._passes is None or layer < 0 or layer >= self._layer_count():
            return ()
        return tuple(Parts(*values) for values in self._passes.column(_PARTS * layer, _PARTS))

    def _rpcs_per_token(self) -> float:
        """Of the phase, once it has a whole pass; 0 before that."""
        if self._whole_passes is None:
            return 0.0
        phase, calls, tokens, passes = self._whole_passes
        return calls / max(1, passes if phase == ev.PREFILL else tokens)

    def _per_op_calls(self, prefill: PhaseView, decode: PhaseView) -> int:
        """RPCs that the plan per-op would have made by now."""
        passes = float(prefill.passes + decode.passes)
        if prefill.running and prefill.fraction:
            passes += prefill.fraction
        elif decode.running and self._where.layer >= 0:
            passes += self._where.layer / max(1, self._layer_count())
        return int(PER_OP.rpc_calls(self._layer_count()) * passes)

    def _retrying_text(self, now_ns: int) -> str:
        if self._retrying is None:
            return ""
        since, reason, count = self._retrying
        times = "once" if count == 1 else f"{count} times"
        return f"retried {times} in {(now_ns - since) / 1e9:.1f} s ({reason})"

    def _endpoint_views(self) -> tuple[snap.EndpointView, ...]:
        names = self.facts.endpoints
        views = []
        for index in sorted(self.summary.endpoints)[:_ENDPOINTS]:
            total = self.summary.endpoints[index]
            name = names[index] if 0 <= index < len(names) else "embedded server"
            views.append(snap.EndpointView(name, total.rpc_calls, total.bytes_up, total.bytes_down, total.retries))
        return tuple(views)

    def _cores(self) -> float | None:
        """Cores that the runner keeps busy, over the last samples."""
        if len(self._samples) < 2:
            return None
        first, last = self._samples[0], self._samples[-1]
        seconds = (last.at_ns - first.at_ns) / 1e9
        return (last.cpu_seconds - first.cpu_seconds) / seconds if seconds > 0 else None


_RARE: Final = frozenset(
    {ev.TokensMade, ev.PhaseBegan, ev.PhaseEnded, ev.Retried, ev.Noted, ev.Sampled, ev.TextMade, ev.Stepped, ev.Arrived}
)


def _load(length: float, seconds: float, running: float, waiting: float) -> tuple[float, float]:
    """Means over a stretch in which ``seconds`` were worked. A step counts where it ends, so of a busy stretch they may
    be a little more or less than its ``length``."""
    over = seconds if 2 * seconds > length else length
    return running / over, waiting / over


def _spread(latencies: Latencies) -> Spread:
    return Spread(*(latencies.quantile(share) for share in (0.5, 0.95, 0.99)))


def _request(one: Open, now_ns: int) -> RequestView:
    since = (one.latest_ns - one.first_ns) / 1e9
    return RequestView(
        number=one.number,
        state=one.state,
        prompt_tokens=one.prompt_tokens,
        read=min(one.read, one.prompt_tokens) if one.prompt_tokens else one.read,
        made=one.made,
        max_tokens=one.max_tokens,
        seconds=max(0, now_ns - one.arrived_ns) / 1e9,
        ttft_seconds=(one.first_ns - one.arrived_ns) / 1e9 if one.first_ns else None,
        rate=(one.made - 1) / since if one.made > 1 and since > 0 else 0.0,
    )


def time_of(event: ev.Event) -> int | None:
    """When ``event`` happened, on the runner's clock; None where it has no time of its own."""
    if isinstance(event, ev.Lap):
        return event.end_ns
    if isinstance(event, ev.Rpc):
        return event.received_ns
    if isinstance(event, ev.Speculated):
        return None
    return event.at_ns


def latency_of(total: PhaseTotal | None) -> snap.Latency:
    """Of one phase's calls."""
    latencies = total.latencies if total is not None else None
    if latencies is None or not latencies.count:
        return snap.Latency()
    bins: Counter[int] = Counter()
    for place, count in latencies.counts.items():
        seconds = 1.02 ** (place + 0.5)
        bins[math.ceil(2 * math.log2(max(seconds, 1e-6) / 1e-6))] += count
    histogram = tuple((2 ** (step / 2) * 1e-6, bins[step]) for step in range(min(bins), max(bins) + 1))
    return snap.Latency(
        latencies.count,
        latencies.quantile(0.5) or 0.0,
        latencies.quantile(0.95) or 0.0,
        latencies.max_seconds,
        histogram,
    )
