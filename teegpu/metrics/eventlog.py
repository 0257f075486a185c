"""The events of a run on disk, written while it runs and read by whoever wants to, then or later.

Writing never holds the run up and never fails it: a thread encodes and writes, what it has not got to is bounded, and
an error ends the recording alone.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from teegpu.errors import RecordError
from teegpu.metrics import eventblocks, eventfile, runlock
from teegpu.metrics import events as ev

BLOCK_EVENTS: Final = 512
"""Events of one block. Encoding it takes some 0.1 ms, in which no other thread of Python runs."""

MAX_WAITING_EVENTS: Final = 65_536
"""Events that may wait for the disk: several seconds of decode, some 20 MB."""

SAMPLE_SECONDS: Final = 1.0

_RESERVE: Final = 16
"""One part in so many of a file is kept for what comes after its detail: phases, tokens, notes."""

_COARSE: Final = (
    ev.PhaseBegan,
    ev.PhaseEnded,
    ev.Retried,
    ev.TokensMade,
    ev.TextMade,
    ev.Sampled,
    ev.Noted,
)

Write = Callable[[int, memoryview], int]


class EventWriter:
    """A recorder's sink with a thread of its own; no call of it raises, and none waits for the disk but ``close``.

    It writes what it was given at least every ``flush_seconds``; ``follow`` lets it also have what the recorder has
    not handed over yet. ``sample`` is called in the thread, about once a second. Beyond ``max_bytes``, detail is left
    out, and so it is where the disk can't follow (``truncated``). ``cpu_seconds``: what the thread used of a processor.
    ``path`` is to be told where the file is moved to. Raises ``OSError`` where it can't be made.
    """

    def __init__(self, path: Path, *, max_bytes: int, flush_seconds: float = 0.1, write: Write = os.write) -> None:
        self.failure: str | None = None
        self.truncated = False
        self.cpu_seconds = 0.0
        self.sample: Callable[[], ev.Event] | None = None
        self.path = path
        self._max_bytes = max_bytes
        self._flush_seconds = flush_seconds
        self._write = write
        self._encoder = eventblocks.Encoder()
        self._held: Callable[[], Sequence[ev.Event]] = tuple
        # Each with what it was before detail was taken out of it: see _new_in.
        self._batches: deque[tuple[int, Sequence[ev.Event | None]]] = deque()
        self._given = 0
        self._taken = 0
        self._last: Sequence[ev.Event | None] = ()
        self._seen = 0
        self._left_out = False
        self._size = 0
        self._next_sample = 0.0
        self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._put(eventblocks.header())
        except BaseException:
            os.close(self._file)
            raise
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="event log", daemon=True)
        self._thread.start()

    def follow(self, held: Callable[[], Sequence[ev.Event]]) -> None:
        """``held`` gives the list that a recorder fills and will hand over: see ``Recorder.held``."""
        self._held = held

    def __call__(self, events: Sequence[ev.Event]) -> None:
        """Takes ``events``. Called by one thread at a time."""
        if self.failure is not None:
            return
        waiting: Sequence[ev.Event | None] = events
        if self.waiting_events + len(events) > MAX_WAITING_EVENTS:
            self.truncated = True
            waiting = [event if isinstance(event, _COARSE) else None for event in events]
        self._given += len(events)
        self._batches.append((id(events), waiting))

    @property
    def waiting_events(self) -> int:
        """How many were given and not taken to be written yet: over ``MAX_WAITING_EVENTS`` detail is left out."""
        return self._given - self._taken

    def end(self) -> None:
        """Writes what was given, or fails in it, and takes no more: ``failure`` and ``truncated`` are final then."""
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()
            self._next_sample = 0.0  # how it ended
            self._round()

    def close(self, *, compress: bool = True) -> None:
        """Ends the file, and compresses it if that is wanted and possible. May be called again."""
        if self._file < 0:
            return
        self.end()
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._file = -1
        if compress:
            # Without it the plain file stays, which is as good and only larger.
            with contextlib.suppress(OSError):
                eventfile.compress(self.path.parent)

    # The thread

    def _work(self) -> None:
        while not self._stop.wait(self._flush_seconds):
            self._round()
            self.cpu_seconds = time.thread_time()

    def _round(self) -> None:
        """Writes what there is."""
        try:
            events = self._collect()
            if self.failure is None:
                self._write_all(events)
        except OSError as error:
            self._fail(error.strerror or str(error))
        except (ValueError, TypeError, OverflowError) as error:
            self._fail(f"an event can't be encoded: {error}")

    def _fail(self, why: str) -> None:
        self.failure = why
        self._batches.clear()
        # Whoever reads the file need not stumble over half a block.
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._size)

    def _collect(self) -> list[ev.Event]:
        """All that is new, in order."""
        # In this order: a recorder hands its list over before it begins another, so the batches below are all that
        # came before this list.
        held = self._held()
        events: list[ev.Event] = []
        handed_over = False
        while self._batches:
            key, batch = self._batches.popleft()
            self._taken += len(batch)
            handed_over |= key == id(held)
            events += self._new_in(key, batch)
        if not handed_over:
            events += self._new_in(id(held), held)
        if self.sample is not None and time.monotonic() >= self._next_sample:
            self._next_sample = time.monotonic() + SAMPLE_SECONDS
            events.append(self.sample())
        return events

    def _new_in(self, key: int, batch: Sequence[ev.Event | None]) -> list[ev.Event]:
        """What was not yet seen of the list with the identity ``key``, which may have been seen while it grew.

        ``batch`` is that list, or a copy of it with detail left out. An identity is only compared with that of a list
        that is kept, so it can't be the identity of another one that came later.
        """
        if key == id(self._last):
            start = self._seen
        else:
            start, self._last = 0, batch
        new = batch[start:]
        self._seen = start + len(new)
        known = [event for event in new if event is not None]
        self._left_out |= len(known) < len(new)
        return known

    def _write_all(self, events: list[ev.Event]) -> None:
        for start in range(0, len(events), BLOCK_EVENTS):
            self._write_block(events[start : start + BLOCK_EVENTS])

    def _write_block(self, events: Sequence[ev.Event]) -> None:
        block = self._encoder.block(events, eventblocks.LEFT_OUT if self._left_out else 0)
        if self._size + len(block) > self._max_bytes - self._max_bytes // _RESERVE:
            self.truncated = self._left_out = True
            coarse = [event for event in events if isinstance(event, _COARSE)]
            block = self._encoder.block(coarse, eventblocks.LEFT_OUT)
            if not coarse or self._size + len(block) > self._max_bytes:
                return
        self._put(block)

    def _put(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._write(self._file, rest) :]
        self._size += len(data)


class EventReader:
    """Follows a growing file, or reads a finished one, compressed or not.

    ``damage`` says for people what could not be read; what is whole is given. Raises ``RecordError`` for a file of a
    newer version and for one that may not be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.damage: list[str] = []
        self._parser = eventblocks.Parser(0, self.damage)
        self._rest: list[ev.Event] = []
        try:
            self._source = eventfile.open_source(folder)
            if self._source is None:
                self.damage.append("there is no event file")
            else:
                self._begin(self._source)
        except OSError as error:
            raise RecordError(f"{folder}: its events can't be read: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    @property
    def truncated(self) -> bool:
        """Whether detail is missing before or in what was read: the file was full, or the disk too slow."""
        return self._parser.left_out

    def read(self, limit: int | None = None) -> list[ev.Event]:
        """What is new since the last call, in order, ``limit`` events at most; empty where nothing is."""
        events: list[ev.Event] = []
        while limit is None or len(events) < limit:
            block = self._rest or self._next()
            if block is None:
                break
            room = len(block) if limit is None else limit - len(events)
            events += block[:room]
            self._rest = block[room:]
        return events

    def close(self) -> None:
        """May be called again; then nothing more is read."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def _begin(self, source: eventfile.Source) -> None:
        head = b""
        while len(head) < eventblocks.HEADER_BYTES and (piece := source.read()):
            head += piece
        version = eventblocks.version_of(head)
        if version is not None and version > eventblocks.VERSION:
            raise RecordError(
                f"{self._folder / source.name} was written by a newer teegpu (version {version} of the format, this "
                f"one reads {eventblocks.VERSION}): read it with that release"
            )
        if version is not None:
            head = head[eventblocks.HEADER_BYTES :]
            self._parser = eventblocks.Parser(eventblocks.HEADER_BYTES, self.damage)
        # Without a header that can be read, what blocks there are still can.
        self._parser.feed(head)

    def _next(self) -> list[ev.Event] | None:
        """The events of the next block, or None where there is none yet. (A list may be empty.)"""
        while (block := self._parser.next()) is None:
            if not self._fetch():
                return None
        return block

    def _fetch(self) -> bool:
        """Reads on; False at the end of what there is."""
        source = self._source
        if source is None:
            return False
        # Asked before the end is looked for: what is there then is all that its writer has written.
        ended = self._parser.waits and not runlock.held(self._folder)
        try:
            data = source.read()
        except OSError as error:
            self._parser.lost(f"{source.name} can't be read on: {error.strerror}")
            self.close()
            return False
        if data:
            self._parser.feed(data)
            return True
        lost = source.damage()
        if lost is not None:
            self._parser.lost(lost)
            return True
        if ended:
            self._parser.finish()
        return False
