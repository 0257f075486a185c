"""An interrupt that meets a library in the middle of an import, or that comes where nothing wakes the main thread."""

from __future__ import annotations

import contextlib
import importlib
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from teegpu.cli import interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("swallowed", [True, False])
def test_an_interrupt_that_a_library_hides_is_still_one(number: signal.Signals, swallowed: bool) -> None:
    def library() -> None:
        try:
            signal.raise_signal(number)
        except BaseException:  # noqa: BLE001 (as they do)
            if not swallowed:
                raise ModuleNotFoundError("could not import") from None

    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, ended)
    try:
        with pytest.raises(KeyboardInterrupt), interrupts.kept():
            library()
        assert signal.getsignal(signal.SIGTERM) is ended
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ModuleNotFoundError), interrupts.kept():
        raise ModuleNotFoundError("not there")


def _poll() -> None:
    select.poll().poll(20_000)


@pytest.mark.parametrize("wait", [_poll, lambda: threading.Event().wait(20)])
def test_a_signal_that_interrupts_no_wait_is_heard(wait: Callable[[], object]) -> None:
    """One that comes just before the system call that waits does not interrupt it. One that another thread gets is the
    same to the main thread."""

    def send() -> None:
        time.sleep(0.2)  # the main thread waits by then
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    heard: list[int] = []
    thread = threading.Thread(target=send)
    began = time.monotonic()
    with interrupts.heard(heard.append):
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            wait()
    thread.join()
    assert time.monotonic() - began < 10
    assert heard == [signal.SIGINT]


def test_what_was_there_before_is_there_again() -> None:
    def handler(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGURG, handler)
    fd = signal.set_wakeup_fd(-1)
    try:
        with interrupts.heard(), contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGURG) is handler
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGURG, before)
        signal.set_wakeup_fd(fd)


def test_an_import_that_swallows_interrupts_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "swallows.py").write_text(
        "import contextlib, os, signal, time\n"
        "with contextlib.suppress(BaseException):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(30)\n"
        "time.sleep(30)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    began = time.monotonic()
    with interrupts.heard(), pytest.raises(KeyboardInterrupt), interrupts.kept():
        importlib.import_module("swallows")
    assert time.monotonic() - began < 10
