"""A run that is started in order to be watched: a child process whose output is held back while the screen is ours.

The child is in a session of its own, so that what a terminal sends to its processes (Ctrl-C, its end) reaches the
monitor alone, which passes it on. When the monitor is gone, the child ends: see ``feed``.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from teegpu import children
from teegpu.monitor import feed
from teegpu.text import for_terminal


class Held:
    """Copies one of the child's streams to ``target``, but only from ``release`` on. ``on_line`` gets each line that is
    held, at once, in another thread. ``encoding``: of a text that a model made, for a terminal (``for_terminal``)."""

    def __init__(
        self,
        source: IO[bytes],
        target: IO[bytes],
        on_line: Callable[[str], None] | None = None,
        *,
        encoding: str = "",
    ) -> None:
        self._source = source
        self._encoding = encoding
        self._decoder = codecs.getincrementaldecoder(encoding)("replace") if encoding else None
        self._target: IO[bytes] | None = target
        self._on_line = on_line
        self._held: bytes | None = b""
        self._told = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._copy, name="output of the run", daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := os.read(self._source.fileno(), 65_536):
                with self._lock:
                    if self._held is None:
                        self._write(data)
                    else:
                        self._held += data
                        self._tell(self._held)

    def _tell(self, held: bytes) -> None:
        end = held.rfind(b"\n") + 1
        lines, self._told = held[self._told : end].decode("utf-8", "replace").split("\n"), max(self._told, end)
        for line in lines:
            if self._on_line is not None and line.strip():
                self._on_line(line.strip())

    def _write(self, data: bytes) -> None:
        if self._decoder is not None:
            data = for_terminal(self._decoder.decode(data)).encode(self._encoding, "replace")
        if self._target is not None:
            try:
                self._target.write(data)
                self._target.flush()
            except OSError:  # a terminal that was closed, a reader that went away: nobody is left to be told
                self._target = None

    def release(self) -> None:
        """Writes what was held, and from now on what comes."""
        with self._lock:
            held, self._held = self._held, None
            self._write(held or b"")

    def join(self) -> None:
        self._thread.join()
        self._source.close()


class WatchedRun:
    """``teegpu run ARGUMENTS`` as a child. Use it with ``with``: leaving ends it if it has not.

    Its stdout is held if ``hold_stdout`` (and else is ours), its stderr if ``hold_stderr``. ``typed`` is its standard
    input; without it that is ours, unless ours is the terminal, whose keys are the monitor's. ``on_message`` gets what
    it sends (see ``feed``), ``on_line`` each held line of its stderr; both from other threads.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        given: Mapping[str, str],
        hold_stdout: bool,
        hold_stderr: bool,
        typed: bytes | None,
        on_message: Callable[[str, Any], None],
        on_line: Callable[[str], None],
    ) -> None:
        self.begun = threading.Event()
        """It computes, or has ended without."""
        self._on_message = on_message
        self._feed, write_end = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "teegpu", "run", "--feed", str(write_end), *arguments],
                stdin=subprocess.PIPE if typed is not None else _standard_input(),
                stdout=subprocess.PIPE if hold_stdout else None,
                stderr=subprocess.PIPE if hold_stderr else None,
                pass_fds=(write_end, *_given()),
                start_new_session=True,
                env=children.environment(given),
            )
        except BaseException:
            os.close(self._feed)
            raise
        finally:
            os.close(write_end)
        self._streams: list[Held] = []
        if self.process.stdout is not None:
            self._streams.append(Held(self.process.stdout, sys.stdout.buffer, encoding=sys.stdout.encoding))
        if self.process.stderr is not None:
            self._streams.append(Held(self.process.stderr, sys.stderr.buffer, on_line))
        self._reader = threading.Thread(target=self._read, name="feed", daemon=True)
        self._reader.start()
        if typed is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(typed)
                self.process.stdin.close()

    def _read(self) -> None:
        feed.read(self._feed, self._message)
        self.begun.set()

    def _message(self, kind: str, value: Any) -> None:
        self._on_message(kind, value)
        self.begun.set()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def ended(self, within_seconds: float) -> bool:
        """Whether it ends within the time, which is waited for."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(within_seconds)
        return not self.running

    def interrupt(self) -> None:
        """As Ctrl-C would."""
        if self.running:
            self.process.send_signal(signal.SIGINT)

    def interrupted(self) -> None:
        """As Ctrl-C would, and waits for its end."""
        self.interrupt()
        self.process.wait()

    def wait(self) -> int:
        """Lets its output through. → its exit code, when it has ended and all of that is written; a signal's is 128 +
        its number."""
        for stream in self._streams:
            stream.release()
        code = self.process.wait()
        while self._streams:
            self._streams.pop().join()
        return code if code >= 0 else 128 - code

    def __enter__(self) -> WatchedRun:
        return self

    def __exit__(self, *_: object) -> None:
        """A run that still goes on here is one that an error of ours has left: it is interrupted, and may clean up."""
        self.interrupt()
        self.wait()
        self._reader.join()
        os.close(self._feed)


def _given() -> list[int]:
    """Descriptors that we were started with beside the usual three, such as a shell's ``<(…)``: the run reads them."""
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the folder's own, which is closed by now
            if number > 2 and os.get_inheritable(number):
                found.append(number)
    return found


def _standard_input() -> int | None:
    try:
        return subprocess.DEVNULL if sys.stdin is None or sys.stdin.isatty() else None
    except ValueError:  # closed
        return subprocess.DEVNULL
