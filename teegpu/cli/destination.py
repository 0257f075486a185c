"""Where a command's result goes: standard output, a device or pipe such as ``/dev/null`` or ``>(gzip)``, or a file that
is there whole or not at all."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from teegpu.cli.common import message_console
from teegpu.errors import UsageError
from teegpu.files import replacing

STDOUT = Path("-")


class Destination:
    """``out`` None or ``-``: standard output.

    Raises ``UsageError`` at once for a place that can't be written to, or that holds a file without ``force``: a result
    that took long must not be lost for that in the end. ``flows``: it is a device or a pipe, which is written to and
    never replaced.
    """

    def __init__(self, out: Path | None, *, force: bool, quiet: bool = False) -> None:
        self.path = None if out in (None, STDOUT, Path("/dev/stdout")) else out
        self._force = force
        self._quiet = quiet
        mode = 0 if self.path is None else _mode(self.path)
        self.flows = stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)
        if self.path is None:
            if sys.stdout is None:
                raise UsageError("standard output is closed: give --out FILE for the result")
            return
        if self.flows:
            return
        if mode and not stat.S_ISREG(mode):
            raise UsageError(f"--out {self.path}: it is {'a folder' if stat.S_ISDIR(mode) else 'no file'}")
        if not os.access(self.path.parent, os.W_OK | os.X_OK):
            raise UsageError(f"--out {self.path}: there is no folder {self.path.parent} that can be written to")
        try:
            self.path.lstat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._refused(error) from None
        if not force:
            raise self._taken()

    def _taken(self) -> UsageError:
        return UsageError(f"--out {self.path}: it is there already; --force replaces it")

    def _refused(self, error: OSError) -> UsageError:
        return UsageError(f"--out {self.path}: it can't be written: {(error.strerror or str(error)).lower()}")

    def write(self, pieces: str | Iterable[str], *, private: bool = False) -> None:
        """Writes the text. A reader of the file never sees half of it, and what was there before stays until then.
        ``private``: it has what was said to a model, so it is for the user alone, who is told."""
        parts = [pieces] if isinstance(pieces, str) else pieces
        if self.path is None:
            for part in parts:
                sys.stdout.write(part)
            sys.stdout.flush()
            return
        try:
            mode = 0o600 if private else None
            with (
                open(self.path, "wb") if self.flows else replacing(self.path, mode=mode, overwrite=self._force) as file
            ):
                for part in parts:
                    file.write(part.encode())
        except FileExistsError:
            raise self._taken() from None
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise self._refused(error) from None
        if not self._quiet:
            told = ", with the text of the run: only you may read it" if private and not self.flows else ""
            message_console().print(f"written to {self.path}{told}", soft_wrap=True)


def _mode(path: Path) -> int:
    """What is at ``path``, or where a link there leads; 0 for nothing, or nothing that can be looked at."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0
