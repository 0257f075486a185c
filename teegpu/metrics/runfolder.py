"""The record of one run, as it is read: whatever there is of it, and what it adds up to."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from teegpu.errors import RecordError
from teegpu.metrics import runlock
from teegpu.metrics.document import SCHEMA, rebuild
from teegpu.metrics.eventlog import EventReader
from teegpu.metrics.events import PREFILL, Event, PhaseBegan, TextMade
from teegpu.metrics.summary import Summary

META: Final = "meta.json"
SUMMARY: Final = "summary.json"
META_SCHEMA: Final = "teegpu.meta/1"

RUNNING: Final = "running"
COMPLETE: Final = "complete"
INTERRUPTED: Final = "interrupted"
FAILED: Final = "failed"

HIDDEN: Final = "."
"""How names begin that are not there for readers: what is being made, and what is being removed."""

_READ_EVENTS: Final = 8192


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
        # In this order: a run writes its summary before it lets go of the lock.
        running = runlock.held(self.path)
        concluded = _told_in(self.path / SUMMARY)
        if running and concluded is None:
            return RUNNING
        return concluded or _told_in(self.path / META) or INTERRUPTED

    def meta(self) -> dict[str, Any]:
        """``meta.json``. Raises ``RecordError`` where it can't be read, or is of a newer release."""
        try:
            meta = read_json(self.path / META)
        except OSError as error:
            raise RecordError(f"run {self.id}: {META} can't be read: {error.strerror}") from None
        except ValueError:
            raise RecordError(f"run {self.id}: {META} is damaged") from None
        self._check_schema(meta, META_SCHEMA, META)
        return meta

    def events(self) -> EventReader:
        """Its events. Raises ``RecordError`` as ``EventReader`` does."""
        return EventReader(self.path)

    def document(self) -> dict[str, Any]:
        """The run as a ``teegpu.report/1`` document: the one that it concluded with, or one made of what there is.

        Raises ``RecordError`` for a record of a newer release, and for one that may not be read.
        """
        damage = []
        try:
            document = read_json(self.path / SUMMARY)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise RecordError(f"run {self.id}: {SUMMARY} can't be read: {error.strerror}") from None
        except ValueError:
            damage.append(f"{SUMMARY} is damaged; these figures are made of the events")
        else:
            self._check_schema(document, SCHEMA, SUMMARY)
            return document
        return self._rebuilt(damage)

    def _rebuilt(self, damage: list[str]) -> dict[str, Any]:
        status = self.status
        meta: dict[str, Any] = {"id": self.id}
        if (self.path / META).exists() and _is_json(self.path / META):
            meta |= self.meta()
        else:
            damage.append(f"{META} is not there, or damaged")
        summary = Summary()
        texts: list[list[str]] = []
        with contextlib.closing(self.events()) as reader:
            while events := reader.read(_READ_EVENTS):
                summary.add(events)
                _gather_text(events, texts)
        outputs: Any = [{"text": "".join(pieces), "finish_reason": INTERRUPTED} for pieces in texts if pieces]
        return rebuild(
            meta,
            summary,
            status,
            output=outputs[0] if len(outputs) == 1 else outputs or None,
            truncated=reader.truncated,
            failure=None,
            damage=[*damage, *reader.damage],
        )

    def _check_schema(self, found: dict[str, Any], ours: str, name: str) -> None:
        """Raises ``RecordError`` unless ``found`` is of the schema ``ours``."""
        kind, _, version = ours.rpartition("/")
        schema = str(found.get("schema", ""))
        their_kind, _, theirs = schema.rpartition("/")
        if schema == ours:
            return
        if their_kind == kind and theirs.isdigit() and int(theirs) > int(version):
            raise RecordError(
                f"run {self.id}: {name} was written by a newer teegpu ({schema}, this one reads {ours}): read it with "
                "that release"
            )
        raise RecordError(f"run {self.id}: {name} is of an unknown schema ({schema or 'none'}), not {ours}")


# Files


def _told_in(path: Path) -> str | None:
    """How the run ended, as the file says; None where it says nothing of that."""
    with contextlib.suppress(OSError, ValueError):
        status = read_json(path).get("status")
        return status if status in (COMPLETE, INTERRUPTED, FAILED) else None
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Raises ``OSError``, and ``ValueError`` for what is no JSON object."""
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("not an object")
    return content


def _is_json(path: Path) -> bool:
    try:
        read_json(path)
    except ValueError:
        return False
    except OSError as error:
        raise RecordError(f"{path} can't be read: {error.strerror}") from None
    return True


def write_json(path: Path, content: dict[str, Any]) -> None:
    """In one step: who reads the file meanwhile sees the old one or the new one. Raises ``OSError``."""
    partial = path.with_name(f"{HIDDEN}{path.name}.partial")
    text = json.dumps(content, indent=1, default=str) + "\n"
    try:
        with open(os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(text)
        partial.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _gather_text(events: Iterable[Event], texts: list[list[str]]) -> None:
    """Adds to ``texts`` the pieces of what was generated; each prompt has a list of its own."""
    for event in events:
        if isinstance(event, PhaseBegan) and event.phase == PREFILL:
            texts.append([])
        elif isinstance(event, TextMade):
            if not texts:
                texts.append([])
            texts[-1].append(event.text)
