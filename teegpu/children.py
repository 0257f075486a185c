"""Child processes: found from a checkout, tied to their parent's life, ended politely and then not.

The life line is the child's standard input: it ends when its parent does, however that ends, and a child that is done
when its input ends needs no other watch.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import site
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
"""Where ``teegpu`` and ``transports`` lie."""

_TAIL_BYTES: Final = 4096


def environment(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """``given`` (the process's own), for a child that has to find these packages: a checkout may be known to us by
    nothing but the current folder."""
    made = dict(os.environ if given is None else given)
    if str(ROOT) not in (*site.getsitepackages(), site.getusersitepackages()):
        made["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), made.get("PYTHONPATH", "")]))
    return made


def how_it_ended(code: int) -> str:
    """``with exit code 3`` or ``by signal SIGKILL, …``, of a return code as ``subprocess`` gives it."""
    if code >= 0:
        return f"with exit code {code}"
    hint = ", which may mean that this machine is out of memory" if code == -signal.SIGKILL else ""
    try:
        return f"by signal {signal.Signals(-code).name}{hint}"
    except ValueError:
        return f"by signal {-code}"


def end(process: subprocess.Popen[Any], *, wait_seconds: float) -> int:
    """Ends ``process``: its standard input first, and after ``wait_seconds`` the process. → its return code.

    An interrupt while it waits ends the process at once and goes on."""
    try:
        if process.stdin is not None:
            with contextlib.suppress(OSError):  # what it did not read any more
                process.stdin.close()
        return process.wait(wait_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise


def limit(kind: int, most: int) -> None:
    """From now on this process may take ``most`` of the resource ``kind`` (of ``resource``); ``RLIM_INFINITY``: as much
    as there is. A limit that was set on it from outside stays."""
    hard = resource.getrlimit(kind)[1]
    infinite = resource.RLIM_INFINITY
    resource.setrlimit(kind, (hard if most == infinite else most if hard == infinite else min(most, hard), hard))


def address_space() -> int:
    """Bytes of this process's address space, which ``RLIMIT_AS`` limits."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


class Child:
    """``python ARGUMENTS…`` with a life line and a memory of what it said on standard error. Use it with ``with``.

    ``stdout``: as ``subprocess`` takes it; ``STDOUT``: to where standard error goes. ``text``: its pipes are text, in
    UTF-8. It is in a session of its own, so a Ctrl-C in the terminal reaches us alone.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        given: Mapping[str, str] | None = None,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        text: bool = False,
        wait_seconds: float = 3.0,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._wait_seconds = wait_seconds
        self._said = ""
        # Not a pipe: that fills up where nobody reads it.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        try:
            self.process: subprocess.Popen[Any] = subprocess.Popen(
                # -P: modules are not looked for in the current folder.
                [sys.executable, "-P", *arguments],
                stdin=subprocess.PIPE,
                stdout=self._errors if stdout == subprocess.STDOUT else stdout,
                stderr=self._errors,
                text=text,
                encoding="utf-8" if text else None,
                start_new_session=True,
                pass_fds=tuple(pass_fds),
                env=environment(given),
            )
        except BaseException:
            self._errors.close()
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def gone(self) -> bool:
        """Whether it is seen to have ended, without waiting for it."""
        return self.process.poll() is not None

    def said(self, limit: int = 1 << 20) -> str:
        """The end, of ``limit`` bytes at most, of what it wrote to standard error; a short one once it is closed."""
        if self._errors.closed:
            return self._said
        size = os.fstat(self._errors.fileno()).st_size
        # Not seek: the child writes at the same offset.
        return os.pread(self._errors.fileno(), limit, max(0, size - limit)).decode("utf-8", "replace")

    def words(self) -> list[str]:
        """The last lines that it wrote to standard error, without empty ones."""
        return [line for line in map(str.strip, self.said(_TAIL_BYTES).split("\n")) if line]

    def last_words(self) -> str:
        """The last line that it wrote to standard error, or an empty string."""
        return next(reversed(self.words()), "")

    def close(self, *, politely: bool = True) -> int:
        """Ends it, at once or ``politely``. → its return code. May be called again."""
        if not politely:
            self.process.kill()
        try:
            return end(self.process, wait_seconds=self._wait_seconds)
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()
            self._said = self.said(_TAIL_BYTES)
            self._errors.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
