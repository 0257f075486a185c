"""The records of runs: one folder for each, with its settings, its events, its document and a lock.

    <root>/<id>/meta.json                what was run, on what; from the beginning
                events.msgpack[.zst]     what happened: see eventlog
                summary.json             the document of the run, when it has ended
                lock                     held by the run's process while it lives

Only their user may read them. A folder appears under its name when it is complete, and goes by being renamed first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from teegpu.config import Config
from teegpu.errors import RecordError, nearest
from teegpu.metrics import eventfile, runlock
from teegpu.metrics.eventlog import EventWriter
from teegpu.metrics.runfolder import (
    COMPLETE,
    FAILED,
    HIDDEN,
    INTERRUPTED,
    META,
    META_SCHEMA,
    RUNNING,
    SUMMARY,
    RunFolder,
    read_json,
    write_json,
)

__all__ = [
    "COMPLETE",
    "FAILED",
    "INTERRUPTED",
    "LAST",
    "RUNNING",
    "RunFolder",
    "RunStore",
    "RunWriter",
    "open_store",
]

LAST: Final = "last"

_SWEEP_SECONDS: Final = 3600.0


class RunWriter:
    """The record of the run that this process is. No call of it fails the run: ``failure`` says what went wrong."""

    def __init__(
        self, folder: RunFolder, sink: EventWriter, lock: runlock.RunLock, meta: dict[str, Any], save_text: bool
    ) -> None:
        self.folder = folder
        self.sink = sink
        self.save_text = save_text
        self._lock = lock
        self._meta = meta
        self._failure: str | None = None
        self._concluded = False

    @property
    def failure(self) -> str | None:
        """Why the record is not whole, in one line, or None."""
        return self.sink.failure or self._failure

    def update_meta(self, **changes: Any) -> None:
        """Changes entries of ``meta.json``."""
        self._meta |= changes
        self._put(META, self._meta)

    def finish(self, document: dict[str, Any]) -> dict[str, Any]:
        """Concludes the record with ``document``; no more events are taken. Gives the document with ``record`` as it
        came out. What is stored has no text and no token ids, unless the run is to save them."""
        self.sink.end()
        document = document | {"record": {"truncated": self.sink.truncated, "failure": self.failure, "damage": []}}
        stored = document if self.save_text else _without_text(document)
        self._put(SUMMARY, stored)
        self.update_meta(status=document.get("status"))
        self._concluded = True
        return document

    def close(self) -> None:
        """Lets go of the record, and compresses it. One that was not concluded by ``finish`` is that of an interrupted
        run, and left as it is."""
        try:
            self.sink.close(compress=self._concluded)
        finally:
            self._lock.close()

    def _put(self, name: str, content: dict[str, Any]) -> None:
        try:
            write_json(self.folder.path / name, content)
        except OSError as error:
            self._failure = self._failure or (error.strerror or str(error))


class RunStore:
    """The records under ``root``, which need not exist."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self, run_id: str, meta: dict[str, Any], *, events_bytes: int, save_text: bool = False) -> RunWriter:
        """A new record, which is ``running`` until it is closed or this process ends.

        ``events_bytes`` bounds its event file. Raises ``RecordError`` where none can be made.
        """
        meta = {"schema": META_SCHEMA, "id": run_id, "status": RUNNING} | meta | {"sequence": self._next_sequence()}
        making, path = self.root / f"{HIDDEN}{run_id}.new", self.root / run_id
        with contextlib.ExitStack() as undo:
            try:
                self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
                making.mkdir(mode=0o700)
                undo.callback(shutil.rmtree, making, ignore_errors=True)
                lock = runlock.RunLock(making)
                undo.callback(lock.close)
                write_json(making / META, meta)
                sink = EventWriter(making / eventfile.PLAIN, max_bytes=events_bytes)
                undo.callback(sink.close, compress=False)
                making.rename(path)
            except OSError as error:
                raise RecordError(f"no record can be kept in {self.root}: {error.strerror or error}") from None
            sink.path = path / eventfile.PLAIN
            undo.pop_all()
        return RunWriter(RunFolder(path), sink, lock, meta, save_text)

    def all(self) -> list[RunFolder]:
        """Every record, the newest first. Raises ``RecordError`` where the folder can't be read."""
        return [run for _, run in self._ordered()]

    def find(self, name: str) -> RunFolder:
        """The record that ``name`` means: ``last``, an id, or the beginning of one only. Raises ``RecordError``."""
        runs = self.all()
        if not runs:
            raise RecordError(f"there is no record of a run in {self.root}: 'teegpu run' makes one")
        if name == LAST:
            return runs[0]
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
        for place, (meta, run) in enumerate(self._ordered()):
            size = _bytes_in(run.path)
            age_days = (now - _started(meta, run)).total_seconds() / 86_400
            beyond = kept + 1 > keep_runs or kept_bytes + size > keep_bytes or age_days > keep_days
            if place and beyond and self._take_away(run):
                removed.append(run.id)
            else:
                kept, kept_bytes = kept + 1, kept_bytes + size
        return removed

    def remove(self, run: RunFolder) -> None:
        """Raises ``RecordError`` where the run is under way, or may not be removed."""
        if runlock.held(run.path):
            raise RecordError(f"run {run.id} is under way: end it before its record")
        if not self._take_away(run):
            raise RecordError(f"run {run.id} can't be removed from {self.root}")

    def _take_away(self, run: RunFolder) -> bool:
        """Whether ``run`` is gone now. Two who do this at once don't get into each other's way."""
        going = self.root / f"{HIDDEN}{run.id}.old"
        try:
            lock = runlock.RunLock(run.path)
        except OSError:
            return False
        try:
            run.path.rename(going)
        except OSError:
            return False
        finally:
            lock.close()
        shutil.rmtree(going, ignore_errors=True)
        return True

    def _sweep(self, now: datetime) -> None:
        """Removes what a process left that was killed while it made or removed a record."""
        with contextlib.suppress(OSError):
            for path in self.root.glob(f"{HIDDEN}*.*"):
                age_seconds = now.timestamp() - path.stat().st_mtime
                if path.suffix in (".new", ".old") and age_seconds > _SWEEP_SECONDS and not runlock.held(path):
                    shutil.rmtree(path, ignore_errors=True)

    def _ordered(self) -> list[tuple[dict[str, Any], RunFolder]]:
        """Meta data (empty where it can't be read) and folder of each run, the newest first."""
        try:
            with os.scandir(self.root) as entries:
                paths = [self.root / entry.name for entry in entries if entry.is_dir() and entry.name[0] != HIDDEN]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RecordError(f"the records in {self.root} can't be read: {error.strerror}") from None
        found = [(_lenient(path / META), RunFolder(path)) for path in paths if _looks_like_a_run(path)]
        # By a number of their own, not by the clock, which may have been put back between two runs.
        return sorted(found, key=lambda one: (_sequence(one[0]), one[1].id), reverse=True)

    def _next_sequence(self) -> int:
        try:
            return max((_sequence(meta) for meta, _ in self._ordered()), default=0) + 1
        except RecordError:
            return 1


