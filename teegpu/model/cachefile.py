"""Small JSON files in the user's cache. One that can't be read or written is no error: what it holds is made again."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty where there is none."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def write(path: Path, value: dict[str, Any]) -> None:
    """Replaces ``path`` as a whole, where that can be done."""
    try:
        text = json.dumps(value, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise
    except (OSError, TypeError, ValueError):
        return
