"""Files that only their user can read, and that nobody else can change unnoticed.

A sealed file is encrypted and authenticated with AES-256-GCM under a key that is derived from the user's seal key and
from the file's own salt, so a nonce is never used twice. The seal key is ``$XDG_STATE_HOME/teegpu/shield/seal.key``
(mode 0600, in a folder of mode 0700), and what is sealed lies in ``shield.dir``: a copy of it is worth nothing without
the key. Whoever can read the seal key can read all; a key file that others may read is therefore refused.

    magic, salt (32), length of the header (4), header (JSON), its tag (16), then the parts in pieces of 8 MiB, each
    followed by its tag (16)

The header names the parts with their lengths, what kind of file it is, and what it is bound to, such as the model's
digest. Its tag covers all that comes before it, and the number of a piece is its nonce: pieces can't be exchanged.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import hmac
import json
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from teegpu.errors import ShieldError
from teegpu.units import human_bytes
from transports.security import unsafe

KEY_BYTES: Final = 32
TAG_BYTES: Final = 16
PIECE_BYTES: Final = 8 << 20

_MAGIC: Final = b"teegpu sealed 1\n"
_SALT_BYTES: Final = 32
_MOST_HEADER_BYTES: Final = 16 << 20
_KEY_FILE: Final = "seal.key"

Binding = Mapping[str, str | int]
"""What a file belongs to; whoever opens it says the same, or it is another file."""


def state_folder() -> Path:
    """``$XDG_STATE_HOME/teegpu/shield``: the seal key and the ledgers of pads. Made for us alone where it is missing.

    Raises ``ShieldError`` where others can get at it.
    """
    return private_folder(_base("XDG_STATE_HOME", ".local/state") / "teegpu" / "shield")


def data_folder(configured: str = "") -> Path:
    """``configured`` (``shield.dir``), or ``$XDG_DATA_HOME/teegpu/shield``: keys, hints and pads, all sealed."""
    if configured:
        return private_folder(Path(configured).expanduser())
    return private_folder(_base("XDG_DATA_HOME", ".local/share") / "teegpu" / "shield")


def _base(variable: str, otherwise: str) -> Path:
    base = os.environ.get(variable, "")
    return Path(base) if base and Path(base).is_absolute() else Path.home() / otherwise


def private_folder(path: Path) -> Path:
    """``path``, made with mode 0700 where it is missing. Raises ``ShieldError`` where it is not ours alone."""
    with explaining(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        danger = unsafe(path, path.stat())
    if danger:
        raise ShieldError(f"{path}: secrets of private runs are kept there, but {danger}")
    return path


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` about ``path`` into a ``ShieldError`` that says what to do."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ShieldError(
                f"no space left for {where}: free some, or set shield.dir (TEEGPU_SHIELD_DIR) to a folder on another "
                "disk"
            ) from error
        raise ShieldError(f"{where}: {(error.strerror or str(error)).lower()}") from error


def check_space(path: Path, need_bytes: float, what: str) -> None:
    """Raises ``ShieldError`` where the disk with ``path`` has no room for ``need_bytes`` of ``what``."""
    free = shutil.disk_usage(path.parent).free
    if need_bytes > free:
        raise ShieldError(
            f"{what} take {human_bytes(need_bytes)}, and {path.parent} has {human_bytes(free)} free: set shield.dir "
            "(TEEGPU_SHIELD_DIR) to a folder on another disk"
        )


def flush_folder(path: Path) -> None:
    """Has the disk keep what was made, renamed or removed in ``path``. Raises ``OSError``."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_private(path: Path, descriptor: int) -> None:
    """Raises ``ShieldError`` where the open file at ``path`` is not ours alone, or no file."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise ShieldError(f"{path}: this is not a file")
    danger = unsafe(path, status)
    if danger:
        raise ShieldError(f"{path}: {danger}")


class DamagedError(ShieldError):
    """A sealed file that is cut short, was changed, or was sealed under another key or for something else."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} is damaged, was changed, or was sealed under another key: remove it, and it is made anew"
        )


class SealKey:
    """The user's seal key. It is in no message and in no ``repr``."""

    def __init__(self, raw: bytes) -> None:
        if len(raw) != KEY_BYTES:
            raise ValueError(f"a seal key has {KEY_BYTES} bytes, not {len(raw)}")
        self._raw = raw

    def derive(self, purpose: str, salt: bytes = b"") -> bytes:
        """A key of 32 bytes for one purpose: HMAC-SHA256, so it says nothing of the others."""
        return hmac.digest(self._raw, purpose.encode() + b"\0" + salt, hashlib.sha256)

    @classmethod
    def load(cls) -> SealKey:
        """The key of this user, made where there is none. Raises ``ShieldError`` where others may have read it."""
        path = state_folder() / _KEY_FILE
        with explaining(path):
            if not path.exists():
                _make_key(path)
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                check_private(path, descriptor)
                raw = os.read(descriptor, KEY_BYTES + 1)
            finally:
                os.close(descriptor)
        if len(raw) != KEY_BYTES:
            raise ShieldError(
                f"{path}: the seal key is damaged: remove it, and what it sealed with it (pads, hints, keys); they are "
                "made anew"
            )
        return cls(raw)


def _make_key(path: Path) -> None:
    """Whole or not at all; where another process was quicker, its key stays."""
    descriptor, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(os.urandom(KEY_BYTES))
            file.flush()
            os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
        flush_folder(path.parent)
    finally:
        os.unlink(name)


