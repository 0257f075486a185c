"""Where a command's result goes: standard output, or a file that is there whole or not at all."""

from __future__ import annotations

import os
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
    that took long must not be lost for that in the end.
    """

    def __init__(self, out: Path | None, *, force: bool, quiet: bool = False) -> None:
        self.path = None if out in (None, STDOUT) else out
        self._force = force
        self._quiet = quiet
        if self.path is None:
            if sys.stdout is None:
                raise UsageError("standard output is closed: give --out FILE for the result")
            return
        if self.path.is_dir():
            raise UsageError(f"--out {self.path}: it is a folder")
        if not os.access(self.path.parent, os.W_OK):
            raise UsageError(f"--out {self.path}: there is no folder {self.path.parent} that can be written to")
        if not force and os.path.lexists(self.path):
            raise self._taken()

    def _taken(self) -> UsageError:
        return UsageError(f"--out {self.path}: it is there already; --force replaces it")

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
            with replacing(self.path, mode=0o600 if private else None, overwrite=self._force) as file:
                for part in parts:
                    file.write(part.encode())
        except FileExistsError:
            raise self._taken() from None
        if not self._quiet:
            told = ", with the text of the run: only you may read it" if private else ""
            message_console().print(f"written to {self.path}{told}", soft_wrap=True)
