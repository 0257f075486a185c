"""An interrupt that meets a library in the middle of an import."""

from __future__ import annotations

import signal

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
