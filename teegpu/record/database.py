"""The database of one run, in SQLite: its tables, how it is opened, and how events are packed in it.

    run      one row: meta (JSON); when it has ended also status, document (JSON) and blocks (how many there are)
    events   id: from 1 on without a gap; block: a zstd frame with its checksum, of msgpack [left_out, kinds, rows]

In ``kinds`` one byte for each event says what it is, its row are its fields in their order. While a run goes on the
database has a write-ahead log, so readers and the writer don't wait for each other and a killed process leaves all that
it had committed; when it has ended it is one file.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgpack
import zstandard

from teegpu.errors import RecordError
from teegpu.files import there
from teegpu.record import events as ev
from teegpu.units import printable

FILE: Final = "run.sqlite"
PAGE_BYTES: Final = 4096

ROLLS: Final = "rolls"
"""In ``meta``: blocks that are missing are old ones that had to make room, and no damage."""

VERSION: Final = 1
_APPLICATION: Final = int.from_bytes(b"tgpu")

_TABLES: Final = {
    "run": "CREATE TABLE run (status TEXT, blocks INTEGER, meta TEXT NOT NULL, document TEXT)",
    "events": "CREATE TABLE events (id INTEGER PRIMARY KEY, block BLOB NOT NULL)",
}
"""A file that has anything else is no record: a view in a table's place is a program, which need not end."""

_MOST_VALUE_BYTES: Final = 64 << 20
"""Of one value that is read: no document or block comes near it."""

_READER_SECONDS: Final = 5.0
_WRITER_SECONDS: Final = 60.0
"""How long each waits where another process holds the database. The writer's thread has nothing else to do."""

_MAX_BLOCK_BYTES: Final = 16 << 20
"""Of a block before compression: no block of ours comes near it."""

_LEVEL: Final = 1
"""On events, higher levels save a few per cent more, for several times the time."""

_KINDS: Final[dict[type[Any], int]] = {
    ev.PhaseBegan: 1,
    ev.PhaseEnded: 2,
    ev.Lap: 3,
    ev.Rpc: 4,
    ev.Retried: 5,
    ev.TokensMade: 6,
    ev.Speculated: 7,
    ev.TextMade: 8,
    ev.Sampled: 9,
    ev.Noted: 10,
    ev.Arrived: 11,
    ev.Admitted: 12,
    ev.GaveWay: 13,
    ev.Stepped: 14,
    ev.Left: 15,
}
_TYPES: Final[dict[int, type[Any]]] = {number: kind for kind, number in _KINDS.items()}
_FIELDS: Final[dict[int, int]] = {number: len(kind._fields) for kind, number in _KINDS.items()}


FAULTS: Final = (sqlite3.Error, UnicodeDecodeError)
"""What reading a damaged file ends in: sqlite3 can't decode its own message where that quotes the damage."""


