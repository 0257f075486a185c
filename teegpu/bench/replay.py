"""``teegpu bench replay``: whether the monitor's memory stays flat over the replay of a long run.

The record is made from a short run's (see ``longrecord``) by the writer of every record, in full detail. The monitor is
the real one, ``teegpu watch --speed`` in a process and on a terminal of its own, so that the clock of the replay is
quicker than the run's.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from teegpu.bench import document as doc
from teegpu.bench.cases import Case
from teegpu.bench.longrecord import LongRun
from teegpu.bench.measure import Notify, Progress
from teegpu.bench.recording import beside_the_real_ones
from teegpu.bench.watching import Watcher
from teegpu.config import Config
from teegpu.errors import RecordError, TeegpuError, UsageError
from teegpu.metrics import events as ev
from teegpu.metrics.eventlog import MAX_WAITING_EVENTS
from teegpu.metrics.runfolder import RunFolder
from teegpu.metrics.start import Start
from teegpu.metrics.store import RunStore
from teegpu.model import texts
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.options import MIB
from teegpu.tee.generate import Generation
from teegpu.tee.runner import Runner
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
_EVENTS_BYTES: Final = 1 << 40
"""No bound: the whole detail of the run is the harder case."""


@dataclass(frozen=True, slots=True)
class Reading:
    """At a moment of the replay: seconds since its start, what the monitor had read by then, and its memory."""

    seconds: float
    read_bytes: int
    resident_bytes: int


class ReplayBenchmark:
    """Replays ``tokens`` tokens of decode that took ``hours``, ``speed`` times as quickly (0: at once).

    ``breaches`` says afterwards where memory was not flat. Raises ``UsageError`` for numbers that can't be, and what
    reading the model raises.
    """

    name = "replay"
    failures: tuple[str, ...] = ()

    def __init__(self, folder: ModelFolder, base: Config, *, hours: float, tokens: int, speed: float) -> None:
        if not 0 < hours <= 1000:
            raise UsageError(f"--hours {hours:g} is not above 0 and at most 1,000")
        if tokens < PARTS * TEMPLATE_TOKENS:
            raise UsageError(f"--tokens {tokens} is below the least, {PARTS * TEMPLATE_TOKENS}")
        if not 0 <= speed <= 1e6:
            raise UsageError(f"--speed {speed:g} is not from 0 to 1,000,000")
        self._folder = folder
        self._spec = read_spec(folder)
        self._config = Case(self.name).config(base, TEMPLATE_TOKENS)
        self._hours, self._tokens, self._speed = hours, tokens, speed
        self._facts: dict[str, Any] = {}
        self._events = 0
        self._bytes = 0
        self._readings: list[Reading] = []
        self._at_end_bytes = 0
        self._started_at = doc.now()

    def run(self, notify: Notify = lambda _: None) -> None:
        with contextlib.ExitStack() as stack:
            store = stack.enter_context(beside_the_real_ones(self._config))
            notify(Progress(0, PARTS, self.name, "a short run"))
            template, meta = self._template(store)
            record = self._write(store, LongRun.of(template), meta, notify)
            del template
            self._replay(record, notify)

    def _template(self, store: RunStore) -> tuple[list[ev.Event], dict[str, Any]]:
        """The events of a short run, and what its record says of it."""
        threads_before = torch.get_num_threads()
        try:
            with Runner(self._config, self._folder) as runner:
                self._facts = runner.report("running")
                meta = {key: self._facts[key] for key in ("model", "settings", "tee", "server")}
                record = store.create(Start.now().id, meta, events_bytes=_EVENTS_BYTES)
                with contextlib.ExitStack() as stack:
                    stack.callback(record.close)
                    runner.log_to(record.sink)
                    prompt = texts.prompt_of(runner.tokenizer, PROMPT_TOKENS)
                    runner.generate(
                        prompt, sampler=runner.sampler(), on_token=lambda _: False, result=Generation(), ignore_end=True
                    )
                    runner.recorder.flush()
                    self._facts = runner.report("complete")
                    record.finish(self._facts)
                runner.log_to(None)
        finally:
            torch.set_num_threads(threads_before)
        reader = record.folder.events()
        try:
            events = reader.read()
        finally:
            reader.close()
        store.remove(record.folder)
        return events, meta

    def _write(self, store: RunStore, long: LongRun, meta: dict[str, Any], notify: Notify) -> RunFolder:
        """The long record, as the writer of every record writes it."""
        record = store.create(Start.now().id, meta, events_bytes=_EVENTS_BYTES)
        started, told = time.perf_counter(), 0
        with contextlib.ExitStack() as stack:
            stack.callback(record.close)
            sink = record.sink
            repetitions = -(-self._tokens // long.passes_tokens)
            for number, events in enumerate(long.events(self._tokens, self._hours * 3600)):
                # A run makes events far more slowly than this, and would find the disk ready.
                while sink.waiting_events + len(events) > MAX_WAITING_EVENTS // 2 and sink.failure is None:
                    time.sleep(0.005)
                sink(events)
                self._events += len(events)
                if sink.failure is not None:
                    raise RecordError(f"the long record could not be written: {sink.failure} in {store.root}")
                if number * PARTS // repetitions > told:
                    told = number * PARTS // repetitions
                    left = (time.perf_counter() - started) / number * (repetitions - number)
                    notify(Progress(0, PARTS, self.name, f"writing {self._events:,} events", seconds_left=left))
            # What the record concludes with is the short run's: it is for the monitor's last screen alone.
            record.finish(self._facts)
            notify(Progress(0, PARTS, self.name, "compressing the record"))
        if record.failure is not None or sink.truncated:
            raise RecordError(f"the long record is not whole: {record.failure or 'the disk is too slow'}")
        self._bytes = sum(path.stat().st_size for path in record.folder.path.glob("events.*"))
        return record.folder

    def _replay(self, record: RunFolder, notify: Notify) -> None:
        """Samples the monitor until it has read the whole record and stands at its end."""
        with Watcher(record, "--speed", f"{self._speed:g}") as watcher:
            watcher.wait()
            started = time.perf_counter()
            before = watcher.read_bytes()
            changed, last, part = started, 0, 0
            while time.perf_counter() - changed < _QUIET_SECONDS or last < self._bytes // 2:
                time.sleep(_SAMPLE_SECONDS)
                if not watcher.running:
                    raise TeegpuError("the monitor ended during the replay")
                now, read = time.perf_counter(), watcher.read_bytes() - before
                if read > last:
                    changed, last = now, read
                    self._readings.append(Reading(now - started, read, watcher.resident_bytes()))
                if min(PARTS - 1, read * PARTS // self._bytes) > part:
                    part = min(PARTS - 1, read * PARTS // self._bytes)
                    told = f"{human_bytes(self._readings[-1].resident_bytes)} resident"
                    left = (now - started) / part * (PARTS - part)
                    notify(Progress(part, PARTS, self.name, f"{part} of {PARTS} parts", told, left))
            self._at_end_bytes = watcher.resident_bytes()
        notify(Progress(PARTS, PARTS, self.name, "the end", f"{human_bytes(self._at_end_bytes)} resident"))

    @property
    def breaches(self) -> list[str]:
        """Where memory was not flat, for people."""
        grown = self._grown()
        if grown is None or grown <= FLAT_BYTES:
            return []
        return [f"the monitor's memory grew by {human_bytes(grown)} after the first tenth of the replay"]

    def _grown(self) -> int | None:
        """Bytes between the most of the first part and the most of any later one; None before there is one."""
        parts = self._parts()
        later = [most for number, most in parts.items() if number > 0]
        return max(later) - parts[0] if later and 0 in parts else None

    def _parts(self) -> dict[int, int]:
        """The most memory in each part of what was replayed."""
        # A compressed file is read with some overlap, so its end is where no more was read.
        whole = max((reading.read_bytes for reading in self._readings), default=0)
        most: dict[int, int] = {}
        for reading in self._readings:
            part = min(PARTS - 1, reading.read_bytes * PARTS // whole)
            most[part] = max(most.get(part, 0), reading.resident_bytes)
        return most

    def document(self, status: str) -> dict[str, Any]:
        parts = self._parts() if self._at_end_bytes else {}
        first = parts.get(0)
        results = [
            {
                "label": f"{number / PARTS:.0%} to {(number + 1) / PARTS:.0%}",
                "part": number,
                "resident_bytes": most,
                "grown_bytes": None if first is None or not number else most - first,
            }
            for number, most in sorted(parts.items())
        ]
        return doc.document(
            self.name,
            status=status,
            started_at=self._started_at,
            spec=self._spec,
            digest=str(self._facts.get("model", {}).get("digest", "")),
            settings={
                "hours": self._hours,
                "decode_tokens": self._tokens,
                "speed": self._speed,
                "flat_bytes": FLAT_BYTES,
            },
            notes=self._notes() if results else [],
            results=results,
            record={"events": self._events, "bytes": self._bytes},
            at_end_bytes=self._at_end_bytes,
            readings=[asdict(reading) for reading in self._readings],
        )

    def _notes(self) -> list[str]:
        seconds = self._readings[-1].seconds
        return [
            f"{self._events:,} events of {self._hours:g} h, {human_bytes(self._bytes)} compressed; replayed in "
            f"{seconds:,.0f} s",
            f"{human_bytes(self._at_end_bytes)} at its end, with the run's report on the screen",
            *self.breaches,
        ]
