"""Child processes end with their parent, politely where they can, and leave their last words."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from teegpu import children

UNTIL_INPUT_ENDS = "import sys\nprint('up', flush=True)\nsys.stdin.read()\nsys.exit(7)"


def test_a_child_ends_when_its_life_line_does() -> None:
    child = children.Child(["-c", UNTIL_INPUT_ENDS], text=True)
    assert child.process.stdout.readline() == "up\n"
    assert not child.gone
    assert child.close() == 7
    assert child.gone
    assert child.close() == 7


def test_a_child_that_does_not_listen_is_killed() -> None:
    code = "import time\nprint('up', flush=True)\ntime.sleep(60)"
    with children.Child(["-c", code], text=True, wait_seconds=0.05) as child:
        assert child.process.stdout.readline() == "up\n"
        assert child.close() == -signal.SIGKILL


def test_a_child_is_ended_at_once_where_it_has_nothing_to_finish() -> None:
    with children.Child(["-c", UNTIL_INPUT_ENDS], text=True) as child:
        assert child.process.stdout.readline() == "up\n"
        assert child.close(politely=False) == -signal.SIGKILL


def test_the_last_words_of_a_child_that_failed() -> None:
    with children.Child(
        ["-c", "import sys\nsys.stderr.write('x' * 9000 + '\\nfirst\\nlast\\n\\n')\nsys.exit(3)"]
    ) as child:
        assert child.process.wait() == 3
        assert child.last_words() == "last"
    assert child.last_words() == "last"


def test_a_child_finds_this_package_from_any_folder(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with children.Child(["-c", "import teegpu, transports\nprint(teegpu.__file__)"], text=True) as child:
        assert child.process.stdout.readline().startswith(str(children.ROOT))


def test_an_interrupt_while_a_child_is_ended_leaves_no_orphan(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time\ntime.sleep(60)"], stdin=subprocess.PIPE) as process:
        wait = process.wait

        def interrupted(timeout: float | None = None) -> int:
            monkeypatch.setattr(process, "wait", wait)
            raise KeyboardInterrupt

        monkeypatch.setattr(process, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            children.end(process, wait_seconds=5.0)
        assert process.poll() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, "with exit code 3"),
        (-9, "by signal SIGKILL, which may mean"),
        (-15, "by signal SIGTERM"),
        (-99, "by signal 99"),
    ],
)
def test_how_a_process_ended_in_words(code: int, words: str) -> None:
    assert children.how_it_ended(code).startswith(words)
