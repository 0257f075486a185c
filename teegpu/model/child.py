"""A child process that does a long piece of work in a folder, and never outlives its parent's interest.

Downloads and conversions run in children for three reasons: an interrupt ends them at once, whatever threads they have;
their memory and progress bars go with them; and their libraries' global settings stay out of the runner.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_POLL_SECONDS = 0.2
_LOG = "child.log"


def run_child(
    arguments: Sequence[str],
    work: Path,
    *,
    tick: Callable[[], None],
    environment: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Run this Python with ``arguments`` and give (exit status, everything that it printed).

    ``tick`` is called about five times a second. When it, or an interrupt, raises, the child is killed and waited for
    before the exception goes on. The child's standard input is a pipe that ends when this process does. Its temporary
    files go below ``work``, so that they are removed with it.
    """
    scratch = work / "scratch"
    scratch.mkdir(exist_ok=True)
    package_root = str(Path(__file__).resolve().parents[2])
    python_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": python_path, "TMPDIR": str(scratch), **(environment or {})}
    with (work / _LOG).open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=env
        )
        try:
            status = _wait(child, tick)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            if child.stdin is not None:
                child.stdin.close()
    return status, (work / _LOG).read_text(encoding="utf-8", errors="replace")


def _wait(child: subprocess.Popen[bytes], tick: Callable[[], None]) -> int:
    while True:
        try:
            return child.wait(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            tick()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below ``folder``, which may be changing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
