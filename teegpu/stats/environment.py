"""When a run began and what it ran on: the machine, the versions, memory. Nothing in it names the machine or its
user."""

from __future__ import annotations

import platform
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from teegpu import __version__, machine
from teegpu.record.events import Sampled


@dataclass(frozen=True, slots=True)
class Start:
    """When a run began. ``at`` is the wall clock's time (ISO 8601, UTC), ``id`` that time and a few random digits: runs
    that begin at once have different ones."""

    id: str
    at: str

    @classmethod
    def now(cls) -> Start:
        now = datetime.now(UTC)
        return cls(f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}", now.isoformat(timespec="milliseconds"))


class Load:
    """What else the machine did since this was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._busy, self._stolen = self._now()

    def _now(self) -> tuple[float, float]:
        self._cores, busy, stolen = machine.machine_cpu_seconds()
        return busy - machine.cpu_seconds(), stolen

    def to_json(self) -> dict[str, Any]:
        """``cores`` of the machine, how many of them other processes used on average (``other_cores``), and how many
        its host withheld (``stolen_cores``); empty where the kernel does not say."""
        busy, stolen = self._now()
        seconds = time.monotonic() - self._began
        if not self._cores or seconds <= 0:
            return {}
        return {
            "cores": self._cores,
            "other_cores": max(0.0, busy - self._busy) / seconds,
            "stolen_cores": max(0.0, stolen - self._stolen) / seconds,
        }


def describe() -> dict[str, Any]:
    """``machine`` (architecture), ``cpu``, ``cores`` (that may be used), ``memory_bytes``, ``system``, ``python``,
    ``torch``, ``teegpu``. It loads no torch."""
    return {
        "machine": platform.machine(),
        "cpu": machine.cpu_name(),
        "cores": machine.available_cores(),
        "memory_bytes": machine.memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": _version("torch"),
        "teegpu": __version__,
    }


def sampled(server_pid: int | None, *, peak: bool = False) -> Sampled:
    """The memory of this process and of the server, as it is now, or the most that it was. A server elsewhere (None) is
    not ours to look at."""
    look = machine.peak_memory_bytes if peak else machine.resident_bytes
    server = look(pid=server_pid) if server_pid is not None else 0
    return Sampled(time.perf_counter_ns(), look(), server, time.process_time())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a checkout on a path of its own
        return ""
