"""The records of runs, a folder for each.

    <root>/<id>/run.sqlite    what was run and what happened: see database
                lock          held by the run's process while it lives; its text is the run's number, by which runs are
                              ordered: the clock may have been put back between two of them

Only their user may read them. A folder appears under its name when it is complete, and goes by being renamed first.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from teegpu.config import Config
from teegpu.errors import RecordError, nearest
from teegpu.files import Lock, expanded, locked, private_folder, there, user_folder
from teegpu.record import database
from teegpu.record.run import FAILED, INTERRUPTED, LOCK, RunFolder
from teegpu.record.writer import RunWriter

LAST: Final = "last"

_HIDDEN: Final = "."
"""How names begin that are not there for readers: what is being made, and what is being removed."""

_SWEEP_SECONDS: Final = 3600.0

_LOOK_SECONDS: Final = 0.2
"""More than it takes another to look at a lock, or to remove a record: both hold it as a run does."""


class RunStore:
    """The records under ``root``, which need not exist."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(
        self, run_id: str, meta: dict[str, Any], *, events_bytes: int, save_text: bool = False, rolls: bool = False
    ) -> RunWriter:
        """A new record, which is ``running`` until it is closed or this process ends.

        ``events_bytes`` bounds its database; what goes where there is more is the oldest with ``rolls``, and detail
        without. Raises ``RecordError`` where none can be made.
        """
        making, path = self.root / f"{_HIDDEN}{run_id}.new", self.root / run_id
        with contextlib.ExitStack() as undo:
            try:
                private_folder(self.root)
                making.mkdir(mode=0o700)
                undo.callback(shutil.rmtree, making, ignore_errors=True)
                meta = meta | ({database.ROLLS: True} if rolls else {})
                lock = Lock(making / LOCK, wait=False)
                undo.callback(lock.close)
                (making / LOCK).write_text(f"{self._next_number()}\n", "ascii")
                database.create(making, meta)
                making.rename(path)
                undo.callback(shutil.rmtree, path, ignore_errors=True)
                writer = RunWriter(
                    RunFolder(path), lock, meta, max_bytes=events_bytes, save_text=save_text, rolls=rolls
                )
            except (OSError, sqlite3.Error) as error:
                reason = getattr(error, "strerror", None) or error
                raise RecordError(f"no record can be kept in {self.root}: {reason}") from None
            undo.pop_all()
        return writer

    def all(self) -> list[RunFolder]:
        """Every record, the newest first. Raises ``RecordError`` where the folder can't be read."""
        return [run for _, run in self._ordered()]

    def find(self, name: str) -> RunFolder:
        """The record that ``name`` means: ``last`` (not one that ended before it had computed anything, if there is
        another), an id, or the beginning of one only. Raises ``RecordError``."""
        runs = self.all()
        if not runs:
            raise RecordError(f"there is no record of a run in {self.root}: 'teegpu run' makes one")
        if name == LAST:
            return next((run for run in runs if not _never_began(run)), runs[0])
        meant = [run for run in runs if run.id == name] or [run for run in runs if name and run.id.startswith(name)]
        if not meant:
            hint = nearest(name, [run.id for run in runs])
            raise RecordError(f"there is no run '{name}'{hint or '; list them with teegpu report list'}")
        if len(meant) > 1:
            several = ", ".join(run.id for run in meant[:3]) + (", …" if len(meant) > 3 else "")
            raise RecordError(f"'{name}' is the beginning of {len(meant)} runs: {several}")
        return meant[0]

    def prune(self, *, keep_runs: int, keep_bytes: int, keep_days: float, now: datetime | None = None) -> list[str]:
        """Removes the oldest records beyond any of these bounds; the ids of those that went. The newest stays, and so
        does each that is being written. What can't be removed stays too."""
        now = now or datetime.now(UTC)
        self._sweep(now)
        removed: list[str] = []
        kept = kept_bytes = 0
        for place, (_, run) in enumerate(self._ordered()):
            size = _bytes_in(run.path)
            age_days = (now - _started(run)).total_seconds() / 86_400
            beyond = kept + 1 > keep_runs or kept_bytes + size > keep_bytes or age_days > keep_days
            if place and beyond and self._take_away(run):
                removed.append(run.id)
            else:
                kept, kept_bytes = kept + 1, kept_bytes + size
        return removed

    def remove(self, run: RunFolder) -> None:
        """Raises ``RecordError`` where the run is under way, or may not be removed. One that another removes at the
        same time is removed."""
        until = time.monotonic() + _LOOK_SECONDS
        while not self._take_away(run):
            if time.monotonic() < until:
                time.sleep(_LOOK_SECONDS / 20)
            elif locked(run.path / LOCK):
                raise RecordError(f"run {run.id} is under way: end it before its record")
            else:
                raise RecordError(f"run {run.id} can't be removed from {self.root}")

    def _take_away(self, run: RunFolder) -> bool:
        """Whether ``run`` is gone now. Two who do this at once don't get into each other's way."""
        going = self.root / f"{_HIDDEN}{run.id}.old"
        try:
            with Lock(run.path / LOCK, wait=False):
                run.path.rename(going)
        except OSError:
            return not there(run.path)
        shutil.rmtree(going, ignore_errors=True)
        return True

    def _sweep(self, now: datetime) -> None:
        """Removes what a process left that was killed while it made or removed a record."""
        with contextlib.suppress(OSError):
            for path in self.root.glob(f"{_HIDDEN}*.*"):
                age_seconds = now.timestamp() - path.stat().st_mtime
                if path.suffix in (".new", ".old") and age_seconds > _SWEEP_SECONDS and not locked(path / LOCK):
                    shutil.rmtree(path, ignore_errors=True)

    def _ordered(self) -> list[tuple[int, RunFolder]]:
        """Number and folder of each run, the newest first; 0 where the number can't be read."""
        try:
            paths = [path for path in self.root.iterdir() if path.name[0] != _HIDDEN and _looks_like_a_run(path)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RecordError(f"the records in {self.root} can't be read: {error.strerror}") from None
        found = [(_number(run), run) for run in map(RunFolder, paths)]
        return sorted(found, key=lambda one: (one[0], one[1].id), reverse=True)

    def _next_number(self) -> int:
        try:
            return max((number for number, _ in self._ordered()), default=0) + 1
        except RecordError:
            return 1


def open_store(config: Config) -> RunStore:
    """The store that ``record.dir`` names, or that of this user."""
    if config.record.dir:
        return RunStore(expanded(config.record.dir, "record.dir"))
    return RunStore(user_folder("state") / "runs")


def _looks_like_a_run(path: Path) -> bool:
    """``meta.json``: records of older releases are there to be listed and removed, not to be read. So is one of another
    user, such as root's, that can't be looked at: the others are none the worse for it."""
    return there(path / database.FILE) or (path / "meta.json").exists()


def _never_began(run: RunFolder) -> bool:
    if run.status not in (FAILED, INTERRUPTED):
        return False
    try:
        if (document := run.document()) is None:  # what was killed had no time to say what it had computed
            return False
        phases = document.get("phases") or {}
        figures = [figure for phase in phases.values() for figure in phase.values()]
        return not any(figure for figure in figures if isinstance(figure, (int, float)))
    except (RecordError, ValueError, AttributeError):  # the last: a document that is none of ours
        return False


def _number(run: RunFolder) -> int:
    try:
        return int((run.path / LOCK).read_text("ascii"))
    except (OSError, ValueError):
        return 0


def _started(run: RunFolder) -> datetime:
    try:
        started = datetime.fromisoformat(run.meta()["started_at"])
        return started if started.tzinfo else started.replace(tzinfo=UTC)
    except (RecordError, KeyError, TypeError, ValueError):
        with contextlib.suppress(OSError):
            return datetime.fromtimestamp(run.path.stat().st_mtime, UTC)
        return datetime.now(UTC)


def _bytes_in(path: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for entry in path.iterdir():
            total += entry.lstat().st_size
    return total
