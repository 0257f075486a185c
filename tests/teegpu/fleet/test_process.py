"""Processes that outlive who started them, and are found again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from teegpu.fleet import process
from teegpu.fleet.process import Process
from tests.teegpu.cli.conftest import until

SLEEPS = ["sleep", "60"]
DEAF = ["sh", "-c", "trap '' TERM; echo 'I stay'; while :; do sleep 0.1; done"]
"""It takes no notice of SIGTERM, once it has said so."""

Begin = Callable[..., Process]


@pytest.fixture
def begin() -> Iterator[Begin]:
    def made(name: str, command: list[str]) -> Process:
        found = Process("f", name)
        found.begin(command, os.environ, {"address": name})
        return found

    yield made
    process.end(process.living("f"), 0)


def test_it_is_found_while_it_lives(begin: Begin) -> None:
    assert process.living("f") == []
    begin("one", SLEEPS)
    begin("two", SLEEPS)
    one, two = process.living("f")
    assert [one.name, two.name, one.about, process.living("other")] == ["one", "two", {"address": "one"}, []]
    until(lambda: one.pid > 0)
    os.kill(one.pid, signal.SIGKILL)
    until(lambda: not one.alive)
    assert [each.name for each in process.living("f")] == ["two"]


def test_it_outlives_who_started_it_however_that_ends(tmp_path: Path) -> None:
    code = (
        "import os, signal, time\nfrom teegpu.fleet.process import Process\n"
        f"found = Process('f', 'one')\nfound.begin({SLEEPS!r}, os.environ, {{}})\n"
        "while not found.pid: time.sleep(0.01)\n"
        "os.killpg(0, signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code], start_new_session=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    (left,) = process.living("f")
    process.end([left], 5.0)
    assert process.living("f") == []


def test_its_number_is_never_that_of_another(begin: Begin) -> None:
    """The file may be left behind by one that was killed: what has the number now is not touched."""
    one = begin("one", SLEEPS)
    until(lambda: one.pid > 0)
    os.kill(one.pid, signal.SIGKILL)
    until(lambda: not one.alive)
    with subprocess.Popen(SLEEPS) as other:
        one.log.with_suffix(".pid").write_text(str(other.pid))
        one.signal(signal.SIGKILL)
        process.end([one], 0)
        assert other.poll() is None
        other.kill()


def test_what_it_has_begun_is_not_taken_for_it(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its children may have its log, and with that its lock, for longer than it lives."""
    monkeypatch.setattr(process, "_KILL_SECONDS", 0.2)
    one = begin("one", ["sh", "-c", "sleep 60 & echo $!; wait"])
    until(lambda: one.last_words().isdigit())
    os.kill(one.pid, signal.SIGKILL)
    with subprocess.Popen(SLEEPS) as other:
        one.log.with_suffix(".pid").write_text(str(other.pid))
        process.end([one], 0)
        assert (other.poll(), one.alive) == (None, True)
        other.kill()
    os.kill(int(one.last_words()), signal.SIGKILL)
    until(lambda: not one.alive)


def test_one_name_is_one_process(begin: Begin) -> None:
    begin("one", SLEEPS)
    with pytest.raises(BlockingIOError):
        Process("f", "one").begin(SLEEPS, os.environ, {})


def test_who_takes_no_notice_is_killed_in_the_end(begin: Begin) -> None:
    polite, deaf = begin("polite", SLEEPS), begin("deaf", DEAF)
    until(lambda: deaf.last_words() == "I stay")
    assert polite.wanted
    began = time.monotonic()
    process.end([polite, deaf], 0.3)
    assert not polite.wanted
    assert 0.3 <= time.monotonic() - began < 5
    assert not list(process.folder("f").glob("*.*"))


def test_what_it_said_is_kept_and_bounded(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    one = begin("one", ["sh", "-c", "echo first; printf 'last \\033[31m'; exec sleep 60"])
    until(lambda: one.last_words().startswith("last"))
    assert "\033" not in one.last_words()
    one.trim()
    assert one.last_words()
    monkeypatch.setattr(process, "_LOG_BYTES", 4)
    one.trim()
    assert one.log.stat().st_size == 0
    assert one.alive
