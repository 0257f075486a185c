"""A case's process as its parent sees it: answers, errors, and that it goes."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from teegpu.bench.child import Child, answered
from teegpu.bench.pool import WORKER
from teegpu.errors import ConnectionFailedError, PromptError, TeegpuError, UsageError
from transports.errors import ConnectionLostError

Fake = Callable[[str], Child]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """``fake(script)``: a child that is that shell script."""
    made: list[Child] = []

    def make(script: str) -> Child:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(program))
        made.append(Child("no.module", "the case"))
        return made[-1]

    yield make
    for child in made:
        child.close()


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_command_gets_its_answer_and_errors_are_raised_as_what_they_are() -> None:
    with Child(WORKER, "nothing") as child:
        with pytest.raises(UsageError, match='can\'t do "dance" now'):
            child.ask({"do": "dance"})
        # and it goes on
        with pytest.raises(UsageError, match='can\'t do "measure" now'):
            child.ask({"do": "measure"})
    assert gone(child.pid)


def test_what_it_prints_does_not_mix_with_its_answers() -> None:
    script = (
        "import os, sys\nfrom teegpu.bench.child import serve\n"
        "def handle(command):\n    print('noise', flush=True)\n    return {'echo': command['do']}\nserve(handle)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[3],
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write('{"do": "a"}\n')
        process.stdin.flush()
        assert process.stdout.readline() == '{"echo": "a"}\n'
        process.stdin.close()
        assert process.stdout.read() == ""
        assert process.stderr.read() == "noise\n"
        assert process.wait() == 0


@pytest.mark.parametrize("busy", [False, True])
def test_a_child_ends_with_its_parent(busy: bool) -> None:
    """The parent is killed, in a way that it can't do anything about, while the child waits for a command or works."""
    work = "import threading; from teegpu.bench.child import serve; serve(lambda _: threading.Event().wait())"
    script = (
        "import os, signal, sys\nfrom teegpu.bench import child\n"
        f"made = child.Child({WORKER!r}, 'nothing')\n"
        "if BUSY:\n"
        "    made.close()\n"
        "    from teegpu import children\n"
        f"    made._child = children.Child(['-c', {work!r}], text=True)\n"
        "    made.send({})\n"
        "print(made.pid, flush=True)\n"
        "sys.stdin.readline()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    ).replace("BUSY", str(busy))
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    with parent:
        parent.stdin.write("now\n")
        parent.stdin.flush()
        assert parent.wait() == -signal.SIGKILL
    ended, _, _ = select.select([child], [], [], 30)
    os.close(child)
    assert ended


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo first >&2; echo 'last words' >&2; exit 70", r"with exit code 70 \(last words\)"),
        ("exit 3", r"with exit code 3$"),
        ("kill -KILL $$", r"by signal SIGKILL, which may mean that this machine is out of memory"),
        ("kill -SEGV $$", r"by signal SIGSEGV"),
    ],
)
def test_a_child_that_ends_by_itself(fake: Fake, script: str, told: str) -> None:
    child = fake(script)
    with pytest.raises(TeegpuError, match="the process that measures the case ended " + told):
        child.ask({"do": "load"})
    child.close()
    child.close()


def test_a_child_that_is_busy_is_ended_at_once(fake: Fake) -> None:
    child = fake("read line; sleep 600")
    child.send({"do": "measure"})
    child.close()
    assert gone(child.pid)


def test_errors_that_a_user_can_be_told_are_answers() -> None:
    def fails(error: Exception) -> dict[str, object]:
        def handle(_: dict[str, object]) -> dict[str, object]:
            raise error

        return answered(handle, {})

    assert fails(PromptError("too long")) == {"error": {"kind": "PromptError", "text": "too long"}}
    assert fails(ConnectionLostError("lost")) == {"error": {"kind": "ConnectionFailedError", "text": "lost"}}
    with pytest.raises(ZeroDivisionError):
        fails(ZeroDivisionError())


def test_an_error_of_an_unknown_kind_is_still_an_error(fake: Fake) -> None:
    child = fake("""read line; echo '{"error": {"kind": "Surprise", "text": "what"}}'; read line""")
    with pytest.raises(ConnectionFailedError, match="what"):
        child.ask({"do": "load"})
