from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from teegpu.model.child import folder_bytes, run_child

REPORT = "import os, sys; print('out'); print('err', file=sys.stderr); print(os.environ['TMPDIR'], os.environ['X'])"


def test_status_output_and_surroundings_of_a_child(tmp_path) -> None:
    status, output = run_child(["-c", f"{REPORT}; sys.exit(3)"], tmp_path, tick=lambda: None, environment={"X": "1"})

    assert status == 3
    assert sorted(output.split()) == sorted(["out", "err", str(tmp_path / "scratch"), "1"])


def test_an_interrupt_while_it_runs_ends_the_child(tmp_path) -> None:
    written = tmp_path / "pid"
    code = f"import os, pathlib, sys; pathlib.Path({str(written)!r}).write_text(str(os.getpid())); sys.stdin.read()"

    def interrupt() -> None:
        if written.exists() and written.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child(["-c", code], tmp_path, tick=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(written.read_text()), 0)


def test_a_worker_ends_when_its_parent_is_gone(tmp_path) -> None:
    fifo = tmp_path / "never-written.gguf"
    os.mkfifo(fifo)  # opening it to read lasts until somebody writes
    worker = subprocess.Popen(
        [sys.executable, "-m", "teegpu.model.worker", "gguf", str(fifo), str(tmp_path / "out")], stdin=subprocess.PIPE
    )
    assert worker.stdin is not None
    worker.stdin.close()  # as the kernel does when the parent dies

    assert worker.wait(30) == 4


def test_the_size_of_a_folder_counts_all_files_below(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(b"123")
    (tmp_path / "a" / "b" / "two").write_bytes(b"45")

    assert folder_bytes(tmp_path) == 5
    assert folder_bytes(tmp_path / "missing") == 0
