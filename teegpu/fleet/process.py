"""A ``teegpu serve`` that outlives who started it, and how it is found again.

It is nobody's child and in a session of its own: a fleet's controller, and Ray, may go, and runners are served on. Its
standard error is a file that is locked for as long as it lives, so that who finds that file knows whether it is there,
and that the number beside it is still this process's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from teegpu import files
from teegpu.units import printable

_LAUNCH: Final = """sh -c 'echo $$ >"$0" && exec "$@"' "$@" &"""
"""The process writes down its number before it becomes what was asked for; who started it ends."""

_LOG_BYTES: Final = 16 << 20
_TAIL_BYTES: Final = 4096
_LOOK_SECONDS: Final = 0.05
_KILL_SECONDS: Final = 5.0


def folder(fleet: str) -> Path:
    """Where this machine keeps what it knows of ``fleet``'s processes on it: homes may be shared by many."""
    return files.user_folder("state") / "fleet" / fleet / platform.node()


def living(fleet: str) -> list[Process]:
    """``fleet``'s processes on this machine."""
    found = [Process(fleet, path.stem) for path in sorted(folder(fleet).glob("*.log"))]
    return [process for process in found if process.alive]


def end(processes: Sequence[Process], wait_seconds: float) -> None:
    """SIGTERM to each, and after ``wait_seconds`` SIGKILL; forgets those that are gone then. Who else watches them
    finds them not ``wanted`` before they are gone."""
    for process in processes:
        process.dismiss()
        process.signal(signal.SIGTERM)
    deadline = time.monotonic() + wait_seconds
    while any(process.alive for process in processes) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    for process in processes:
        process.kill()
        if not process.alive:
            process.forget()


class Process:
    """That of the group ``name`` of ``fleet`` on this machine, whether it is there or not."""

    def __init__(self, fleet: str, name: str) -> None:
        self.name = name
        self._base = folder(fleet) / name

    def begin(self, command: Sequence[str], environ: Mapping[str, str], about: Mapping[str, str]) -> None:
        """Starts ``command``, and keeps ``about``. Raises ``OSError``, also where the one before is still there."""
        files.private_folder(self._base.parent)
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        log = os.open(self.log, flags, 0o600)
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for kind in ("pid", "served"):
                self._file(kind).unlink(missing_ok=True)
            files.replace(self._file("json"), json.dumps(dict(about)))
            subprocess.run(
                ["sh", "-c", _LAUNCH, "sh", str(self._file("pid")), *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environ, check=True,
            )  # fmt: skip
        finally:
            os.close(log)

    @property
    def alive(self) -> bool:
        return files.locked(self.log)

    @property
    def log(self) -> Path:
        """What it says, at most the last 16 MiB (``trim``)."""
        return self._file("log")

    @property
    def about(self) -> dict[str, str]:
        """What ``begin`` was told; empty where it can't be read."""
        try:
            found = json.loads(self._file("json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def served(self) -> bool:
        """Whether it has come up: ``has_served`` was called since it began, by whoever watched it then."""
        return self._file("served").exists()

    def has_served(self) -> None:
        self._file("served").touch(0o600)

    @property
    def wanted(self) -> bool:
        """Whether nobody has begun to ``end`` it."""
        return self._file("json").exists()

    @property
    def pid(self) -> int:
        """0 where it is not known (yet)."""
        try:
            return int(self._file("pid").read_text())
        except (OSError, ValueError):
            return 0

    def signal(self, number: int) -> None:
        """Sends it; who has just been started is waited for."""
        while self.alive:
            if pid := self.pid:
                with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                    self._send(pid, number)
                return
            time.sleep(_LOOK_SECONDS)

    def _send(self, pid: int, number: int) -> None:
        """Not to another that has the number now: the lock may be held by what the process has begun, or, where a home
        is shared, by a machine of the same name."""
        descriptor = os.pidfd_open(pid)
        try:
            if os.path.samefile(f"/proc/{pid}/fd/2", self.log):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone, or after some seconds in which the system, or a driver, does not let go."""
        self.signal(signal.SIGKILL)
        deadline = time.monotonic() + _KILL_SECONDS
        while self.alive and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)

    def dismiss(self) -> None:
        """From now on it is not ``wanted``."""
        self._file("json").unlink(missing_ok=True)

    def forget(self) -> None:
        """Removes what is kept of it."""
        for kind in ("pid", "served", "json", "log"):
            self._file(kind).unlink(missing_ok=True)

    def last_words(self) -> str:
        """The last line of its log; may be empty."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
                lines = file.read().decode("utf-8", "replace").split("\n")
        except OSError:
            return ""
        return printable(next((line.strip() for line in reversed(lines) if line.strip()), ""), 300)

    def trim(self) -> None:
        """Empties a log that has grown too long: who sends nonsense must not fill the disk."""
        with contextlib.suppress(FileNotFoundError):  # ended meanwhile
            if self.log.stat().st_size > _LOG_BYTES:
                os.truncate(self.log, 0)

    def _file(self, kind: str) -> Path:
        return self._base.with_suffix(f".{kind}")
