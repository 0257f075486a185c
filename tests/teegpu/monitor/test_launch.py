"""What a watched run wrote while the screen was ours."""

from __future__ import annotations

import io
import os

from teegpu.monitor.launch import Held


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
