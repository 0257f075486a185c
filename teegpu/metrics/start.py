"""When a run began, and its id."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True, slots=True)
class Start:
    """``at`` is the wall clock's time (ISO 8601, UTC), ``id`` that time and a few random digits: runs that begin at
    once have different ones."""

    id: str
    at: str

    @classmethod
    def now(cls) -> Start:
        now = datetime.now(UTC)
        return cls(f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}", now.isoformat(timespec="milliseconds"))
