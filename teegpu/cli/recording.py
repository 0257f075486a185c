"""The record that ``teegpu run`` and ``teegpu api`` keep of themselves, where they should and can. Nothing of it fails
the run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from teegpu.errors import RecordError
from teegpu.record.events import Event, Noted, TextMade
from teegpu.stats import environment

if TYPE_CHECKING:
    from teegpu.config import Config
    from teegpu.record.recorder import Recorder
    from teegpu.record.run import RunFolder
    from teegpu.record.store import RunStore
    from teegpu.record.writer import RunWriter
    from teegpu.runner import Runner
    from teegpu.stats.environment import Start

Say = Callable[[str], None]

MIB = 1 << 20

_KNOWN = ("model", "settings", "tee", "server", "note", "environment")
"""What a record has of the document from its beginning on, as far as it is known."""


class Recording:
    """From before the model is loaded to after the last word. Use it with ``with``.

    ``start`` is the run's; ``document`` what is known of it at once. ``prompt`` is kept where ``record.save_text`` says
    so; None: this serves others, so it goes on for long, and no text is ever kept. ``say`` is told in one line why a
    run has no record, or none that is whole.
    """

    def __init__(
        self, settings: Config, start: Start, document: dict[str, Any], *, prompt: dict[str, Any] | None, say: Say
    ) -> None:
        self._settings = settings
        self._say = say
        self.store: RunStore | None = None
        self._writer: RunWriter | None = None
        self._server_pid: int | None = None
        self.save_text = settings.record.keep and settings.record.save_text and prompt is not None
        if settings.record.keep:
            known = {key: document[key] for key in _KNOWN} | ({"prompt": prompt} if self.save_text else {})
            self._open(start, known, rolls=prompt is None)

    def _open(self, start: Start, known: dict[str, Any], *, rolls: bool) -> None:
        from teegpu.record.store import open_store

        self.store = open_store(self._settings)
        known = {"pid": os.getpid(), "started_at": start.at, "clock": _clocks()} | known
        record = self._settings.record
        try:
            self._writer = self.store.create(
                start.id, known, events_bytes=record.events_mib * MIB, save_text=self.save_text, rolls=rolls
            )
        except RecordError as error:
            self._say(f"this run is not recorded: {error} (record.dir, or --no-record)")
        else:
            self._writer.sample = self._sample

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the record, and removes old ones beyond those that are kept."""
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
    def log(self) -> RunWriter | None:
        """What the runner's recorder must write to."""
        return self._writer

    def note(self, line: str) -> None:
        """Keeps a line that the user was told. It must hold nothing of the prompt."""
        if self._writer is not None:
            self._writer([Noted(time.perf_counter_ns(), line)])

    def describe(self, runner: Runner) -> None:
        """Adds what is known once there is a runner with a connection."""
        if runner.embedded is not None:
            self._server_pid = runner.embedded.pid
        if self._writer is not None:
            document = runner.report("running")
            self._writer.update_meta(**{key: document[key] for key in _KNOWN})

    def attested(self, tee: dict[str, Any]) -> None:
        """Has who reads the record while the run goes on know what is proved of it."""
        if self._writer is not None:
            self._writer.update_meta(tee=tee)

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


def without_runner(settings: Config, start: Start, status: str, error: str | None = None) -> dict[str, Any]:
    """The document of a run that has no runner: the same keys, and what is known."""
    from teegpu import machine
    from teegpu.stats.document import document
    from teegpu.stats.summary import Summary

    run = settings.run
    names = ("prefill_plan", "decode_plan", "privacy", "transport", "wire_dtype", "chunk_tokens", "link")
    known = {name: vars(run)[name] for name in (*names, "max_tokens", "speculate")}
    return document(
        run_id=start.id,
        status=status,
        started_at=start.at,
        model={"name": settings.model.name},
        settings=known | {"endpoints": list(run.endpoints)},
        tee={"kind": machine.tee_kind(), "attested": False},
        server={},
        summary=Summary(),
        outputs=(),
        error=error,
        note=run.note,
        environment=environment.describe(),
    )


def _clocks() -> dict[str, int]:
    """Both clocks at the same instant: events have the one, people the other."""
    return {"perf_counter_ns": time.perf_counter_ns(), "unix_ns": time.time_ns()}
