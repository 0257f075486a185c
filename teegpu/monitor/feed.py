"""What a watched run tells the monitor that started it, on a pipe of their own: where its record is, and its text.

The text is private, so it is in no file; the pipe has no name. One JSON object on a line. A run never waits for it:
what the pipe does not take at once is left out, and a reader that is gone ends the run, which nobody would hear of.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

BEGUN: Final = "begun"
RUN: Final = "run"
TEXT: Final = "text"

_READ_BYTES: Final = 65_536
_MOST_HELD: Final = 1 << 20
"""Bytes of a line that may be incomplete: no message is longer."""


class FeedWriter:
    """The run's end, on the file descriptor that it was started with. No call of it waits or raises.

    ``watch_reader`` sends this process a SIGTERM when the reader is gone.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""
        self._lock = threading.Lock()
        self._closed = False
        os.set_blocking(descriptor, False)
        os.set_inheritable(descriptor, False)  # a server of ours has nothing to say there

    def watch_reader(self) -> None:
        threading.Thread(target=self._watch, name="feed", daemon=True).start()

    def _watch(self) -> None:
        poller = select.poll()
        poller.register(self._descriptor, 0)  # errors alone: they are always told
        with contextlib.suppress(OSError, ValueError):
            poller.poll()
            if not self._closed:
                os.kill(os.getpid(), signal.SIGTERM)

    def begun(self) -> None:
        """The prompt has been read; what comes now takes its time."""
        self._send({BEGUN: True})

    def run(self, path: Path) -> None:
        """The record is there."""
        self._send({RUN: str(path)})

    def text(self, text: str) -> None:
        """The next piece of the answer."""
        self._send({TEXT: text})

    def _send(self, message: dict[str, Any]) -> None:
        with self._lock:
            if self._closed:
                return
            # A line that was begun is ended first; one that would have to wait for that is left out.
            if not self._flush() and TEXT in message:
                return
            self._rest += json.dumps(message).encode() + b"\n"
            self._flush()

    def _flush(self) -> bool:
        """Whether everything is out."""
        while self._rest:
            try:
                self._rest = self._rest[os.write(self._descriptor, self._rest) :]
            except BlockingIOError:
                return False
            except OSError:
                self._closed = True
                return False
        return True

    def close(self) -> None:
        with self._lock:
            self._closed = True
            with contextlib.suppress(OSError):
                os.close(self._descriptor)


def read(descriptor: int, take: Callable[[str, Any], None]) -> None:
    """Gives each message to ``take`` (kind, value) until the run closes its end. What is no message is left out."""
    held = b""
    with contextlib.suppress(OSError):
        while data := os.read(descriptor, _READ_BYTES):
            *lines, held = (held + data).split(b"\n")
            if len(held) > _MOST_HELD:
                held = b""
            for line in lines:
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                    if isinstance(message, dict):
                        for kind, value in message.items():
                            take(kind, value)
