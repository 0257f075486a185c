"""Makes pads beside a run, in a process that computes only while nothing else on the machine wants to.

So it works while the runner waits for the link or for the next prompt. It is bounded by ``shield.refill_tokens``, and
ends with the run, whose end it sees at the end of its standard input; what it has not finished by then is lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Final

from teegpu.config import Config
from teegpu.errors import EXIT_INTERRUPTED
from teegpu.model.folder import ModelFolder
from teegpu.tee.embedded_server import child_environment

_STOP_SECONDS: Final = 3.0


class Refill:
    """Keeps the pool of the model in ``folder`` at ``shield.refill_tokens`` as well as it can. Use it with ``with``.

    That it can't be started, or fails, is told to ``notify`` and does the run no harm.
    """

    def __init__(self, folder: ModelFolder, config: Config, notify: Callable[[str], None]) -> None:
        self._notify = notify
        command = [sys.executable, "-P", "-m", "teegpu", "pads", "make", "--beside", "--quiet", "--offline"]
        command += ["--config", os.devnull, "--model", str(folder.path), "--threads", "1", "--up-to"]
        command += ["--tokens", str(config.shield.refill_tokens)]
        # A pipe might fill up, and nobody reads it before the end.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
            env=child_environment(config, ("shield.",)),
        )

    @property
    def pid(self) -> int:
        return self._child.pid

    def close(self) -> None:
        """Ends it: politely, then not. May be called twice."""
        child = self._child
        if child.stdin is None or child.stdin.closed:
            return
        with contextlib.suppress(OSError):
            child.stdin.close()
        try:
            child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            # It stands back so far that it may not even get to its own end.
            child.kill()
            child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        self._errors.close()
        if child.returncode not in (0, EXIT_INTERRUPTED, -signal.SIGTERM, -signal.SIGKILL):
            told = [line for line in lines if line.strip()] or [f"exit code {child.returncode}"]
            self._notify(f"no pads were made beside this run: {told[-1].removeprefix('teegpu: ')}")

    def __enter__(self) -> Refill:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
