"""What becomes of a signal and its ``KeyboardInterrupt``: it is heard at once, leaves the exit code to us, and does not
hide in another exception."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a command to end."""

_KICKS_SECONDS = (0.05, 0.15, 0.3, 0.5)
"""After a signal, each after the one before. Several: one may come just as early as the signal did."""


@contextlib.contextmanager
def heard(on_signal: Callable[[int], None] = lambda _: None) -> Iterator[None]:
    """Within it no signal waits until what the main thread waits for has come.

    Python runs handlers in the main thread between two of its instructions. A signal that comes after the last of them
    and just before the system call that waits, or in another thread, interrupts no wait: it was heard when a reply's
    time-out was over. So a thread that is told of each signal kicks the main thread, with a signal that says nothing.
    ``on_signal`` is called there with the number first.
    """
    read, written = os.pipe()
    os.set_blocking(written, False)
    main, over = threading.main_thread().ident, threading.Event()

    def listen() -> None:
        while not over.is_set():
            numbers = [number for number in os.read(read, 64) if number not in (0, signal.SIGURG)]
            for number in numbers:
                on_signal(number)
            for seconds in _KICKS_SECONDS if numbers else ():
                if main is not None and not over.wait(seconds):
                    signal.pthread_kill(main, signal.SIGURG)

    kick_before = signal.signal(signal.SIGURG, lambda *_: None)
    wakeup_before = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, daemon=True, name="signals")
    thread.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(wakeup_before)
        os.write(written, b"\0")
        thread.join()
        signal.signal(signal.SIGURG, signal.SIG_DFL if kick_before is None else kick_before)
        os.close(read)
        os.close(written)


def handled() -> None:
    """Make CPython forget that an interrupt came. Call it where a ``KeyboardInterrupt`` has been caught.

    One that passes through ``exec`` of a text (dataclasses are made that way, so imports are full of it) is remembered
    as unhandled, whoever catches it later, and the process then ends by signal SIGINT instead of with its exit code.
    Running any text anew clears that memory.
    """
    exec("")


def hidden(error: Exception) -> bool:
    """Whether it was an interrupt, and ``error`` is of a terminal that is gone, which was to be told of it."""
    return isinstance(error, OSError) and error.errno == errno.EIO and isinstance(error.__context__, KeyboardInterrupt)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within it an interrupt ends as ``KeyboardInterrupt``, whatever a library that meets it makes of it.

    Imports swallow them, or turn them into errors of their own: one that goes on is interrupted again at each kick of
    ``heard``. Not for code that runs an event loop, which puts a handler of its own in place of Python's. Outside of
    the main thread it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        nonlocal came
        came = True
        raise KeyboardInterrupt

    def again(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if came and _imports(frame):
            raise KeyboardInterrupt

    previous = {
        number: signal.signal(number, handler)
        for number, handler in (*((each, note) for each in ENDS), (signal.SIGURG, again))
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


def _imports(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None
