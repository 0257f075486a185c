"""A case in a process of its own, as its parent sees it: commands in, answers out, one JSON object on a line.

A process for each case, because threads are set per process and because its peak memory is then the case's own. It
waits on its standard input between commands, without using the processor, and ends when that ends: it can't outlive
the parent. Ctrl-C in a terminal is for the parent, which ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from teegpu import errors, machine
from teegpu.errors import ConnectionFailedError, TeegpuError

_KINDS: dict[str, type[TeegpuError]] = {
    kind.__name__: kind
    for kind in (
        errors.TeegpuError,
        errors.UsageError,
        errors.ConfigError,
        errors.ModelError,
        errors.UnsupportedModelError,
        errors.PromptError,
        errors.ConnectionFailedError,
        errors.MismatchError,
        errors.ServerRefusedError,
        errors.BadReplyError,
        errors.WireError,
    )
}
_TAIL_BYTES = 4096


class Child:
    """Runs ``python -m MODULE``, which answers each line with a line. Use it with ``with``: leaving ends it.

    ``what`` names its work in messages. ``alone``: nothing else computes on this machine while it does.
    """

    def __init__(self, module: str, what: str, *, alone: bool = False) -> None:
        self.what = what
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        try:
            # -P: modules are not looked for in the current folder.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                encoding="utf-8",
                start_new_session=True,
                env=_environment(alone=alone),
            )
        except BaseException:
            self._log.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """The answer to ``command``. Raises the ``TeegpuError`` that it answers with, or ``TeegpuError`` with the last
        line that it wrote where it has ended."""
        self.send(command)
        return self.answer()

    def send(self, command: dict[str, Any]) -> None:
        """Hands ``command`` over without waiting for the answer."""
        assert self._process.stdin is not None  # opened as a pipe above
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def answer(self) -> dict[str, Any]:
        """The answer to what was sent. Raises as ``ask``."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _KINDS.get(answer["error"]["kind"], ConnectionFailedError)(answer["error"]["text"])
        return answer

    def _ended(self) -> TeegpuError:
        code = self._process.wait()
        how = f"with exit code {code}" if code >= 0 else f"by signal {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += ", which may mean that this machine is out of memory"
        last = self._last_words()
        return TeegpuError(f"the process that measures {self.what} ended {how}{f' ({last})' if last else ''}")

    def _last_words(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _TAIL_BYTES))
        lines = self._log.read().decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        """Ends the process at once: it has nothing to finish. May be called twice."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.kill()
        process.wait()
        with contextlib.suppress(OSError):  # what was not read any more
            process.stdin.close()
        process.stdout.close()
        self._log.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _environment(*, alone: bool) -> dict[str, str]:
    """Ours, and where this package is, which may be a checkout that the child would not find by itself."""
    root = str(Path(__file__).resolve().parents[2])
    ours = machine.without_sharing(os.environ) if alone else dict(os.environ)
    return ours | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}
