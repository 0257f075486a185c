"""The record of one run, as it is read: while the run goes on, or later, whatever became of it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from teegpu.errors import RecordError
from teegpu.files import locked
from teegpu.record import database
from teegpu.record.events import Event
from teegpu.units import printable

RUNNING: Final = "running"
COMPLETE: Final = "complete"
INTERRUPTED: Final = "interrupted"
FAILED: Final = "failed"

LOCK: Final = "lock"
"""The file in a run's folder that its process holds locked while it lives."""

_BLOCKS_AT_ONCE: Final = 16


class RunFolder:
    """The record of one run. It is read anew each time it is asked: the run may go on meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def status(self) -> str:
        """``running`` as long as its process lives and has not concluded it; ``complete``, ``interrupted`` (so is a run
        that could not conclude) or ``failed``."""
        # In this order: a run concludes its record before it lets go of the lock.
        running = locked(self.path / LOCK)
        with contextlib.suppress(RecordError):
            (status,) = self.row("status")
            if status in (COMPLETE, INTERRUPTED, FAILED):
                return str(status)
        return RUNNING if running else INTERRUPTED

    def meta(self) -> dict[str, Any]:
        """What was run, on what: known from its beginning on, and more of it a little later. Raises ``RecordError``."""
        try:
            return {"id": self.id} | database.from_json(*self.row("meta"))
        except ValueError:
            raise RecordError(f"run {self.id}: what was run is damaged in its record") from None

    def document(self) -> dict[str, Any] | None:
        """What the run concluded with, None where it has not (or not yet). Raises ``RecordError`` where the record
        can't be read, and ``ValueError`` where only the document is damaged."""
        (text,) = self.row("document")
        return None if text is None else database.from_json(text)

    def events(self) -> EventReader:
        """Its events. Raises ``RecordError``."""
        rolls = False
        with contextlib.suppress(RecordError):
            rolls = self.meta().get(database.ROLLS) is True
        return EventReader(self.path, rolls=rolls)

    def row(self, columns: str) -> tuple[Any, ...]:
        """These columns of ``run``. Raises ``RecordError``."""
        with contextlib.closing(database.to_read(self.path)) as connection:
            try:
                row = connection.execute(f"SELECT {columns} FROM run").fetchone()
            except database.FAULTS as error:
                raise database.unreadable(self.path, error) from None
        if row is None:
            raise RecordError(f"run {self.id}: {database.FILE} is damaged")
        return tuple(row)


class EventReader:
    """Follows the events of a run as they are written, or reads those of one that has ended.

    ``damage`` says for people what could not be read; what is whole is given. ``truncated``: whether detail is missing
    before or in what was read: there was no more room, or the disk was too slow. ``rolls``: old blocks may have made
    room for new ones. Any number may read at once. Not for
    several threads at once. Raises ``RecordError`` for a record of a newer version and for one that can't be read.
    """

    def __init__(self, folder: Path, *, rolls: bool = False) -> None:
        self._rolls = rolls
        self.damage: list[str] = []
        self.truncated = False
        self._last = 0
        self._blocks: deque[tuple[int, Any]] = deque()
        self._rest: list[Event] = []
        self._connection: sqlite3.Connection | None = database.to_read(folder)

    def read(self, limit: int | None = None) -> list[Event]:
        """What is new since the last call, in order, ``limit`` events at most; empty where nothing is."""
        events: list[Event] = []
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
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _next(self) -> list[Event] | None:
        """The events of the next block, or None where there is none yet. (A list may be empty.)"""
        if not self._blocks:
            self._blocks.extend(self._fetched())
        if not self._blocks:
            return None
        number, block = self._blocks.popleft()
        if number != self._last + 1 and self._rolls:
            self.truncated = True
        elif number != self._last + 1:
            self.damage.append(f"{number - self._last - 1:,} blocks of events before block {number:,} are missing")
        self._last = number
        try:
            left_out, events = database.unpacked(block)
        except ValueError as error:
            self.damage.append(f"block {number:,} of the events can't be read: {error}")
            return []
        self.truncated |= left_out
        return events

    def _fetched(self) -> Iterator[tuple[int, Any]]:
        """The next blocks that are there."""
        if self._connection is None:
            return
        after = self._last
        try:
            # Asked first: what a run concludes with counts all blocks that are there by then.
            concluded = self._connection.execute("SELECT blocks FROM run").fetchone()
            # Fetched to their end, so that no transaction stays open, which would keep the log from being emptied.
            for number, block in self._connection.execute(
                "SELECT id, block FROM events WHERE id > ? ORDER BY id LIMIT ?", (self._last, _BLOCKS_AT_ONCE)
            ):
                # A damaged tree of pages may have loops, and would go on for ever.
                if number <= after:
                    raise sqlite3.DatabaseError("they are not in order")
                after = number
                yield number, block
        except database.FAULTS as error:
            self.damage.append(f"the events after block {after:,} can't be read: {printable(str(error))}")
            self.close()
            return
        count = concluded[0] if concluded is not None else None
        if after == self._last and isinstance(count, int) and after < count:
            self.damage.append(f"the last {count - after:,} blocks of events are missing")
            self.close()
