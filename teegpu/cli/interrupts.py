"""What becomes of a ``KeyboardInterrupt``: it should leave the exit code to us, and not hide in another exception."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


def handled() -> None:
    """Make CPython forget that an interrupt came. Call it where a ``KeyboardInterrupt`` has been caught.

    One that passes through ``exec`` of a text (dataclasses are made that way, so imports are full of it) is remembered
    as unhandled, whoever catches it later, and the process then ends by signal SIGINT instead of with its exit code.
    Running any text anew clears that memory.
    """
    exec("")


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within it an interrupt ends as ``KeyboardInterrupt``, whatever a library that meets it makes of it.

    Imports swallow them, or turn them into errors of their own. Not for code that runs an event loop, which puts a
    handler of its own in place of Python's. Outside of the main thread it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        nonlocal came
        came = True
        raise KeyboardInterrupt

    previous = {
        number: signal.signal(number, note)
        for number in (signal.SIGINT, signal.SIGTERM)
        if callable(signal.getsignal(number))  # one that is ignored, or ends the process, stays so
    }
    try:
        yield
    except Exception as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt
