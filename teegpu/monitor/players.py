"""Where snapshots come from: a run that goes on, or the replay of one that has ended."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from teegpu.errors import RecordError
from teegpu.monitor import snapshot as snap
from teegpu.monitor.snapshot import Snapshot
from teegpu.monitor.state import LiveState, time_of
from teegpu.record import events as ev
from teegpu.report.facts import remarks
from teegpu.stats.document import recorded
from teegpu.stats.summary import Summary

if TYPE_CHECKING:
    from teegpu.record.run import EventReader, RunFolder

BATCH: Final = 2048
"""Events that are read at once, in some 10 ms. The screen gets its turn between two batches."""

ADVICE_SECONDS: Final = 2.0
"""How often advice is looked for while a run goes on."""

SPEEDS: Final = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, math.inf)

Advise = Callable[[Mapping[str, Any], Summary, str], list[str]]
"""(meta, summary, status) → advice in words."""


class Player:
    """Reads the record of a run. ``tick`` takes what is new; ``look`` makes a snapshot of this moment, and ``take``
    one where it would differ from the last.

    All of it is for the thread that draws; only ``leave`` and ``end`` may be called anywhere, and what a subclass says.
    ``replays``: whether ``toggle``, ``faster``, ``step`` and ``jump`` do anything.
    """

    replays = False

    def __init__(self, run: RunFolder | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.run = run
        self.left = self.ending = False
        self.state = LiveState()
        self._clock = clock
        self._reader: EventReader | None = None
        self._status = snap.STARTING
        self._changed = True
        self._error = ""
        self._document: dict[str, Any] | None = None

    def _open(self, run: RunFolder) -> EventReader:
        """The record from its begin."""
        self.close()
        self.state.update_meta(run.meta())
        self._reader = run.events()
        self._document, self._error = None, ""
        return self._reader

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def leave(self) -> None:
        """Asks whoever shows this to stop."""
        self.left = True

    def end(self) -> None:
        """The same, and not to be waited for."""
        self.left = self.ending = True

    def tick(self) -> bool:
        """Takes what is new; True where there is more at once."""
        raise NotImplementedError

    def look(self) -> Snapshot:
        """This moment."""
        raise NotImplementedError

    def take(self) -> Snapshot | None:
        """This moment, None where nothing can have changed since the last look."""
        return None if self._stands and not self._changed else self.look()

    @property
    def _stands(self) -> bool:
        """Whether its clock does."""
        raise NotImplementedError

    def focus(self, layer: int) -> None:
        """Snapshots will have the history of ``layer``."""
        self.state.focus = layer
        self._changed = True

    def _conclude(self, run: RunFolder, reader: EventReader) -> None:
        """Everything is read: the run's document, and what is wrong with the run or its record."""
        for line in reader.damage:
            self.state.note(line)
        try:
            self._document = document = recorded(run)
        except RecordError as unreadable:
            self._error = str(unreadable)
            return
        for line in remarks(document):
            self.state.note(line)
        self._error = str(document.get("error") or "")
        advice = document.get("advice")
        found = [entry.get("text") for entry in advice if isinstance(entry, dict)] if isinstance(advice, list) else []
        self.state.advice = tuple(text for text in found if isinstance(text, str))

    # A replay's

    def toggle(self) -> None: ...

    def faster(self, steps: int) -> None: ...

    def step(self) -> None: ...

    def jump(self, token: int) -> None: ...


