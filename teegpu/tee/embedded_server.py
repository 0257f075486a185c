"""A GPU server of the run's own: a child process on a private ipc address that never outlives the run.

The child is told to stop by the end of its standard input, so it goes however this process goes: normally, by a signal
that can't be caught, or with the whole session.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from teegpu.config import Config, variable_name
from teegpu.errors import EXIT_BUG, ConnectionFailedError, ModelError, TeegpuError, UsageError
from teegpu.model.folder import ModelFolder

ENTRY = ("teegpu", "serve")
"""The module that is the server, and its first arguments."""

_STOP_SECONDS = 3.0
"""How long the child may take to end once it is told to: its request in hand, and taking torch down."""

_GONE_SECONDS = 2.0
"""A connection is seen to be lost a moment before the process that held it is seen to have ended."""

_LONGEST_BASE = 60
"""A socket's path may have 107 bytes: too few for the temporary folders of some machines."""

_KINDS: dict[int, type[TeegpuError]] = {1: TeegpuError, 2: UsageError, 3: ModelError}


class EmbeddedServer:
    """Starts ``teegpu serve`` for ``folder``; ``endpoint`` is its address at once, ``wait`` returns when it answers.

    Use it with ``with``: leaving ends the child. ``entry`` names another program that takes the same flags. Raises
    ``UsageError`` where no folder for its socket can be made.
    """

    def __init__(self, folder: ModelFolder, config: Config, *, threads: int, entry: Sequence[str] = ENTRY) -> None:
        self._folder = _private_folder()
        self.endpoint = f"ipc://{self._folder}/gpu"
        self._ready = False
        self._errors: deque[str] = deque(maxlen=20)
        server = config.server
        # Not from the current folder: neither modules (-P) nor settings, which all come from us.
        command = [sys.executable, "-P", "-m", *entry, "--embedded", "--offline", "--config", os.devnull]
        command += ["--model", str(folder.path), "--bind", self.endpoint]
        command += ["--device", server.device, "--dtype", server.dtype, "--threads", str(threads)]
        try:
            # A session of its own: Ctrl-C in the terminal is for the runner, which ends the child in its own time.
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                env=_environment(config),
            )
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self._reader = threading.Thread(target=self._read_errors, daemon=True, name="embedded server's stderr")
        self._reader.start()

    def wait(self) -> dict[str, object]:
        """Blocks until the server is ready; returns what it says of itself.

        Raises the error that the server ended with, or ``ConnectionFailedError``.
        """
        assert self._child.stdout is not None  # opened as a pipe above
        line = self._child.stdout.readline()
        if not line:
            raise self.failure()
        ready: dict[str, object] = json.loads(line)
        self._ready = True
        return ready

    def failure(self) -> TeegpuError:
        """Why the server is gone, as an error to raise: its own where it had one to tell."""
        try:
            code = self._child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return ConnectionFailedError("the embedded GPU server closed its output and is still there")
        self._reader.join(_STOP_SECONDS)
        last = self.last_words
        if code in _KINDS and last:
            return _KINDS[code](last)
        how = _signal_name(-code) if code < 0 else f"with exit code {code}"
        reason = f" ({last})" if last else ""
        return ConnectionFailedError(f"the embedded GPU server ended {how}{reason}")

    @property
    def last_words(self) -> str:
        """The last line that the server wrote to stderr, without what its command puts around it; may be empty."""
        lines = list(self._errors)
        if self._child.poll() == EXIT_BUG and len(lines) > 1:
            lines.pop()  # what says that it is a bug comes after the line that says which
        return lines[-1].removeprefix("teegpu: ") if lines else ""

    @property
    def ended(self) -> bool:
        """Whether the child is gone. Asked after a lost connection: it waits a moment for the process to follow."""
        try:
            self._child.wait(_GONE_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def gone(self) -> bool:
        """Whether the child is seen to have ended, without waiting for it."""
        return self._child.poll() is not None

    @property
    def pid(self) -> int:
        return self._child.pid

    def _read_errors(self) -> None:
        assert self._child.stderr is not None  # opened as a pipe above
        for line in self._child.stderr:
            if line.strip():
                self._errors.append(line.strip())

    def close(self) -> None:
        """Ends the child: politely, then not. One that is still loading has nothing to finish."""
        child = self._child
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            if not self._ready:
                child.kill()
            with contextlib.suppress(OSError):
                child.stdin.close()
            child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        except BaseException:
            # A second Ctrl-C while we wait: no more politeness, but no orphan either.
            child.kill()
            child.wait()
            raise
        finally:
            self._reader.join(_STOP_SECONDS)
            child.stdout.close()
            child.stderr.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _private_folder() -> Path:
    """A new folder that only this user can enter, with a path short enough for a socket."""
    base = "the usual places"
    try:
        base = tempfile.gettempdir()
        if len(base) > _LONGEST_BASE:
            base = "/tmp"
        return Path(tempfile.mkdtemp(prefix="teegpu-", dir=base))
    except OSError as error:
        reason = (error.strerror or "no usable temporary directory").lower()
        raise UsageError(
            f"no folder for the embedded server's socket can be made in {base} ({reason}): set TMPDIR to a folder that "
            f"can be written to, with a path of at most {_LONGEST_BASE} characters"
        ) from None


def _environment(config: Config) -> dict[str, str]:
    """That of the server, with the settings that both ends of the connection share."""
    environment = child_environment(config, ("limits.", "compression."))
    environment[variable_name("server.layers")] = ""  # the only server of its run holds all
    # It makes its int8 weights before it says that it is ready, and not while a hello waits.
    environment[variable_name("server.shield")] = "auto" if config.run.privacy == "none" else "on"
    return environment


def child_environment(config: Config, shared: tuple[str, ...]) -> dict[str, str]:
    """Ours, for a child that is a ``teegpu`` too, with the settings that begin with ``shared``: it sees no flags nor
    files of ours."""
    environment = dict(os.environ)
    environment |= {variable_name(key): str(value) for key, value in config.values().items() if key.startswith(shared)}
    root = str(Path(__file__).resolve().parents[2])
    if root not in (*site.getsitepackages(), site.getusersitepackages()):
        # We run from a checkout, which may be known to us by nothing but the current folder.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    return environment


def _signal_name(number: int) -> str:
    hint = ", which may mean that this machine is out of memory" if number == signal.SIGKILL else ""
    try:
        return f"by signal {signal.Signals(number).name}{hint}"
    except ValueError:
        return f"by signal {number}"