def create(folder: Path, meta: Mapping[str, Any]) -> None:
    """Makes the database in ``folder``, readable by this user alone. Raises ``OSError`` and ``sqlite3.Error``."""
    # SQLite gives its other files the mode of the first.
    os.close(os.open(folder / FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(folder / FILE, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous = OFF")  # else it takes 0.1 s, for a record that has nothing yet
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.executescript("; ".join(["BEGIN", *_TABLES.values(), "COMMIT"]))
        connection.execute("INSERT INTO run (meta) VALUES (?)", (as_json(meta),))
    finally:
        connection.close()


def to_write(folder: Path) -> sqlite3.Connection:
    """For one thread at a time. Each transaction survives the end of the process at any moment; the last ones may not
    survive a power cut. Raises ``sqlite3.Error``."""
    connection = sqlite3.connect(folder / FILE, _WRITER_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection


def to_read(folder: Path) -> sqlite3.Connection:
    """For one thread at a time. Raises ``RecordError`` where there is none that this release can read."""
    path = folder / FILE
    if not there(path):
        if (folder / "meta.json").exists():
            raise RecordError(
                f"run {folder.name} was recorded by an older teegpu, in files that this one does not read: read it "
                f"with that release, or delete it: teegpu report rm {folder.name}"
            )
        raise RecordError(f"run {folder.name}: there is no {FILE} in {folder}")
    try:
        is_file = path.is_file()
    except OSError as error:
        raise RecordError(f"run {folder.name}: {FILE} can't be read: {error.strerror}") from None
    if not is_file:  # to open a FIFO would wait for its writer
        raise RecordError(f"run {folder.name}: {FILE} is not a file")
    uri = f"{path.absolute().as_uri()}?mode=ro"
    with contextlib.ExitStack() as undo:
        try:
            connection = sqlite3.connect(uri, _READER_SECONDS, isolation_level=None, check_same_thread=False, uri=True)
            undo.callback(connection.close)
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_VALUE_BYTES)
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            tables = dict(connection.execute("SELECT name, sql FROM sqlite_schema LIMIT 9"))
        except FAULTS as error:
            raise unreadable(folder, error) from None
        if application != _APPLICATION or version < VERSION:
            raise RecordError(f"run {folder.name}: {FILE} is not a record, or damaged")
        if version > VERSION:
            raise RecordError(
                f"run {folder.name} was written by a newer teegpu (version {version} of the record, this one reads "
                f"{VERSION}): read it with that release"
            )
        if tables != _TABLES:
            raise RecordError(f"run {folder.name}: {FILE} has other tables than a record, or is damaged")
        undo.pop_all()
    return connection


def unreadable(folder: Path, error: Exception) -> RecordError:
    return RecordError(f"run {folder.name}: {FILE} can't be read: {printable(str(error))}")


def as_json(content: Mapping[str, Any]) -> str:
    """What a user or a file system calls something need not be valid Unicode; the record is."""
    return json.dumps(content, default=str).encode(errors="replace").decode()


def from_json(text: Any) -> dict[str, Any]:
    """Raises ``ValueError`` for what is no JSON object."""
    try:
        content = json.loads(text) if isinstance(text, str) else None
    except RecursionError:
        raise ValueError("too many brackets") from None
    if not isinstance(content, dict):
        raise ValueError("not an object")
    return content


class Packer:
    """Makes blocks of events. Not for several threads."""

    def __init__(self) -> None:
        self._packer = msgpack.Packer(unicode_errors="replace")
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)

    def block(self, events: Sequence[ev.Event], *, left_out: bool = False) -> bytes:
        """One block. A NamedTuple is a tuple to msgpack: kinds and rows are both made without a step of Python for
        each event, which is what makes recording cheap. ``left_out``: before it, or in it, detail was left out. Raises
        ``ValueError``, ``TypeError`` or ``OverflowError`` for what is no event."""
        try:
            kinds = bytes(map(_KINDS.__getitem__, map(type, events)))
        except KeyError as error:
            raise TypeError(f"{error} is no event") from None
        return self._compressor.compress(self._packer.pack((left_out, kinds, events)))


def unpacked(block: Any) -> tuple[bool, list[ev.Event]]:
    """(left_out, events). Raises ``ValueError``, which says what is wrong with the block."""
    try:
        if zstandard.frame_content_size(block) > _MAX_BLOCK_BYTES:
            raise ValueError("it claims to be larger than any")
        payload = zstandard.ZstdDecompressor().decompress(block, max_output_size=_MAX_BLOCK_BYTES)
    except (zstandard.ZstdError, TypeError):
        raise ValueError("it is damaged") from None
    try:
        left_out, kinds, rows = msgpack.unpackb(payload, use_list=False)
        if list(map(len, rows)) != list(map(_FIELDS.__getitem__, kinds)):
            raise TypeError("rows that are not as long as their kind says")
        # As in Packer.block, without a step of Python for each event.
        return bool(left_out), list(map(tuple.__new__, map(_TYPES.__getitem__, kinds), rows))
    except (ValueError, TypeError, KeyError, msgpack.UnpackException):
        # It is what was written, so another release wrote it, with events that this one does not know.
        raise ValueError("it holds what this release does not know") from None
