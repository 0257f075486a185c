"""A run that is started in order to be watched: a child process whose output is held back while the screen is ours.

The child is in a session of its own, so that what a terminal sends to its processes (Ctrl-C, its end) reaches the
monitor alone, which passes it on. When the monitor is gone, the child ends: see ``feed``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from teegpu.monitor import feed

_READ_BYTES: Final = 65_536

Say = Callable[[str], None]


class Held:
    """Copies one of the child's streams to ``target``, but only from ``release`` on. ``on_line`` is told of each line,
    at once."""

    def __init__(self, source: IO[bytes], target: IO[bytes] | None, on_line: Say | None = None) -> None:
        self._source = source
        self._target = target
        self._on_line = on_line
        self._held: list[bytes] = []
        self._rest = b""
        self._open = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._copy, name="output of the run", daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := os.read(self._source.fileno(), _READ_BYTES):
                with self._lock:
                    if not self._open:
                        self._held.append(data)
                        self._tell(data)
                    else:
                        self._write(data)

    def _tell(self, data: bytes) -> None:
        if self._on_line is None:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            text = line.decode("utf-8", "replace").strip()
            if text:
                self._on_line(text)

    def _write(self, data: bytes) -> None:
        if self._target is None:
            return
        try:
            self._target.write(data)
            self._target.flush()
        except OSError:  # a terminal that was closed, a reader that went away: nobody is left to be told
            self._target = None

    def release(self) -> None:
        """Writes what was held, and from now on what comes."""
        with self._lock:
            held, self._held = self._held, []
            self._open = True
            for data in held:
                self._write(data)

    def join(self) -> None:
        self._thread.join()
        self._source.close()


class WatchedRun:
    """``python -m teegpu run …`` with ``arguments``. Use it with ``with``: leaving ends it if it has not.

    Its stdout is held if ``hold_stdout`` (and else is ours), its stderr if ``hold_stderr``. ``typed`` is its standard
    input, None: ours. ``on_message`` gets what it tells (see ``feed``), ``on_line`` each held line of its stderr; both
    from other threads.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        hold_stdout: bool,
        hold_stderr: bool,
        typed: bytes | None,
        stdin: int | None,
        on_message: Callable[[str, Any], None],
        on_line: Say,
    ) -> None:
        self.begun = threading.Event()
        self._on_message = on_message
        read_end, write_end = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "teegpu", "run", "--feed", str(write_end), *arguments],
                stdin=subprocess.PIPE if typed is not None else stdin,
                stdout=subprocess.PIPE if hold_stdout else None,
                stderr=subprocess.PIPE if hold_stderr else None,
                pass_fds=(write_end,),
                start_new_session=True,
                env=_environment(environment),
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self._feed = read_end
        self._streams: list[Held] = []
        if self.process.stdout is not None:
            self._streams.append(Held(self.process.stdout, sys.stdout.buffer))
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
        self.begun.set()  # or it never will be

    def _message(self, kind: str, value: Any) -> None:
        self._on_message(kind, value)
        self.begun.set()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def interrupt(self) -> None:
        """As Ctrl-C would."""
        if self.running:
            self.process.send_signal(signal.SIGINT)

    def release(self) -> None:
        """Lets its output through."""
        for stream in self._streams:
            stream.release()

    def wait(self) -> int:
        """Its exit code, when it has ended and all its output is written. A signal's is 128 + its number."""
        code = self.process.wait()
        for stream in self._streams:
            stream.join()
        self._streams = []
        return code if code >= 0 else 128 - code

    def __enter__(self) -> WatchedRun:
        return self

    def __exit__(self, *_: object) -> None:
        """A run that still goes on here is one that an error of ours has left: it is interrupted, and may clean up."""
        self.interrupt()
        self.release()
        self.wait()
        self._reader.join()
        os.close(self._feed)


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    """``given``, and where this package is, which may be a checkout that the child would not find by itself."""
    root = str(Path(__file__).resolve().parents[2])
    return {**given, "PYTHONPATH": os.pathsep.join(filter(None, [root, given.get("PYTHONPATH", "")]))}
