"""X25519 keys: what they are, and the files that they are kept in.

A key is written as one word, which says what it is and carries a checksum: ``teegpu-public:`` or ``teegpu-secret:``,
then 45 characters of Z85 for the 32 bytes of the key and 4 bytes of SHA-256 over the word's beginning and the key. So a
public key is never taken for a secret one, or the other way round, even when a file was renamed or its label edited. A
key file has that word on a line of its own; lines that begin with ``#`` are for people.

Of a pair only the secret half is kept; the public one follows from it, so the halves can't be of different pairs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from zmq.utils import z85

from transports.errors import BadKeyError

PUBLIC_LABEL = "teegpu-public:"
SECRET_LABEL = "teegpu-secret:"
PUBLIC_SUFFIX = ".pub"
SECRET_SUFFIX = ".key"

KEY_BYTES = 32
CHECKSUM_BYTES = 4
MAX_FILE_BYTES = 4096
"""A key file has some 200 bytes. Whatever is larger was not meant to be one."""

OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key, of a server or a client. It may be shown to anybody."""

    raw: bytes

    @property
    def text(self) -> str:
        """The key as one word."""
        return _pack(PUBLIC_LABEL, self.raw)

    @property
    def fingerprint(self) -> str:
        """128 bits as 32 hexadecimal digits, for people to compare and for logs: nobody can find another key with the
        same ones."""
        return hashlib.sha256(self.raw).hexdigest()[:32]

    def __str__(self) -> str:
        return self.fingerprint


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A secret key with its public half. The secret is in no ``repr`` and in no message."""

    secret: bytes = field(repr=False)
    public: PublicKey


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """What a client needs: its own pair, and the public key that the server has to prove to have."""

    own: KeyPair
    server: PublicKey


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """What a server needs: its own pair, and the folder with its clients' public keys.

    ``clients`` None: whoever knows the server's public key may connect.
    """

    own: KeyPair
    clients: Path | None


def new_pair() -> KeyPair:
    from transports import noise

    return pair_of(noise.new_secret())


def pair_of(secret: bytes) -> KeyPair:
    """The pair that the 32 bytes of ``secret`` are one half of."""
    from transports import noise

    return KeyPair(secret, PublicKey(noise.public_of(secret)))


# ---- a key as a word


def _checksum(label: str, raw: bytes) -> bytes:
    return hashlib.sha256(label.encode() + raw).digest()[:CHECKSUM_BYTES]


def _pack(label: str, raw: bytes) -> str:
    packed: bytes = z85.encode(raw + _checksum(label, raw))
    return label + packed.decode()


def _unpack(word: str, label: str, where: str) -> bytes:
    try:
        raw = bytes(z85.decode(word.removeprefix(label).encode("ascii")))
    except (ValueError, KeyError, UnicodeEncodeError, struct.error):  # the last one for five letters beyond 2**32
        raw = b""
    key, checksum = raw[:KEY_BYTES], raw[KEY_BYTES:]
    if len(key) != KEY_BYTES or checksum != _checksum(label, key):
        raise BadKeyError(f"{where}: the key is damaged, its checksum is wrong: copy it anew, whole")
    return key


def is_key_text(text: str) -> bool:
    """Whether ``text`` is meant to be a key itself, and not the name of one."""
    return text.strip().startswith((PUBLIC_LABEL, SECRET_LABEL))


def parse_public(text: str, where: str) -> PublicKey:
    """The public key in ``text``: a key as a word, or the content of a file. ``where`` it stands is for the error.

    Raises ``BadKeyError``; its message never holds anything of ``text``.
    """
    word = _word(text, where)
    if word.startswith(SECRET_LABEL):
        raise BadKeyError(
            f"{where}: this is a secret key, and a public one belongs here: give the file that ends in "
            f"{PUBLIC_SUFFIX}; if the secret key has left its machine, make a new pair"
        )
    return PublicKey(_unpack(word, PUBLIC_LABEL, where))


def parse_secret(text: str, where: str) -> KeyPair:
    """The pair of the secret key in ``text``. See ``parse_public``."""
    word = _word(text, where)
    if word.startswith(PUBLIC_LABEL):
        raise BadKeyError(
            f"{where}: this is a public key, and a secret one is needed here: give the file that ends in "
            f"{SECRET_SUFFIX}"
        )
    return pair_of(_unpack(word, SECRET_LABEL, where))


def _word(text: str, where: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    words = [line for line in lines if line and not line.startswith("#")]
    if len(words) != 1 or not is_key_text(words[0]):
        raise BadKeyError(f"{where}: this is no key of teegpu ('teegpu keys new NAME' makes a pair)")
    return words[0]


# ---- key files


def read_public(path: Path) -> PublicKey:
    """Raises ``BadKeyError``, also for a file that others could have written."""
    text, _ = _read(path)
    try:
        danger = writable_by_others(path)
    except OSError as error:
        danger = (error.strerror or str(error)).lower()
    if danger:
        raise BadKeyError(f"{path}: others could have changed this key: {danger}")
    return parse_public(text, str(path))


def read_secret(path: Path) -> KeyPair:
    """Raises ``BadKeyError``, also for a file that is not ours alone."""
    text, status = _read(path)
    pair = parse_secret(text, str(path))
    danger = unsafe(path, status)
    if danger:
        raise BadKeyError(f"{path}: {danger}")
    return pair


def writable_by_others(path: Path) -> str:
    """Who else could have put there what is at ``path``, and what to do; empty where only root and we could: neither it
    nor a folder above it belongs to another user, or can be written by its group or by all. (In a folder like /tmp they
    can write, but not replace what is not theirs.)"""
    real = path.resolve()
    for each in (real, *real.parents):
        status = each.stat()
        if status.st_uid not in {0, os.geteuid()}:
            return f"{each} belongs to another user (uid {status.st_uid})"
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (each != real and status.st_mode & stat.S_ISVTX):
            return f"{each} can be written by others (mode {stat.S_IMODE(status.st_mode):o}): chmod go-w {each}"
    return ""


def unsafe(path: Path, status: os.stat_result) -> str:
    """Why the secret key file (or the folder of them) at ``path`` is not secret, and what to do; empty where it is."""
    mode = "700" if stat.S_ISDIR(status.st_mode) else "600"
    if status.st_uid != os.geteuid():
        return f"it belongs to another user (uid {status.st_uid}), who can read what should be secret: make a new key"
    if status.st_mode & OTHERS:
        return (
            f"others on this machine can get at it (mode {stat.S_IMODE(status.st_mode):o}): chmod {mode} {path}, and "
            "make a new key if somebody may have read it"
        )
    return ""


def _read(path: Path) -> tuple[str, os.stat_result]:
    try:
        # O_NONBLOCK: opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BadKeyError(f"{path}: this key file can't be read: {(error.strerror or str(error)).lower()}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadKeyError(f"{path}: this is not a file")
        content = os.read(descriptor, MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > MAX_FILE_BYTES:
        raise BadKeyError(f"{path}: this is no key of teegpu: it is too large")
    return content.decode("utf-8", "replace"), status


def write_pair(pair: KeyPair, public_path: Path, secret_path: Path, *, replace: bool = False) -> None:
    """Write both files of ``pair``; their folder is made, for us alone, where it is missing.

    Raises ``BadKeyError``: a file is there already (unless ``replace``), or the folder is open to others.
    """
    folder = secret_path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        danger = unsafe(folder, folder.stat())
        if danger:
            raise BadKeyError(f"{folder}: secret keys are to be kept there, but {danger}")
        for path in (secret_path, public_path):
            if not replace and os.path.lexists(path):
                raise BadKeyError(f"{path}: this key exists already; choose another name, or replace it with --force")
        comment = f"# teegpu secret key, fingerprint {pair.public.fingerprint}. It stays on this machine: show nobody."
        _write(secret_path, f"{comment}\n{_pack(SECRET_LABEL, pair.secret)}\n", 0o600, replace=replace)
        comment = f"# teegpu public key, fingerprint {pair.public.fingerprint}. Anybody may have it."
        _write(public_path, f"{comment}\n{pair.public.text}\n", 0o644, replace=replace)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BadKeyError(f"{error.filename or folder}: the keys can't be written: {reason}") from None


def _write(path: Path, content: str, mode: int, *, replace: bool) -> None:
    """Whole or not at all, and never wider open than ``mode``, not for a moment."""
    descriptor, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(content)
            os.fchmod(descriptor, mode)
            file.flush()
            os.fsync(descriptor)
        if replace:
            os.replace(name, path)
        else:
            os.link(name, path)  # fails where somebody was quicker
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