def open_store(config: Config) -> RunStore:
    """The store that ``record.dir`` names, or that of this user."""
    if config.record.dir:
        return RunStore(Path(config.record.dir).expanduser())
    return RunStore(state_folder() / "runs")


def state_folder() -> Path:
    """Where this user's records and profiles are kept, whether it exists or not."""
    base = os.environ.get("XDG_STATE_HOME", "")
    # The XDG specification: a path that is not absolute is to be ignored.
    state = Path(base) if Path(base).is_absolute() else Path(os.environ.get("HOME") or Path.home()) / ".local/state"
    return state / "teegpu"


# Files


def _lenient(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _without_text(document: dict[str, Any]) -> dict[str, Any]:
    """``document`` without what a model was told and what it said."""

    def stripped(output: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in output.items() if key not in ("text", "token_ids")}

    output = document.get("output")
    if isinstance(output, dict):
        return document | {"output": stripped(output)}
    if isinstance(output, list):
        return document | {"output": [stripped(one) for one in output]}
    return document


def _sequence(meta: dict[str, Any]) -> int:
    number = meta.get("sequence")
    return number if isinstance(number, int) else 0


def _started(meta: dict[str, Any], run: RunFolder) -> datetime:
    try:
        started = datetime.fromisoformat(meta["started_at"])
        return started if started.tzinfo else started.replace(tzinfo=UTC)
    except (KeyError, TypeError, ValueError):
        with contextlib.suppress(OSError):
            return datetime.fromtimestamp(run.path.stat().st_mtime, UTC)
        return datetime.now(UTC)


def _looks_like_a_run(path: Path) -> bool:
    return any((path / name).exists() for name in (META, SUMMARY, eventfile.PLAIN, eventfile.COMPRESSED))


def _bytes_in(path: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(path):
            total += entry.stat(follow_symlinks=False).st_size
    return total
