"""A real terminal for a command: a pseudo-terminal, and what would stand on its screen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time

import pyte

DEADLINE_SECONDS = 100.0


class Terminal:
    """Runs ``python -m teegpu ARGS`` on a terminal of its own, of which it is the first process.

    ``piped``: standard input is a pipe with that in it. ``ignored``: a signal that it ignores at its start. Use it with
    ``with``.
    """

    def __init__(
        self,
        *args: object,
        size: tuple[int, int] = (100, 30),
        piped: bytes | None = None,
        ignored: signal.Signals | None = None,
    ) -> None:
        self.screen = pyte.Screen(*size)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._code: int | None = None
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}
            if piped is not None:
                read_end, write_end = os.pipe()
                os.write(write_end, piped)
                os.close(write_end)
                os.dup2(read_end, 0)
            if ignored is not None:
                signal.signal(ignored, signal.SIG_IGN)
            os.execv(sys.executable, [sys.executable, "-m", "teegpu", *map(str, args)])
        self.resize(*size)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(rows, columns)

    @property
    def text(self) -> str:
        return "\n".join(self.screen.display)

    def wait_for(self, *texts: str) -> None:
        """Until all of ``texts`` stand on the screen at once."""
        self._until(lambda: all(text in self.text for text in texts), f"no {texts} on the screen")

    def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def hang_up(self) -> int:
        """The terminal goes away, as when its window is closed. The exit code; fails unless the command ends then."""
        os.close(self._fd)
        self._fd = os.open(os.devnull, os.O_RDONLY)  # for ``__exit__``
        return self.wait()

    def fill(self) -> None:
        """Has it draw, and reads nothing of that, until the terminal takes no more."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        waiting = -1
        while waiting != (waiting := struct.unpack("i", fcntl.ioctl(self._fd, termios.FIONREAD, bytes(4)))[0]):
            assert time.monotonic() < deadline
            self.press("t" * 8)
            time.sleep(1.0)

    def wait(self) -> int:
        """The exit code, when it has ended; nothing is read meanwhile."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (found := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            assert time.monotonic() < deadline, "it goes on without its terminal"
            time.sleep(0.02)
        self._code = os.waitstatus_to_exitcode(found[1])
        return self._code

    def finish(self) -> int:
        """Reads on until the command ends; its exit code."""
        self._until(lambda: self._code is not None, "it has not ended")
        assert self._code is not None
        return self._code

    @property
    def written(self) -> str:
        """All that was written after the screen was given back."""
        return self.raw.rpartition(b"\x1b[?1049l")[2].decode("utf-8", "replace")

    def _until(self, condition: object, otherwise: str) -> None:
        assert callable(condition)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert self._code is None, f"it ended ({self._code}): {otherwise}\n{self.written}"
            assert time.monotonic() < deadline, f"{otherwise}\n{self.text}"
            self._read()

    def _read(self) -> None:
        if select.select([self._fd], [], [], 0.05)[0]:
            with contextlib.suppress(OSError):
                data = os.read(self._fd, 65536)
                if data:
                    self.raw += data
                    self._stream.feed(data)
                    return
            _, status = os.waitpid(self.pid, 0)
            self._code = os.waitstatus_to_exitcode(status)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)


def children_of(pid: int) -> list[int]:
    """The processes that ``pid`` has started."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]
