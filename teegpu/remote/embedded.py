"""A GPU server of the run's own: a child process on a private ipc address that never outlives the run.

The child is told to stop by the end of its standard input, so it goes however this process goes: normally, by a signal
that can't be caught, or with the whole session.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from teegpu.children import Child, environment, how_it_ended
from teegpu.config import SETTINGS, Config, variable_name
from teegpu.errors import EXIT_BUG, ConnectionFailedError, ModelError, TeegpuError, UsageError
from teegpu.model.folder import ModelFolder
from teegpu.options import whole_numbers

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
        server = config.server
        # No settings from the current folder: all come from us.
        arguments = ["-m", *entry, "--embedded", "--offline", "--config", os.devnull]
        arguments += ["--model", str(folder.path), "--bind", self.endpoint]
        arguments += ["--device", server.device, "--dtype", server.dtype, "--weights", server.weights]
        arguments += ["--threads", str(threads)]
        try:
            self._child = Child(arguments, given=_environment(config), text=True, wait_seconds=_STOP_SECONDS)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def wait(self) -> dict[str, object]:
        """Blocks until the server is ready; returns what it says of itself.

        Raises the error that the server ended with, or ``ConnectionFailedError``.
        """
        said = self._child.process.stdout
        line = said.readline() if said is not None else ""
        if not line:
            raise self.failure()
        ready: dict[str, object] = json.loads(line)
        self._ready = True
        return ready

    def failure(self) -> TeegpuError:
        """Why the server is gone, as an error to raise: its own where it had one to tell."""
        try:
            code = self._child.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return ConnectionFailedError("the embedded GPU server closed its output and is still there")
        last = self.last_words
        if code in _KINDS and last:
            return _KINDS[code](last)
        reason = f" ({last})" if last else ""
        return ConnectionFailedError(f"the embedded GPU server ended {how_it_ended(code)}{reason}")

    @property
    def last_words(self) -> str:
        """The last line that the server wrote to stderr, without what its command puts around it; may be empty."""
        lines = self._child.words()
        if self._child.process.poll() == EXIT_BUG and len(lines) > 1:
            lines.pop()  # what says that it is a bug comes after the line that says which
        return lines[-1].removeprefix("teegpu: ") if lines else ""

    @property
    def ended(self) -> bool:
        """Whether the child is gone. Asked after a lost connection: it waits a moment for the process to follow."""
        try:
            self._child.process.wait(_GONE_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def gone(self) -> bool:
        """Whether the child is seen to have ended, without waiting for it."""
        return self._child.gone

    @property
    def pid(self) -> int:
        return self._child.pid

    def close(self) -> None:
        """Ends the child: politely, then not. One that is still loading has nothing to finish."""
        try:
            self._child.close(politely=self._ready)
        finally:
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
    return child_environment(config, ("limits.", "compression.")) | {
        variable_name("server.layers"): "",  # the only server of its run holds all
        variable_name("server.ranks"): "1",
        # It makes its int8 weights before it says that it is ready, and not while a hello waits.
        variable_name("server.shield"): "on" if whole_numbers(config) else "auto",
    }


def child_environment(config: Config, shared: tuple[str, ...]) -> dict[str, str]:
    """Ours, for a child that is a ``teegpu`` too, with the settings that begin with ``shared``: it sees no flags nor
    files of ours. Those that no environment may give are left out."""
    return environment() | {
        variable_name(key): str(value)
        for key, value in config.values().items()
        if key.startswith(shared) and not SETTINGS[key].guarded
    }
