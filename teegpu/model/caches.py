"""What is kept in the user's cache so that a start need not work it out again: small JSON files, each of which is made
again where it can't be read or no longer holds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from teegpu.files import replace, user_folder

DIGEST_SCHEME = 2
"""Counts the ways in which digests have been made: one that was kept by an earlier version says nothing of today's."""

# A file that was written this shortly before may be written again within the clock's resolution, with the same size
# and time stamp: its digest is not worth keeping yet.
SETTLED_SECONDS = 2.0


def kept(kind: str, key: bytes) -> Path:
    """The file for ``key``, which is hashed, among those of ``kind``."""
    return user_folder("cache") / kind / f"{hashlib.sha256(key).hexdigest()[:32]}.json"


def read(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty where there is none."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def write(path: Path, value: dict[str, Any]) -> None:
    """Replaces ``path`` as a whole, where that can be done."""
    with contextlib.suppress(OSError, TypeError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps(value, indent=1))


class DigestCache:
    """The digest of one model folder. It holds while path, size, mtime and inode of every file stay the same."""

    def __init__(self, folder: Path, files: Sequence[Path], dimensions: str) -> None:
        self._path = kept("digests", os.fsencode(folder.resolve()))
        self._files = files
        self._dimensions = dimensions

    def get(self) -> str | None:
        stored = read(self._path)
        try:
            if stored.get("state") != self._state():
                return None
        except OSError:
            return None
        value = stored.get("digest")
        return value if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else None

    def put(self, digest: str) -> None:
        with contextlib.suppress(OSError):
            if all(time.time() - path.stat().st_mtime >= SETTLED_SECONDS for path in self._files):
                write(self._path, {"state": self._state(), "digest": digest})

    def _state(self) -> list[object]:
        """What must not have changed, as JSON gives it back (lists, no tuples)."""
        files: list[object] = []
        for path in self._files:
            resolved = path.resolve()
            status = resolved.stat()
            files.append([str(resolved), status.st_size, status.st_mtime_ns, status.st_ino])
        return [DIGEST_SCHEME, self._dimensions, files]
