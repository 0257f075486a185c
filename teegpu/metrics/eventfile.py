"""The event file of a run on disk: plain while it grows, compressed when it is whole.

Compressing writes a second file and renames it, then removes the first: there is always one of them in full, and who
has the plain one open reads it to its end.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final, Protocol

import zstandard

PLAIN: Final = "events.msgpack"
COMPRESSED: Final = "events.msgpack.zst"

_PIECE_BYTES: Final = 1 << 20
_FRAME_BYTES: Final = 4 << 20
"""Uncompressed bytes of one zstd frame: what damage to a compressed file costs at most."""

_LEVEL: Final = 1
"""On events, higher levels save a few per cent more, for several times the time."""

_FRAME_MAGIC: Final = b"\x28\xb5\x2f\xfd"


class Source(Protocol):
    """The bytes of an event file, in order."""

    name: str

    def read(self) -> bytes:
        """Up to some MiB; empty where there is nothing (more, or yet)."""
        ...

    def damage(self) -> str | None:
        """What could not be read just before, once for each."""
        ...

    def close(self) -> None: ...


class Plain:
    """The growing file. It is read by the descriptor, so that it may be renamed or removed meanwhile."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> bytes:
        return os.read(self._file, _PIECE_BYTES)

    def damage(self) -> str | None:
        return None

    def close(self) -> None:
        os.close(self._file)


class Compressed:
    """The finished file. Where a frame is damaged, the next one is looked for."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._size = os.fstat(self._file).st_size
        self._at = 0
        self._frame_at = 0
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._damage: str | None = None

    def read(self) -> bytes:
        while self._at < self._size and self._damage is None:
            data = os.pread(self._file, _PIECE_BYTES // 8, self._at)
            if not data:
                break
            if self._frame is None:
                self._frame, self._frame_at = zstandard.ZstdDecompressor().decompressobj(), self._at
            try:
                out = self._frame.decompress(data)
            except zstandard.ZstdError:
                self._lose_frame()
                break
            self._at += len(data)
            if self._frame.eof:
                self._at -= len(self._frame.unused_data)
                self._frame = None
            if out:
                return out
        if self._at >= self._size and self._frame is not None:
            self._frame = None
            self._damage = f"{self.name} ends in the middle of the frame at byte {self._frame_at:,}"
        return b""

    def damage(self) -> str | None:
        told, self._damage = self._damage, None
        return told

    def close(self) -> None:
        os.close(self._file)

    def _lose_frame(self) -> None:
        """Goes on at the next frame after the one that is damaged."""
        self._damage = f"{self.name}: the frame at byte {self._frame_at:,} can't be decompressed to its end"
        self._frame = None
        at = self._frame_at + 1
        while True:
            data = os.pread(self._file, _PIECE_BYTES, at)
            found = data.find(_FRAME_MAGIC)
            if found >= 0:
                self._at = at + found
                return
            if len(data) < len(_FRAME_MAGIC):
                self._at = self._size
                return
            at += len(data) - len(_FRAME_MAGIC) + 1


def open_source(folder: Path) -> Source | None:
    """The event file in ``folder``, or None where there is none. Raises ``OSError``."""
    # The plain one may go while we look, but never before the compressed one is there.
    for kind, name in ((Plain, PLAIN), (Compressed, COMPRESSED), (Plain, PLAIN)):
        with contextlib.suppress(FileNotFoundError):
            return kind(folder / name)
    return None


def compress(folder: Path) -> None:
    """The plain file becomes the compressed one. Raises ``OSError``; then the plain one is there as it was."""
    partial = folder / f".{COMPRESSED}.partial"
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    try:
        with (
            (folder / PLAIN).open("rb") as plain,
            open(os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600), "wb") as out,
        ):
            while data := plain.read(_FRAME_BYTES):
                out.write(compressor.compress(data))
        partial.rename(folder / COMPRESSED)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    (folder / PLAIN).unlink()