class LivePlayer(Player):
    """Follows a run that goes on. As long as there is no ``run``, it is starting; ``attach``, ``add_text`` and
    ``note`` may be called by any thread.

    ``now_ns`` reads the run's own clock; None: from the record's meta, which says how it stands to the time of day.
    """

    def __init__(
        self,
        run: RunFolder | None = None,
        *,
        advise: Advise | None = None,
        clock: Callable[[], float] = time.monotonic,
        now_ns: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(run, clock=clock)
        if run is not None:
            self._open(run)
            self._status = snap.RUNNING
        self._advise = advise
        self._now_ns = now_ns
        self._behind = False
        self._advised = (-math.inf, 0)
        self._heard: deque[tuple[Callable[[str], None], str]] = deque()

    def attach(self, run: RunFolder) -> None:
        """The record is there."""
        self.run = run

    def add_text(self, text: str) -> None:
        """A piece of the answer, which is in no file."""
        self._heard.append((self.state.add_private_text, text))

    def note(self, text: str) -> None:
        self._heard.append((self.state.note, text))

    def tick(self) -> bool:
        self._take_heard()
        run = self.run
        if run is None or self._stands:
            return False
        reader = self._reader
        if reader is None:
            try:
                reader, self._status = self._open(run), snap.RUNNING
            except RecordError as error:
                self.state.note(str(error))
                self.run = None
                return False
        # Before reading: what was written until then is read now.
        status = run.status
        events = reader.read(BATCH)
        if events:
            self.state.add(events)
        self._behind = len(events) >= BATCH
        if not self._described:
            self.state.update_meta(run.meta())  # model and server are known a little after its begin
        if status != snap.RUNNING and not events:
            self.state.update_meta(run.meta())
            self._conclude(run, reader)
            self._status = status
            self._changed = True
        return self._behind

    def _take_heard(self) -> None:
        while self._heard:
            take, text = self._heard.popleft()
            take(text)
            self._changed = True

    @property
    def _described(self) -> bool:
        facts = self.state.facts
        return bool(facts.layers and (facts.device or not facts.remote))

    @property
    def _stands(self) -> bool:
        return self._status in snap.ENDED

    def look(self) -> Snapshot:
        self._take_heard()
        self._look_for_advice()
        self._changed = False
        return self.state.snapshot(
            self._now(), status=self._status, error=self._error, behind=self._behind, document=self._document
        )

    def _look_for_advice(self) -> None:
        at, events = self._advised
        now = self._clock()
        if self._advise is None or self._status != snap.RUNNING:
            return
        if now - at >= ADVICE_SECONDS and events != self.state.events:
            self._advised = (now, self.state.events)
            self.state.advice = tuple(self._advise(self.state.meta, self.state.summary, snap.RUNNING))

    def _now(self) -> int | None:
        if self._now_ns is not None:
            return self._now_ns()
        clock = self.state.meta.get("clock")
        if not isinstance(clock, Mapping) or "unix_ns" not in clock or "perf_counter_ns" not in clock:
            return None
        return int(clock["perf_counter_ns"]) + time.time_ns() - int(clock["unix_ns"])


class ReplayPlayer(Player):
    """Plays a finished run again, ``speed`` times as quickly as it was (infinite: at once)."""

    replays = True

    def __init__(self, run: RunFolder, *, speed: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(run, clock=clock)
        self._of = run
        self._speed = speed
        self._paused = False
        self._goal: int | None = None
        self._begin()

    def _begin(self) -> None:
        focus, self.state = self.state.focus, LiveState()
        self.state.focus = focus
        self._events = self._open(self._of)
        self._status = self._of.status
        self._held: list[ev.Event] = []
        self._at = 0
        self._played = 0.0
        self._last = self._clock()
        self._finished = False
        self._changed = True

    # What the keys do

    def toggle(self) -> None:
        """Stops the time, or lets it go on."""
        self._paused = not self._paused
        self._changed = True

    def faster(self, steps: int) -> None:
        """The next speed, or the one before; one that is not among them counts as the nearest."""

        def apart(place: int) -> float:
            logs = [math.log(speed) if 0 < speed < math.inf else 100.0 for speed in (SPEEDS[place], self._speed)]
            return abs(logs[0] - logs[1])

        place = min(range(len(SPEEDS)), key=apart)
        self._speed = SPEEDS[min(len(SPEEDS) - 1, max(0, place + steps))]
        self._changed = True

    def step(self) -> None:
        """On to the next token, and stand there."""
        self.jump(self.state.tokens + 1)

    def jump(self, token: int) -> None:
        """To the moment in which ``token`` tokens had been made (0: to the begin), to stand there."""
        if token < self.state.tokens or (token == 0 and self.state.events):
            self._begin()
        if not self._finished:
            self._paused = True
            self._goal = token if token > self.state.tokens else None
        self._changed = True

    # Playing

    def tick(self) -> bool:
        now = self._clock()
        elapsed, self._last = now - self._last, now
        if self._stands:
            return False
        if self._goal is None and not math.isinf(self._speed):
            self._played += elapsed * self._speed
        if self._at >= len(self._held):
            self._held, self._at = self._events.read(BATCH), 0
            if not self._held:
                self._goal = None
                self._finished = True
                self._conclude(self._of, self._events)
                self._changed = True
                return False
        until = self._until()
        if until > self._at:
            self.state.add(self._held[self._at : until])
            self._at = until
            self._changed = True
        if self._goal is None:
            return self._at >= len(self._held)
        self._played = (self.state.last_ns - (self.state.first_ns or self.state.last_ns)) / 1e9
        if self.state.tokens >= self._goal:
            self._goal = None
        return self._goal is not None

    def _until(self) -> int:
        """How far into the held events is to be played now."""
        rest = range(self._at, len(self._held))
        if self._goal is not None:
            tokens = self.state.tokens
            for index in rest:
                event = self._held[index]
                tokens += event.tokens if isinstance(event, ev.TokensMade) else 0
                if tokens >= self._goal:
                    return index + 1
        elif not math.isinf(self._speed):
            times = [(index, at) for index in rest if (at := time_of(self._held[index])) is not None]
            first = self.state.first_ns
            if first is None:
                first = times[0][1] if times else 0
            limit = first + int(self._played * 1e9)
            return next((index for index, at in times if at > limit), len(self._held))
        return len(self._held)

    @property
    def _stands(self) -> bool:
        return self._finished or (self._paused and self._goal is None)

    def look(self) -> Snapshot:
        self._changed = False
        first = self.state.first_ns
        now = None if first is None or self._goal is not None else first + int(self._played * 1e9)
        speed = "at once" if math.isinf(self._speed) else f"×{self._speed:g}"
        return self.state.snapshot(
            now,
            status=self._status if self._finished else snap.RUNNING,
            error=self._error,
            behind=self._goal is not None,
            replay="at its end" if self._finished else "paused" if self._paused else speed,
            document=self._document,
        )
