"""Where snapshots come from: a run that goes on, or the replay of one that has ended. Each reads in a thread of its own
and holds the newest snapshot ready; one that nobody fetched in time is dropped."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from teegpu.errors import RecordError
from teegpu.metrics import events as ev
from teegpu.metrics.summary import Summary
from teegpu.monitor import snapshot as snap
from teegpu.monitor.snapshot import Snapshot
from teegpu.monitor.state import LiveState, time_of

BATCH: Final = 8192
"""Events that are read at once. The screen gets its turn between two batches."""

ADVICE_SECONDS: Final = 2.0
"""How often advice is looked for while a run goes on."""

SPEEDS: Final = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, math.inf)

Advise = Callable[[Mapping[str, Any], Summary, str], list[str]]
"""(meta, summary, status) → advice in words."""


class EventSource(Protocol):
    """What is read: ``teegpu.metrics.eventlog.EventReader``."""

    @property
    def damage(self) -> list[str]: ...

    def read(self, limit: int | None = None) -> list[ev.Event]: ...

    def close(self) -> None: ...


class Run(Protocol):
    """Whose record is read: ``teegpu.metrics.store.RunFolder``."""

    @property
    def id(self) -> str: ...

    @property
    def path(self) -> Path: ...

    @property
    def status(self) -> str: ...

    def meta(self) -> dict[str, Any]: ...

    def events(self) -> EventSource: ...

    def document(self) -> dict[str, Any]: ...


def no_advice(_: Mapping[str, Any], __: Summary, ___: str) -> list[str]:
    return []


class Player:
    """Holds the newest ``Snapshot``. ``start`` begins a thread that calls ``tick`` ``hertz`` times a second; a test
    calls it by itself. ``close`` ends the thread. ``failure``: why nothing more is read.

    ``replays`` says whether the replay's methods (``faster``, ``step``, ``jump`` …) do anything.
    """

    replays = False

    def __init__(self, *, hertz: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.failure: BaseException | None = None
        self.left = False
        self._changed = True
        self.state = LiveState()
        self._period = 1.0 / hertz
        self._clock = clock
        self._lock = threading.RLock()
        self._newest: Snapshot | None = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take(self) -> Snapshot | None:
        """The newest snapshot if it has not been taken yet. Never waits."""
        newest, self._newest = self._newest, None
        return newest

    def look(self) -> Snapshot:
        """A snapshot of this moment, for who has no screen."""
        with self._lock:
            self._changed = True
            self._publish()
            newest, self._newest = self._newest, None
        assert newest is not None  # it was just made
        return newest

    def leave(self) -> None:
        """Whoever shows this is to stop. May be called anywhere, also where a signal is handled."""
        self.left = True

    def focus(self, layer: int) -> None:
        """Snapshots will have the history of ``layer``."""
        with self._lock:
            self.state.focus = layer
            self._publish()

    def summary_of(self, build: Callable[[Mapping[str, Any], Summary], dict[str, Any]]) -> dict[str, Any]:
        """What ``build`` makes of (meta, summary), while no event comes in between."""
        with self._lock:
            return build(self.state.meta, self.state.summary)

    def tick(self) -> bool:
        """Takes what is new; True where there is more at once."""
        raise NotImplementedError

    def _publish(self) -> None:
        raise NotImplementedError

    def _work(self) -> None:
        try:
            while not self._end.is_set():
                started = self._clock()
                while self.tick() and not self._end.is_set() and self._clock() - started < self._period:
                    pass
                with self._lock:
                    self._publish()
                self._end.wait(max(0.005, self._period - (self._clock() - started)))
        except BaseException as error:  # noqa: BLE001 (it is told by whoever takes snapshots, in its own thread)
            self.failure = error

    # A replay's

    def toggle(self) -> bool:
        """Stops the time of a replay, or lets it go on; whether it stands."""
        return False

    def faster(self, steps: int) -> None: ...

    def step(self) -> None: ...

    def jump(self, token: int) -> None: ...


class LivePlayer(Player):
    """Follows a run that goes on. ``run`` may come later (``attach``): as long as there is none, it is starting.

    ``now_ns`` reads the run's own clock; None: from the record's meta, which says how it stands to the time of day.
    """

    def __init__(
        self,
        run: Run | None = None,
        *,
        hertz: float = 5.0,
        advise: Advise = no_advice,
        clock: Callable[[], float] = time.monotonic,
        now_ns: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(hertz=hertz, clock=clock)
        self._advise = advise
        self._now_ns = now_ns
        self._run: Run | None = None
        self._reader: EventSource | None = None
        self._status = snap.STARTING
        self._error = ""
        self._behind = False
        self._document: dict[str, Any] | None = None
        self._advised = (-math.inf, 0)
        if run is not None:
            self.attach(run)

    @property
    def run(self) -> Run | None:
        return self._run

    def attach(self, run: Run) -> None:
        """The record is there: it is read from its begin."""
        with self._lock:
            self._run = run
            self.state.update_meta(run.meta())
            self._reader = run.events()
            self._status = snap.RUNNING

    def add_text(self, text: str) -> None:
        with self._lock:
            self.state.add_text(text)
            self._changed = True

    def note(self, text: str) -> None:
        with self._lock:
            self.state.note(text)
            self._changed = True

    def close(self) -> None:
        super().close()
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def tick(self) -> bool:
        with self._lock:
            if self._reader is None or self._run is None or self._ended:
                return False
            # Before reading: what was written until then is read now.
            status = self._run.status
            events = self._reader.read(BATCH)
            if events:
                self.state.add(events)
                self._changed = True
            self._behind = len(events) >= BATCH
            if not self._described:
                self.state.update_meta(self._run.meta())  # model and server are known a little after its begin
            if not self._behind and status != snap.RUNNING and not events:
                self._finish(status)
            return self._behind

    @property
    def _described(self) -> bool:
        facts = self.state.facts
        return bool(facts.layers and (facts.device or facts.plan == "local"))

    @property
    def _ended(self) -> bool:
        return self._status in (snap.COMPLETE, snap.INTERRUPTED, snap.FAILED)

    def _finish(self, status: str) -> None:
        assert self._run is not None
        assert self._reader is not None
        for line in self._reader.damage:
            self.state.note(line)
        self.state.update_meta(self._run.meta())
        self._document, self._error = document_of(self._run)
        self._status = status
        self.state.advice = advice_texts(self._document)
        self._changed = True

    def _publish(self) -> None:
        if self._ended and not self._changed:
            return
        self._look_for_advice()
        self._changed = False
        self._newest = self.state.snapshot(
            self._now(),
            status=self._status,
            error=self._error,
            behind=self._behind,
            document=self._document,
        )

    def _look_for_advice(self) -> None:
        at, events = self._advised
        now = self._clock()
        if self._status != snap.RUNNING or now - at < ADVICE_SECONDS or events == self.state.events:
            return
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

    def __init__(
        self, run: Run, *, speed: float = 1.0, hertz: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(hertz=hertz, clock=clock)
        self._run = run
        self._speed = speed
        self._paused = False
        self._meta = run.meta()
        self._status = run.status
        self._reader: EventSource | None = None
        self._goal: int | None = None
        self._begin()

    def _begin(self) -> None:
        if self._reader is not None:
            self._reader.close()
        focus = self.state.focus
        self.state = LiveState(self._meta)
        self.state.focus = focus
        self._reader = self._run.events()
        self._held: list[ev.Event] = []
        self._at = 0
        self._played = 0.0
        self._last = self._clock()
        self._finished = False
        self._document: dict[str, Any] | None = None
        self._error = ""
        self._changed = True

    def close(self) -> None:
        super().close()
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    # What the keys do

    def toggle(self) -> bool:
        with self._lock:
            self._paused = not self._paused
            self._changed = True
            return self._paused

    def faster(self, steps: int) -> None:
        with self._lock:
            place = min(range(len(SPEEDS)), key=lambda index: abs(_log(SPEEDS[index]) - _log(self._speed)))
            self._speed = SPEEDS[min(len(SPEEDS) - 1, max(0, place + steps))]
            self._changed = True

    def step(self) -> None:
        """On to the next token, and stand there."""
        with self._lock:
            self.jump(self.state.tokens + 1)

    def jump(self, token: int) -> None:
        """To the moment in which ``token`` tokens had been made (0: to the begin), to stand there."""
        with self._lock:
            if token < self.state.tokens or (token == 0 and self.state.events):
                self._begin()
            if not self._finished:
                self._paused = True
                self._goal = token if token > self.state.tokens else None
            self._changed = True

    # Playing

    def tick(self) -> bool:
        with self._lock:
            now = self._clock()
            elapsed, self._last = now - self._last, now
            if self._finished:
                return False
            if self._goal is None and self._paused:
                return False
            if self._goal is None and not math.isinf(self._speed):
                self._played += elapsed * self._speed
            return self._play()

    def _play(self) -> bool:
        if self._at >= len(self._held):
            assert self._reader is not None
            self._held, self._at = self._reader.read(BATCH), 0
            if not self._held:
                self._finish()
                return False
        until = self._until()
        taken = self._held[self._at : until]
        if taken:
            self.state.add(taken)
            self._changed = True
            self._at = until
        if self._goal is not None:
            self._played = (self.state.last_ns - (self.state.first_ns or self.state.last_ns)) / 1e9
            if self.state.tokens >= self._goal:
                self._goal = None
                return False
            return True
        return self._at >= len(self._held)

    def _until(self) -> int:
        """How far into the held events is to be played now."""
        held = self._held
        if self._goal is not None:
            tokens = self.state.tokens
            for index in range(self._at, len(held)):
                event = held[index]
                if isinstance(event, ev.TokensMade):
                    tokens += event.tokens
                    if tokens >= self._goal:
                        return index + 1
            return len(held)
        if math.isinf(self._speed):
            return len(held)
        first = self.state.first_ns
        if first is None:
            first = next((at for event in held[self._at :] if (at := time_of(event)) is not None), 0)
        limit = first + int(self._played * 1e9)
        for index in range(self._at, len(held)):
            at = time_of(held[index])
            if at is not None and at > limit:
                return index
        return len(held)

    def _finish(self) -> None:
        assert self._reader is not None
        for line in self._reader.damage:
            self.state.note(line)
        self._goal = None
        self._finished = True
        self._document, self._error = document_of(self._run)
        self.state.advice = advice_texts(self._document)
        self._changed = True

    def _publish(self) -> None:
        if not self._changed and (self._paused or self._finished):
            return
        self._changed = False
        first = self.state.first_ns
        now = None if first is None or self._goal is not None else first + int(self._played * 1e9)
        self._newest = self.state.snapshot(
            now,
            status=self._status if self._finished else snap.RUNNING,
            error=self._error,
            behind=self._goal is not None,
            replay=self._word(),
            document=self._document,
        )

    def _word(self) -> str:
        if self._finished:
            return "at its end"
        if self._paused:
            return "paused"
        return "at once" if math.isinf(self._speed) else f"×{self._speed:g}"


def _log(speed: float) -> float:
    return math.log(speed) if math.isfinite(speed) and speed > 0 else 100.0


def document_of(run: Run) -> tuple[dict[str, Any] | None, str]:
    """(the run's document or None, what is wrong: with the run, or with its record)."""
    try:
        document = run.document()
    except RecordError as unreadable:
        return None, str(unreadable)
    error = document.get("error")
    return document, error if isinstance(error, str) else ""


def advice_texts(document: Mapping[str, Any] | None) -> tuple[str, ...]:
    found = (document or {}).get("advice")
    if not isinstance(found, list):
        return ()
    return tuple(entry["text"] for entry in found if isinstance(entry, Mapping) and isinstance(entry.get("text"), str))
