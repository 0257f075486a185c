"""Files that are replaced as a whole, folders of one user, locks that the kernel lets go of, and where they lie."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

from teegpu.errors import ConfigError

_TAKEN: Final = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})

_XDG: Final = {
    "cache": ("XDG_CACHE_HOME", ".cache"),
    "config": ("XDG_CONFIG_HOME", ".config"),
    "data": ("XDG_DATA_HOME", ".local/share"),
    "state": ("XDG_STATE_HOME", ".local/state"),
}


def user_folder(kind: str, environ: Mapping[str, str] | None = None) -> Path:
    """teegpu's own folder for ``kind`` (cache, config, data, state), whether it exists or not. A variable that is
    unset, empty or relative counts as unset, as the XDG specification asks."""
    environ = os.environ if environ is None else environ
    variable, below_home = _XDG[kind]
    base = environ.get(variable, "")
    root = Path(base) if Path(base).is_absolute() else Path(environ.get("HOME") or _home(variable)) / below_home
    return root / "teegpu"


def _home(variable: str) -> Path:
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and a user whom the system does not know
        raise ConfigError(f"there is no home folder to keep files in: set HOME, or {variable}, to one") from None


def expanded(path: str, setting: str) -> Path:
    """``path``, the value of ``setting``, with a user's home in the place of ~. Raises ``ConfigError``."""
    if "\0" in path:
        raise ConfigError(f"{setting} = {path!r} is no path: there is a NUL in it")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{setting} = {path!r} names a user without a home folder: give the whole path") from None


def there(path: Path) -> bool:
    """Whether something is at ``path``, or may be: where that can't be looked at, who then reads it is told why."""
    try:
        return path.exists()
    except OSError:  # Python takes a folder that may not be entered, or a name that is too long, for an error
        return True


def private_folder(path: Path) -> Path:
    """``path``, made with what is above it for this user alone where it is missing. Raises ``OSError``."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def replacing(
    path: Path, *, mode: int | None = 0o600, durable: bool = False, overwrite: bool = True
) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of ``path`` when the block ends, and vanishes where it raises: whoever
    reads ``path`` finds the old content or the new one. ``mode`` None: as the process's umask has it. ``durable``: a
    power cut doesn't undo it either. ``overwrite`` False: ``FileExistsError`` where ``path`` has come to be there.

    Raises ``OSError``."""
    # A name may have 255 bytes, and a character of it has up to four.
    temporary = path.with_name(f".{path.name[:60]}.{os.urandom(4).hex()}")
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o666 if mode is None else mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if overwrite:
            temporary.replace(path)
        else:
            _link(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def _link(temporary: Path, path: Path) -> None:
    """Unlike a rename, a link does not replace what somebody else has put there meanwhile."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        temporary.replace(path)
    else:
        temporary.unlink()


def replace(path: Path, content: str | bytes, *, mode: int = 0o600, durable: bool = False) -> None:
    """Writes ``content`` as ``replacing`` does; text is UTF-8."""
    with replacing(path, mode=mode, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lock:
    """An advisory lock on the file ``path``, held from its making until ``close``, or until the process ends.

    ``wait``: until another holder lets go; else ``BlockingIOError`` is raised where there is one. Raises ``OSError``.
    """

    def __init__(self, path: Path, *, wait: bool = True) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Lets go of it. May be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def locked(path: Path) -> bool:
    """Whether a living process holds the ``Lock`` on ``path``."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _TAKEN
    finally:
        os.close(file)
    return False
