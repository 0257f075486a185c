"""Whether the monitor's memory stays flat over the replay of a long run. Exits with 9 where it does not.

The record is made from a short run's: its decode passes again and again, their times moved on, by the writer of every
record, in full detail. The monitor is the real one, with a clock of the replay that is quicker than the run's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import Script, generate, model_of, new_record, prompt_of, scratch_store
from benchmarks.watcher import Watcher
from teegpu.bench.cases import Case
from teegpu.errors import TeegpuError, ThresholdError
from teegpu.options import MIB
from teegpu.record import events as ev
from teegpu.runner import Runner
from teegpu.units import human_bytes

PROMPT_TOKENS: Final = 32
TEMPLATE_TOKENS: Final = 8
"""Tokens of the short run: its passes are the ones that are repeated."""

PARTS: Final = 10
FLAT_BYTES: Final = 8 * MIB
"""Memory counts as flat where it grows by no more after the first of ``PARTS`` parts of the replay."""

_SAMPLE_SECONDS: Final = 0.25
_QUIET_SECONDS: Final = 3.0
"""When the monitor has read nothing for so long, it is through."""
_OVER_SECONDS: Final = 15.0
"""The same, where it seems to have read less than half."""
_WAITING_EVENTS: Final = 20_000
_EVENTS_BYTES: Final = 1 << 40
"""No bound: the whole detail of the run is the harder case."""

_TIMES: Final = ("at_ns", "start_ns", "end_ns", "sent_ns", "received_ns")
_CLAIMS: Final = ("compression_seconds", "queue_seconds", "decode_seconds", "compute_seconds", "encode_seconds")


@dataclass(frozen=True)
class LongRun:
    """A short run's events: ``begin`` is what came before, the first decode pass included; ``passes`` are the decode
    passes after it, with ``tokens`` tokens in ``ns`` from ``began_ns`` on."""

    begin: Sequence[ev.Event]
    passes: Sequence[ev.Event]
    tokens: int
    began_ns: int
    ns: int

    @classmethod
    def of(cls, events: Sequence[ev.Event]) -> LongRun:
        """Raises ``TeegpuError`` for a run with fewer than two decode passes."""
        decode = next(at for at, e in enumerate(events) if isinstance(e, ev.PhaseBegan) and e.phase == ev.DECODE)
        made = [at for at, e in enumerate(events) if isinstance(e, ev.TokensMade) and at > decode]
        if len(made) < 2:
            raise TeegpuError("a long record can't be made from a run with fewer than two decode passes")
        passes = events[made[0] + 1 : made[-1] + 1]
        began, ended = events[made[0]], events[made[-1]]
        assert isinstance(began, ev.TokensMade)
        assert isinstance(ended, ev.TokensMade)
        tokens = sum(event.tokens for event in passes if isinstance(event, ev.TokensMade))
        return cls(events[: made[0] + 1], passes, tokens, began.at_ns, ended.at_ns - began.at_ns)

    def events(self, tokens: int, seconds: float) -> Iterator[list[ev.Event]]:
        """At least ``tokens`` tokens of decode in about ``seconds``, a list for each repetition: what has happened is
        as it was, and takes as much more time, or less, as it must."""
        yield [
            event._replace(tokens=tokens) if isinstance(event, ev.PhaseBegan) and event.phase == ev.DECODE else event
            for event in self.begin
        ]
        repetitions = -(-tokens // self.tokens)
        factor = seconds / repetitions / (self.ns / 1e9)
        step_ns = round(self.ns * factor)
        ids = [event.request_id for event in self.passes if isinstance(event, (ev.Lap, ev.Rpc)) and event.request_id]
        requests = max(ids) - min(ids) + 1 if ids else 0
        for number in range(repetitions):
            yield [self._moved(event, factor, number * step_ns, number * requests) for event in self.passes]
        passes = sum(isinstance(event, ev.TokensMade) for event in self.passes)
        end_ns = self.began_ns + repetitions * step_ns
        yield [ev.PhaseEnded(end_ns, ev.DECODE, 1 + repetitions * self.tokens, 1 + repetitions * passes)]

    def _moved(self, event: ev.Event, factor: float, by_ns: int, requests: int) -> ev.Event:
        """``event``, its times stretched from the first pass's begin and moved on, its request another one."""
        changed: dict[str, Any] = {}
        for name in event._fields:
            value = getattr(event, name)
            if name in _TIMES:
                changed[name] = self.began_ns + round((value - self.began_ns) * factor) + by_ns
            elif name in _CLAIMS:
                changed[name] = value * factor
            elif name == "operations":
                changed[name] = {op: (count, seconds * factor) for op, (count, seconds) in value.items()}
            elif name == "request_id" and value:  # 0: a lap that belongs to no request
                changed[name] = value + requests
        return event._replace(**changed)


