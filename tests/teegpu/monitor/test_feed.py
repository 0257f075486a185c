"""What a watched run tells on its pipe; and a child whose output is held back."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from teegpu.monitor import feed
from teegpu.monitor.feed import FeedWriter
from teegpu.monitor.launch import Held


def test_messages_arrive_in_order() -> None:
    read_end, write_end = os.pipe()
    writer = FeedWriter(write_end)
    writer.begun()
    writer.run(Path("/runs/x"))
    writer.text("a\nb “é”")
    writer.close()
    told: list[tuple[str, Any]] = []
    feed.read(read_end, lambda kind, value: told.append((kind, value)))
    os.close(read_end)
    assert told == [("begun", True), ("run", "/runs/x"), ("text", "a\nb “é”")]


def test_what_is_no_message_is_left_out() -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b'no json\n[1]\n{"text": "x"}\n{"te')
    os.close(write_end)
    told: list[tuple[str, Any]] = []
    feed.read(read_end, lambda kind, value: told.append((kind, value)))
    os.close(read_end)
    assert told == [("text", "x")]


def test_a_reader_that_does_not_read_does_not_hold_the_run_up() -> None:
    read_end, write_end = os.pipe()
    writer = FeedWriter(write_end)
    started = time.monotonic()
    for _ in range(3000):
        writer.text("x" * 1000)
    assert time.monotonic() - started < 5.0
    writer.close()
    lines = []
    with open(read_end, "rb") as pipe:
        lines = pipe.read().split(b"\n")
    assert len(lines) < 3000
    assert all(line.startswith(b'{"text"') for line in lines[:-1])


def test_a_reader_that_is_gone_is_no_error() -> None:
    read_end, write_end = os.pipe()
    writer = FeedWriter(write_end)
    os.close(read_end)
    writer.text("x")
    writer.text("y")
    writer.close()


def test_a_run_whose_reader_is_gone_ends() -> None:
    read_end, write_end = os.pipe()
    code = (
        "import sys, time\nfrom teegpu.monitor.feed import FeedWriter\n"
        "FeedWriter(int(sys.argv[1])).watch_reader()\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(write_end)], pass_fds=(write_end,))
    os.close(write_end)
    os.close(read_end)
    assert process.wait(30) == -signal.SIGTERM


@pytest.fixture
def child() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", "print('one'); print('two', flush=True); input(); print('three')"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def test_output_is_held_back_and_then_let_through(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    target, lines = io.BytesIO(), []
    held = Held(child.stdout, target, lines.append)
    deadline = time.monotonic() + 30
    while len(lines) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert target.getvalue() == b""
    held.release()
    assert target.getvalue() == b"one\ntwo\n"
    child.stdin.write(b"\n")
    child.stdin.close()
    child.wait(30)
    held.join()
    assert target.getvalue() == b"one\ntwo\nthree\n"
    assert lines == ["one", "two"]


def test_output_that_nobody_can_be_told_is_dropped(child: subprocess.Popen[bytes]) -> None:
    class Gone(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError("the terminal is closed")

    assert child.stdout is not None
    held = Held(child.stdout, Gone())
    held.release()
    assert child.stdin is not None
    child.stdin.write(b"\n")
    child.stdin.close()
    assert child.wait(30) == 0
    held.join()
