"""The lock of a run: held by its process as long as that lives, and let go by the kernel however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Final

NAME: Final = "lock"

_TAKEN: Final = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})


class RunLock:
    """Takes the lock in ``folder``, and makes its file. Raises ``OSError``: also where another process has it."""

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / NAME, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Lets go of it. May be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def held(folder: Path) -> bool:
    """Whether a living process holds the lock in ``folder``."""
    try:
        file = os.open(folder / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _TAKEN
    finally:
        os.close(file)
    return False
