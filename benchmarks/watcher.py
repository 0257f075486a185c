"""The monitor as its user has it: ``teegpu watch`` in a process and on a terminal of its own, which somebody reads."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

from teegpu import children, machine
from teegpu.errors import TeegpuError

SIZE = (120, 40)
"""Columns and rows."""

_READY_SECONDS = 60.0
_DRAWN_BYTES = 4000
"""A first screen is larger; what comes before it are a few escape sequences."""


class Watcher:
    """Of the record in ``folder``, with the ``options`` of ``teegpu watch``. Use it with ``with``."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.drawn_bytes = 0
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", SIZE[1], SIZE[0], 0, 0))
        given = {**os.environ, "TEEGPU_RECORD_DIR": str(folder.parent), "TERM": "xterm-256color"}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "teegpu", "watch", folder.name, *options],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
                env=children.environment(given),
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._terminal = ours
        self._tail = b""
        self._reader = threading.Thread(target=self._read, name="terminal", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._terminal, 65536):
                self.drawn_bytes += len(data)
                self._tail = (self._tail + data)[-2000:]

    def wait(self) -> None:
        """Until it has drawn its first screen. Raises ``TeegpuError`` where it does not."""
        deadline = time.monotonic() + _READY_SECONDS
        while self.drawn_bytes < _DRAWN_BYTES:
            if not self.running or time.monotonic() > deadline:
                said = self._tail.decode("utf-8", "replace").strip().splitlines()
                raise TeegpuError(f"the monitor does not start: {said[-1] if said else 'it says nothing'}")
            time.sleep(0.02)

    def cpu_seconds(self) -> float:
        """What it has used of a processor so far."""
        # What follows the name, which is in brackets and may hold anything: state is the third field, utime the 14th.
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def read_bytes(self) -> int:
        """What it has read from files and elsewhere so far."""
        lines = Path(f"/proc/{self._process.pid}/io").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("rchar:")), 0)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def resident_bytes(self) -> int:
        return machine.resident_bytes(pid=self._process.pid)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        os.close(self._terminal)