@dataclass(frozen=True, slots=True)
class Reading:
    """At a moment of the replay: seconds since its start, what the monitor had read by then, and its memory."""

    seconds: float
    read_bytes: int
    resident_bytes: int


def replayed(script: Script, folder: Path, size: int, speed: float) -> tuple[list[Reading], int]:
    """Readings until the monitor has read all ``size`` bytes and stands at the end, and its memory there."""
    readings: list[Reading] = []
    with Watcher(folder, "--speed", f"{speed:g}") as watcher:
        watcher.wait()
        started = changed = time.perf_counter()
        before, last = watcher.read_bytes(), 0
        # What it read before its first screen is not counted: of a short record that may be more than half.
        while (quiet := time.perf_counter() - changed) < _QUIET_SECONDS or (last < size // 2 and quiet < _OVER_SECONDS):
            time.sleep(_SAMPLE_SECONDS)
            if not watcher.running:
                raise TeegpuError("the monitor ended during the replay")
            now, read = time.perf_counter(), watcher.read_bytes() - before
            if read > last:
                if read * PARTS // size > last * PARTS // size:
                    script.tell(f"{read / size:.0%}: {human_bytes(watcher.resident_bytes())} resident")
                changed, last = now, read
                readings.append(Reading(now - started, read, watcher.resident_bytes()))
        return readings, watcher.resident_bytes()


def by_part(readings: Sequence[Reading]) -> dict[int, int]:
    """The most memory in each of ``PARTS`` parts of what was read."""
    # A compressed file is read with some overlap, so its end is where no more was read.
    whole = max(reading.read_bytes for reading in readings)
    most: dict[int, int] = {}
    for reading in readings:
        part = min(PARTS - 1, reading.read_bytes * PARTS // whole)
        most[part] = max(most.get(part, 0), reading.resident_bytes)
    return most


def main(arguments: Sequence[str] | None = None) -> None:
    script = Script(__doc__ or "")
    script.parser.add_argument("--hours", type=float, default=1.0)
    script.parser.add_argument("--tokens", type=int, default=36_000)
    script.parser.add_argument("--speed", type=float, default=30.0, help="0: at once")
    given = script.parse(arguments)
    settings = Case("replay").config(script.settings(), TEMPLATE_TOKENS)
    model = model_of(settings)
    with scratch_store(settings) as store:
        with Runner(settings, model) as runner:
            known = runner.report("running")
            record = new_record(store, runner, known, events_bytes=_EVENTS_BYTES)
            generate(runner, prompt_of(runner, PROMPT_TOKENS))
            report = runner.report("complete")
            record.finish(report)
            record.close()
            reader = record.folder.events()
            template = reader.read()
            reader.close()
            record = new_record(store, runner, known, events_bytes=_EVENTS_BYTES)
            runner.log_to(None)
        count = 0
        for events in LongRun.of(template).events(given.tokens, given.hours * 3600):
            # A run makes events far more slowly than this, and would find the disk ready.
            while record.waiting_events + len(events) > _WAITING_EVENTS and record.failure is None:
                time.sleep(0.005)
            record(events)
            count += len(events)
        # What the record concludes with is the short run's: it is for the monitor's last screen alone.
        record.finish(report)
        record.close()
        if record.failure is not None:
            raise TeegpuError(f"the long record is not whole: {record.failure}")
        size = sum(path.stat().st_size for path in record.folder.path.iterdir())
        script.tell(f"{count:,} events, {human_bytes(size)}")
        readings, at_end = replayed(script, record.folder.path, size, given.speed)
    parts = by_part(readings)
    first = parts[min(parts)]
    rows = [["of the replay", "monitor's memory", "more than in the first part"]]
    rows += [
        [f"{part / PARTS:.0%}", human_bytes(most), f"{(most - first) / MIB:+.1f} MiB"]
        for part, most in sorted(parts.items())
    ]
    notes = [
        f"{count:,} events of {given.hours:g} h, {human_bytes(size)}; replayed in {readings[-1].seconds:,.0f} s",
        f"{human_bytes(at_end)} at its end, with the run's report on the screen",
    ]
    script.finish(rows, notes, [asdict(reading) for reading in readings], folder=model)
    grown = max(parts.values()) - first
    if grown > FLAT_BYTES:
        script.tell(f"the monitor's memory grew by {human_bytes(grown)} after the first part of the replay")
        sys.exit(ThresholdError.exit_code)


if __name__ == "__main__":
    main()