@contextlib.contextmanager
def making(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within it this process alone makes ``path``; ``waiting`` is called where another one has to end first.

    What a killed process left of it is removed. The kernel lets go of the lock however the process ends.
    """
    with explaining(path):
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with explaining(path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            for leftover in path.parent.glob(f".{path.name}~*"):
                leftover.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


class SealedWriter:
    """Writes the sealed file ``path``: ``parts`` (name, bytes) in their order, whole or not at all.

    Use it with ``with``, and ``append`` the bytes of one part after the other. It is there, flushed to disk, when the
    block ends without an error. Raises ``ShieldError`` where it can't be written.
    """

    def __init__(self, path: Path, key: SealKey, kind: str, binding: Binding, parts: Sequence[tuple[str, int]]) -> None:
        self._path = path
        salt = os.urandom(_SALT_BYTES)
        self._cipher = AESGCM(key.derive(kind, salt))
        header = json.dumps({"kind": kind, "binding": dict(binding), "parts": [list(part) for part in parts]}).encode()
        self._start = _MAGIC + salt + struct.pack("<I", len(header)) + header
        self._left = [size for _, size in parts if size]
        self._piece = bytearray()
        self._number = 0

    def __enter__(self) -> SealedWriter:
        with explaining(self._path):
            descriptor, self._temporary = tempfile.mkstemp(prefix=f".{self._path.name}~", dir=self._path.parent)
            self._file = open(descriptor, "wb", buffering=0)
        self._write(self._start + self._cipher.encrypt(_nonce(0), b"", self._start))
        return self

    def append(self, data: np.ndarray[Any, Any] | bytes) -> None:
        """The next bytes of the parts; they may end in the middle of one, not beyond it."""
        view = memoryview(data).cast("B")
        while view.nbytes:
            if not self._left:
                raise ValueError("more bytes than the parts were said to have")
            taken = min(view.nbytes, self._left[0], PIECE_BYTES - len(self._piece))
            self._piece += view[:taken]
            view = view[taken:]
            self._left[0] -= taken
            if not self._left[0] or len(self._piece) == PIECE_BYTES:
                self._end_piece()

    def _end_piece(self) -> None:
        self._number += 1
        self._write(self._cipher.encrypt(_nonce(self._number), self._piece, None))
        self._piece.clear()
        if not self._left[0]:
            del self._left[0]

    def _write(self, data: bytes) -> None:
        with explaining(self._path):
            view = memoryview(data)
            while view.nbytes:
                view = view[self._file.write(view) :]

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._left:
                    raise ValueError("fewer bytes than the parts were said to have")
                with explaining(self._path):
                    os.fsync(self._file.fileno())
                    os.replace(self._temporary, self._path)
                    flush_folder(self._path.parent)
        finally:
            self._file.close()
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)


class SealedFile:
    """A sealed file, open for reading. Close it, or use it with ``with``.

    Raises ``FileNotFoundError`` where there is none, ``ShieldError`` where others can read it, and ``DamagedError``
    where it is not what was sealed under this key, of this kind and for this binding.
    """

    def __init__(self, path: Path, key: SealKey, kind: str, binding: Binding) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            check_private(path, self._file)
            self._read_header(key, kind, binding)
        except BaseException:
            os.close(self._file)
            raise

    def _read_header(self, key: SealKey, kind: str, binding: Binding) -> None:
        fixed = len(_MAGIC) + _SALT_BYTES + 4
        start = os.pread(self._file, fixed, 0)
        if len(start) != fixed or not start.startswith(_MAGIC):
            raise DamagedError(self.path)
        (length,) = struct.unpack_from("<I", start, fixed - 4)
        if length > _MOST_HEADER_BYTES:
            raise DamagedError(self.path)
        header = os.pread(self._file, length, fixed)
        tag = os.pread(self._file, TAG_BYTES, fixed + length)
        self._cipher = AESGCM(key.derive(kind, start[len(_MAGIC) : len(_MAGIC) + _SALT_BYTES]))
        try:
            self._cipher.decrypt(_nonce(0), tag, start + header)
        except InvalidTag:
            raise DamagedError(self.path) from None
        content = json.loads(header)
        if content["kind"] != kind or content["binding"] != dict(binding):
            raise DamagedError(self.path)
        self._parts: dict[str, tuple[int, int, int]] = {}
        offset, number = fixed + length + TAG_BYTES, 1
        for name, size in content["parts"]:
            self._parts[name] = (size, offset, number)
            pieces = -(-size // PIECE_BYTES)
            offset += size + pieces * TAG_BYTES
            number += pieces
        if os.fstat(self._file).st_size != offset:
            raise DamagedError(self.path)

    @property
    def sizes(self) -> dict[str, int]:
        """The parts, with their bytes."""
        return {name: size for name, (size, _, _) in self._parts.items()}

    def read(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of a part, which the caller may write to. Raises ``DamagedError``, and ``KeyError`` where there is
        none of that name."""
        size, offset, number = self._parts[name]
        out = np.empty(size, dtype=np.uint8)
        piece = bytearray(min(size, PIECE_BYTES) + TAG_BYTES)
        for start in range(0, size, PIECE_BYTES):
            length = min(PIECE_BYTES, size - start)
            sealed = memoryview(piece)[: length + TAG_BYTES]
            if os.preadv(self._file, [sealed], offset) != sealed.nbytes:
                raise DamagedError(self.path)
            try:
                self._cipher.decrypt_into(_nonce(number), sealed, None, memoryview(out)[start : start + length])
            except InvalidTag:
                raise DamagedError(self.path) from None
            offset += sealed.nbytes
            number += 1
        return out

    def close(self) -> None:
        """May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> SealedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")
