"""Waking a thread that sleeps in poll."""

from __future__ import annotations

import os


class Wakeup:
    """A pipe that wakes a thread out of poll. ``set`` may be called from anywhere, signal handlers included."""

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write_fd, False)

    def set(self) -> None:
        try:
            os.write(self._write_fd, b"!")
        except BlockingIOError:
            return  # the pipe is full: it will wake its reader anyway

    def clear(self) -> None:
        try:
            os.read(self.fd, 4096)
        except BlockingIOError:
            return

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._write_fd)
