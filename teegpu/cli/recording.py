"""The record that ``teegpu run`` keeps of itself, where it is to keep one and can. Nothing of it fails the run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from teegpu.errors import RecordError
from teegpu.metrics import environment
from teegpu.metrics.events import Event, Noted, TextMade

if TYPE_CHECKING:
    from teegpu.config import Config
    from teegpu.metrics.eventlog import EventWriter
    from teegpu.metrics.recorder import Recorder
    from teegpu.metrics.runfolder import RunFolder
    from teegpu.metrics.start import Start
    from teegpu.metrics.store import RunStore, RunWriter
    from teegpu.tee.runner import Runner

Say = Callable[[str], None]

MIB = 1 << 20

_KNOWN = ("model", "settings", "tee", "server", "note", "environment")
"""What ``meta.json`` has of the document, as far as it is known."""


class Recording:
    """From before the model is loaded to after the last word. Use it with ``with``.

    ``start`` is the run's; ``document`` what is known of it at once. ``prompt`` is kept where ``record.save_text`` says
    so. ``say`` is told in one line why a run has no record, or none that is whole.
    """

    def __init__(
        self, settings: Config, start: Start, document: dict[str, Any], *, prompt: dict[str, Any], say: Say
    ) -> None:
        self._settings = settings
        self._say = say
        self.store: RunStore | None = None
        self._writer: RunWriter | None = None
        self._server_pid: int | None = None
        self.save_text = settings.record.keep and settings.record.save_text
        if settings.record.keep:
            self._open(start, {key: document[key] for key in _KNOWN} | ({"prompt": prompt} if self.save_text else {}))

    def _open(self, start: Start, known: dict[str, Any]) -> None:
        from teegpu.metrics.store import open_store

        self.store = open_store(self._settings)
        known = {"pid": os.getpid(), "started_at": start.at, "clock": _clocks()} | known
        record = self._settings.record
        try:
            self._writer = self.store.create(
                start.id, known, events_bytes=record.events_mib * MIB, save_text=self.save_text
            )
        except RecordError as error:
            self._say(f"this run is not recorded: {error} (record.dir, or --no-record)")
        else:
            self._writer.sink.sample = self._sample

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        """Compresses the record, and removes old ones beyond what is to be kept."""
        if self._writer is None or self.store is None:
            return
        self._writer.close()
        record = self._settings.record
        try:
            self.store.prune(keep_runs=record.keep_runs, keep_bytes=record.keep_mib * MIB, keep_days=record.keep_days)
        except RecordError as error:
            self._say(f"old records are not removed: {error}")

    @property
    def folder(self) -> RunFolder | None:
        """Where the record is, or None where there is none."""
        return self._writer.folder if self._writer is not None else None

    @property
    def log(self) -> EventWriter | None:
        """What the runner's recorder is to write to."""
        return self._writer.sink if self._writer is not None else None

    def note(self, line: str) -> None:
        """Keeps a line that the user was told. It must hold nothing of the prompt."""
        if self._writer is not None:
            self._writer.sink([Noted(time.perf_counter_ns(), line)])

    def describe(self, runner: Runner) -> None:
        """Adds what is known once there is a runner with a connection."""
        if runner.embedded is not None:
            self._server_pid = runner.embedded.pid
        if self._writer is not None:
            document = runner.report("running")
            self._writer.update_meta(**{key: document[key] for key in _KNOWN})

    def text_to(self, recorder: Recorder, write: Say) -> Say:
        """``write``, which also records what it writes where the text is to be saved."""
        if self._writer is None or not self.save_text:
            return write

        def both(piece: str) -> None:
            write(piece)
            recorder.remark(TextMade(recorder.clock_ns(), piece))

        return both

    def finish(self, document: dict[str, Any], *, keep_error: bool) -> dict[str, Any]:
        """Concludes the record; gives ``document`` with what there is to say of that, and says why it is not whole.

        Without ``keep_error`` only the kind of an error is kept: its text may hold anything, also what is private.
        """
        if self._writer is None:
            return document
        kept = document
        if "error" in document and not (keep_error or self.save_text):
            kept = document | {"error": str(document["error"]).partition(":")[0]}
        document = document | {"record": self._writer.finish(kept)["record"]}
        if self._writer.failure is not None:
            self._say(
                f"the record of this run is not whole: {self._writer.failure} in {self._writer.folder.path.parent}"
            )
        return document

    def _sample(self) -> Event:
        return environment.sampled(self._server_pid)


def _clocks() -> dict[str, int]:
    """Both clocks at the same instant: events have the one, people the other."""
    return {"perf_counter_ns": time.perf_counter_ns(), "unix_ns": time.time_ns()}
