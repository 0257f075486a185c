"""What a run ran on: the machine, the versions, memory, for its record. Nothing in it names the machine or its user."""

from __future__ import annotations

import platform
import time
from importlib import metadata
from typing import Any

from teegpu import __version__, machine
from teegpu.metrics.events import Sampled


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
