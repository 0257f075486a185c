"""The record of the run that this process is, written while it goes on.

Writing never holds the run up and never fails it: a thread packs and writes, what it has not got to is bounded, and an
error ends the recording alone.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from teegpu.files import Lock
from teegpu.record import database
from teegpu.record import events as ev
from teegpu.record.run import RunFolder

BLOCK_EVENTS: Final = 512
"""Events of one block. Packing it takes some 0.4 ms, in 0.3 of which no other thread of Python runs."""

MAX_WAITING_EVENTS: Final = 65_536
"""Events that may wait for the disk: several seconds of decode, some 20 MB."""

SAMPLE_SECONDS: Final = 1.0

_RESERVE: Final = 16
"""One part in so many of a record is kept for what comes after its detail: phases, tokens, notes."""

_COARSE: Final = (
    ev.PhaseBegan,
    ev.PhaseEnded,
    ev.Retried,
    ev.TokensMade,
    ev.TextMade,
    ev.Sampled,
    ev.Noted,
    ev.Arrived,
    ev.Admitted,
    ev.GaveWay,
    ev.Stepped,
    ev.Left,
)


class RunWriter:
    """A recorder's sink with a thread of its own; no call of it raises, and none waits for the disk but ``end``,
    ``finish`` and ``close``.

    It writes what it was given at least every ``flush_seconds``; ``follow`` lets it also have what the recorder has
    not handed over yet. ``sample`` is called in the thread, about once a second. Beyond ``max_bytes``, detail is left
    out, or with ``rolls`` what is oldest, and so it is where the disk can't follow (``truncated``). ``failure``: why
    the record is not whole.
    ``cpu_seconds``: what the thread used of a processor. It lets go of ``lock`` when it is closed. Raises
    ``sqlite3.Error`` where nothing can be written.
    """

    def __init__(
        self,
        folder: RunFolder,
        lock: Lock,
        meta: dict[str, Any],
        *,
        max_bytes: int,
        save_text: bool = False,
        rolls: bool = False,
        flush_seconds: float = 0.1,
    ) -> None:
        self.folder = folder
        self.save_text = save_text
        self.failure: str | None = None
        self.truncated = False
        self.cpu_seconds = 0.0
        self.sample: Callable[[], ev.Event] | None = None
        self._lock = lock
        self._meta = meta
        self._meta_changed = False
        self._max_bytes = max_bytes
        self._rolls = rolls
        self._flush_seconds = flush_seconds
        self._packer = database.Packer()
        self._held: Callable[[], Sequence[ev.Event]] = tuple
        # Each with what it was before detail was taken out of it: see _new_in.
        self._batches: deque[tuple[int, Sequence[ev.Event | None]]] = deque()
        self._given = 0
        self._taken = 0
        self._last: Sequence[ev.Event | None] = ()
        self._seen = 0
        self._left_out = False
        self._full = False
        self._next_sample = 0.0
        self._connection = database.to_write(folder.path)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="record", daemon=True)
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

    def update_meta(self, **changes: Any) -> None:
        """Changes what the record says of the run from its beginning on."""
        self._meta = self._meta | changes
        self._meta_changed = True

    def end(self) -> None:
        """Writes what was given, or fails in it, and takes no more: ``failure`` and ``truncated`` are final then."""
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()
            self._next_sample = 0.0  # how it ended
            self._round()

    def finish(self, document: dict[str, Any]) -> dict[str, Any]:
        """Concludes the record with ``document``; no more events are taken. Gives the document with ``record`` as it
        came out. What is stored has no text and no token ids, unless the run is to save them."""
        self.end()
        # SQLite writes to a file that was removed as to any other, or says that the disk failed.
        if not (self.folder.path / database.FILE).exists():
            self.failure = "its files are gone"
        document = document | {"record": {"truncated": self.truncated, "failure": self.failure, "damage": []}}
        stored = database.as_json(document if self.save_text else _without_text(document))
        try:
            self._connection.execute(
                "UPDATE run SET status = ?, document = ?, blocks = (SELECT ifnull(max(id), 0) FROM events)",
                (document.get("status"), stored),
            )
        except sqlite3.Error as error:
            self.failure = self.failure or str(error)
        return document

    def close(self) -> None:
        """Makes one file of the record, and lets go of it. One that was not concluded by ``finish`` is that of an
        interrupted run. May be called again."""
        self.end()
        with contextlib.suppress(sqlite3.Error):
            # Where one reads along, the log stays beside the file, empty: that is as good.
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._connection.execute("PRAGMA busy_timeout = 100")
            self._connection.execute("PRAGMA journal_mode = DELETE")
        self._connection.close()
        self._lock.close()

    # The thread

    def _work(self) -> None:
        while not self._stop.wait(self._flush_seconds):
            self._round()
            self.cpu_seconds = time.thread_time()
        self.cpu_seconds = time.thread_time()

    def _round(self) -> None:
        """Writes what there is."""
        try:
            events = self._collected()
            if self.failure is None and (events or self._meta_changed):
                with self._connection:
                    self._connection.execute("BEGIN IMMEDIATE")
                    self._write(events)
        except (sqlite3.Error, OSError) as error:
            self._fail(str(error))
        except (ValueError, TypeError, OverflowError) as error:
            self._fail(f"an event can't be packed: {error}")

    def _fail(self, why: str) -> None:
        self.failure = why
        self._batches.clear()

    def _collected(self) -> list[ev.Event]:
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

    def _write(self, events: list[ev.Event]) -> None:
        if self._meta_changed:
            self._meta_changed = False
            self._connection.execute("UPDATE run SET meta = ?", (database.as_json(self._meta),))
        for start in range(0, len(events), BLOCK_EVENTS):
            block = events[start : start + BLOCK_EVENTS]
            if self._rolls:
                while not self._put(block, self._max_bytes) and self._let_go():
                    self.truncated = True
                continue
            if not self._full and not self._put(block, self._max_bytes - self._max_bytes // _RESERVE):
                self._full = self.truncated = self._left_out = True
            if self._full:
                self._put([event for event in block if isinstance(event, _COARSE)], self._max_bytes)

    def _put(self, events: list[ev.Event], max_bytes: int) -> bool:
        """Writes one block; False where the record would be larger than ``max_bytes`` with it."""
        if not events:
            return True
        block = self._packer.block(events, left_out=self._left_out)
        (pages,) = self._connection.execute("PRAGMA page_count").fetchone()
        (free,) = self._connection.execute("PRAGMA freelist_count").fetchone()
        # A block may take a page more than it fills, and a page of the tree's.
        if (pages - free + 2) * database.PAGE_BYTES + len(block) > max_bytes:
            return False
        self._connection.execute("INSERT INTO events (block) VALUES (?)", (block,))
        return True

    def _let_go(self) -> bool:
        """Removes the oldest blocks, one in so many; False where there is none. A reader is told by the gap."""
        first, last = self._connection.execute("SELECT min(id), max(id) FROM events").fetchone()
        if first is None:
            return False
        self._connection.execute("DELETE FROM events WHERE id <= ?", (first + (last - first) // _RESERVE,))
        return True


def _without_text(document: dict[str, Any]) -> dict[str, Any]:
    """``document`` without what a model was told and what it said."""
    outputs = document.get("outputs")
    if not outputs:
        return document
    kept = [{key: value for key, value in one.items() if key not in ("text", "token_ids")} for one in outputs]
    return document | {"outputs": kept}
