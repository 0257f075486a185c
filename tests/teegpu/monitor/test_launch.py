"""What a watched run wrote while the screen was ours."""

from __future__ import annotations

import io
import os

import pytest

from teegpu.monitor.launch import Held, WatchedRun


def copied(pieces: list[bytes], **options: str) -> bytes:
    reader, writer = os.pipe()
    target = io.BytesIO()
    held = Held(os.fdopen(reader, "rb"), target, **options)
    held.release()
    for piece in pieces:
        os.write(writer, piece)
    os.close(writer)
    held.join()
    return target.getvalue()


def test_an_answer_can_not_take_over_the_terminal_when_the_screen_is_gone() -> None:
    pieces = ["a\x1b]0;x\x07é".encode()[:-1], b"\xa9\n\xc2", b"\x9bz"]
    assert copied(pieces, encoding="utf-8").decode() == "a�]0;x�é\n�z"
    assert copied(pieces) == b"".join(pieces)


def test_a_run_has_the_descriptors_that_we_were_given(capfd: pytest.CaptureFixture[str]) -> None:
    given, writer = os.pipe()
    os.set_inheritable(given, True)  # as a shell leaves that of <(…)
    os.close(writer)
    try:
        with WatchedRun(
            ["--prompts-file", f"/dev/fd/{given}"],
            given=os.environ,
            hold_stdout=False,
            hold_stderr=False,
            typed=None,
            on_message=lambda *_: None,
            on_line=lambda _: None,
        ) as run:
            assert run.wait() == 3
    finally:
        os.close(given)
    assert "has no prompt" in capfd.readouterr().err
