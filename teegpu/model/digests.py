"""The digests of models, kept in the user's cache so that a start does not hash gigabytes each time."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from teegpu.model import cachefile
from teegpu.model.folder import default_cache_dir

# A file that was written this shortly before may be written again within the clock's resolution, with the same size
# and time stamp: its digest is not worth keeping yet.
SETTLED_SECONDS = 2.0


class DigestCache:
    """The digest of one model folder. It holds while path, size, mtime and inode of every file stay the same.

    A cache that can't be read or written is no error: the digest is computed again.
    """

    def __init__(self, folder: Path, files: Sequence[Path], dimensions: str) -> None:
        resolved = folder.resolve()
        key = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:32]
        self._path = default_cache_dir() / "digests" / f"{key}.json"
        self._files = files
        self._dimensions = dimensions

    def get(self) -> str | None:
        stored = cachefile.read(self._path)
        try:
            if stored.get("state") != self._state():
                return None
        except OSError:
            return None
        value = stored.get("digest")
        return value if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else None

    def put(self, digest: str) -> None:
        try:
            if any(time.time() - path.stat().st_mtime < SETTLED_SECONDS for path in self._files):
                return
            cachefile.write(self._path, {"state": self._state(), "digest": digest})
        except OSError:
            return

    def _state(self) -> list[object]:
        """What must not have changed, as JSON gives it back (lists, no tuples)."""
        files: list[object] = []
        for path in self._files:
            resolved = path.resolve()
            status = resolved.stat()
            files.append([str(resolved), status.st_size, status.st_mtime_ns, status.st_ino])
        return [self._dimensions, files]
