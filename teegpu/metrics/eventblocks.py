"""The bytes of an event file: a header, then blocks that each stand for themselves. Pure: bytes in, events out.

    file     magic (8 bytes) · version (u32) · CRC-32 of both (u32)
    block    marker (4 bytes) · flags (u32) · length of the payload (u32) · CRC-32 of flags, length and payload (u32) ·
             payload
    payload  msgpack [kinds, rows]: one byte for each event says what it is, its row are its fields in their order

All numbers are little-endian. A block is whole or not there: its CRC says which. After damage the next marker with a
valid block behind it is where reading goes on.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any, Final

import msgpack

from teegpu.metrics import events as ev

MAGIC: Final = b"teegpuEV"
VERSION: Final = 1
_HEADER_START: Final = struct.Struct("<8sI")
HEADER_BYTES: Final = _HEADER_START.size + 4

MARKER: Final = b"\xf5\xe7BK"
_BLOCK: Final = struct.Struct("<4sIII")
_CHECKED: Final = struct.Struct("<II")

MAX_PAYLOAD_BYTES: Final = 16 << 20
"""No block of ours comes near it. A length above it is damage, and nothing that is still being written."""

LEFT_OUT: Final = 1
"""Flag of a block: before it, or in it, detail was left out."""

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
}
_TYPES: Final[dict[int, type[Any]]] = {number: kind for kind, number in _KINDS.items()}
_FIELDS: Final[dict[int, int]] = {number: len(kind._fields) for kind, number in _KINDS.items()}


def header() -> bytes:
    start = _HEADER_START.pack(MAGIC, VERSION)
    return start + zlib.crc32(start).to_bytes(4, "little")


def version_of(data: bytes) -> int | None:
    """The version that the header ``data`` names; None where it is none, or damaged."""
    start, crc = data[: _HEADER_START.size], data[_HEADER_START.size : HEADER_BYTES]
    if zlib.crc32(start).to_bytes(4, "little") != crc:
        return None
    magic, version = _HEADER_START.unpack(start)
    return int(version) if magic == MAGIC else None


class Encoder:
    """Makes blocks of events. Not for several threads."""

    def __init__(self) -> None:
        # What a user or a file system calls something need not be valid Unicode; the record is.
        self._packer = msgpack.Packer(unicode_errors="replace")

    def block(self, events: Sequence[ev.Event], flags: int = 0) -> bytes:
        """One block. A NamedTuple is a tuple to msgpack: kinds and rows are both made without a step of Python for
        each event, which is what makes recording cheap. Raises ``ValueError``, ``TypeError`` or ``OverflowError`` for
        what is no event."""
        try:
            kinds = bytes(map(_KINDS.__getitem__, map(type, events)))
        except KeyError as error:
            raise TypeError(f"{error} is no event") from None
        payload: bytes = self._packer.pack((kinds, events))
        checked = _CHECKED.pack(flags, len(payload))
        return b"".join((MARKER, checked, zlib.crc32(payload, zlib.crc32(checked)).to_bytes(4, "little"), payload))


class Parser:
    """Takes a file's bytes piece by piece, and gives its events. ``at``: the place in the file of the first of them.

    ``damage`` tells people what could not be read; ``left_out`` says that the writer had left detail out.
    """

    def __init__(self, at: int, damage: list[str]) -> None:
        self.damage = damage
        self.left_out = False
        self._bytes = bytearray()
        self._at = at
        self._skipping_from: int | None = None

    @property
    def waits(self) -> bool:
        """Whether it has bytes that are no block, or not yet one."""
        return bool(self._bytes) or self._skipping_from is not None

    def feed(self, data: bytes) -> None:
        self._bytes += data

    def next(self) -> list[ev.Event] | None:
        """The events of the next block that is there in full, or None. What is torn at the end stays, in case more of
        it comes."""
        while self._bytes:
            block = self._whole_block(0)
            if block is None:
                # Torn or damaged? Where a valid block follows, nothing more of this one will come.
                found = self._search()
                if found is None:
                    return None
                self._skip(found)
                continue
            flags, payload, size = block
            self._end_of_damage()
            self._drop(size)
            self.left_out |= bool(flags & LEFT_OUT)
            return self._events(payload)
        return None

    def finish(self) -> None:
        """Nothing more comes: names what is left."""
        if self._bytes:
            self._skip(len(self._bytes))
        self._end_of_damage()

    def lost(self, what: str) -> None:
        """Bytes are missing here, for the reason ``what``."""
        self.finish()
        self.damage.append(what)

    def _whole_block(self, at: int) -> tuple[int, bytes, int] | None:
        """(flags, payload, size) of the block at ``at``, or None where there is no whole and valid one."""
        data = self._bytes
        if len(data) - at < _BLOCK.size:
            return None
        marker, flags, length, crc = _BLOCK.unpack_from(data, at)
        end = at + _BLOCK.size + int(length)
        if marker != MARKER or length > MAX_PAYLOAD_BYTES or end > len(data):
            return None
        with memoryview(data) as view:
            payload = bytes(view[at + _BLOCK.size : end])
        if zlib.crc32(payload, zlib.crc32(_CHECKED.pack(flags, length))) != crc:
            return None
        return flags, payload, end - at

    def _search(self) -> int | None:
        """Where the next valid block begins, or None. Bytes that can't be part of one any more are dropped."""
        data = self._bytes
        at = data.find(MARKER, 1)
        while at >= 0:
            if self._whole_block(at) is not None:
                return at
            at = data.find(MARKER, at + 1)
        if self._begins_a_block():
            return None
        # Only what may be the beginning of a block is worth keeping.
        first = data.find(MARKER, 1)
        keep = first if first >= 0 else len(data) - _partial_marker(data)
        self._skip(keep)
        return None

    def _begins_a_block(self) -> bool:
        """Whether what is there may still become a block when more comes."""
        data = self._bytes
        if not data.startswith(MARKER[: min(len(data), len(MARKER))]):
            return False
        if len(data) < _BLOCK.size:
            return True
        _, _, length, _ = _BLOCK.unpack_from(data)
        return length <= MAX_PAYLOAD_BYTES and len(data) < _BLOCK.size + length

    def _skip(self, count: int) -> None:
        if count and self._skipping_from is None:
            self._skipping_from = self._at
        self._drop(count)

    def _drop(self, count: int) -> None:
        del self._bytes[:count]
        self._at += count

    def _end_of_damage(self) -> None:
        if self._skipping_from is not None:
            size = self._at - self._skipping_from
            self.damage.append(f"{size:,} bytes from byte {self._skipping_from:,} on can't be read")
            self._skipping_from = None

    def _events(self, payload: bytes) -> list[ev.Event]:
        try:
            kinds, rows = msgpack.unpackb(payload, use_list=False)
            if list(map(len, rows)) != list(map(_FIELDS.__getitem__, kinds)):
                raise TypeError("rows that are not as long as their kind says")
            # As in Encoder.block, without a step of Python for each event.
            return list(map(tuple.__new__, map(_TYPES.__getitem__, kinds), rows))
        except (ValueError, TypeError, KeyError, msgpack.UnpackException):
            # It is what was written, so another release wrote it, with events that this one does not know.
            self.damage.append(f"a block before byte {self._at:,} holds what this release does not know")
            return []


def _partial_marker(data: bytearray) -> int:
    """How many bytes at the end of ``data`` are the beginning of a marker."""
    return next((size for size in range(len(MARKER) - 1, 0, -1) if data.endswith(MARKER[:size])), 0)
