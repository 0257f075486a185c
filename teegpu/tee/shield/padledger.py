"""The ledger of a pool of pads: how far it is spent, and the key of what is not. It lies outside of the pool.

Pads come in leaves, which are numbered and used in that order, so what is spent is one number for each kind of pad.
The key of a leaf follows from the key of the leaf before it by a one-way function, and the ledger holds the key of the
next leaf alone: a claim writes the number and the key that come after it, twice, over those that were there, and has
the disk keep them, before the pads are used. From then on

- no process hands the pads out again, whatever became of the one that claimed them;
- nobody can read them in the pool again, also not in a copy of it from a backup: their key is gone.

What can't be noticed from inside is a whole machine that was set back to an earlier state, pool and ledger together,
such as a snapshot of a virtual machine: never go on from one with pads that were there before it. Overwriting means
little on SSDs and on file systems that copy on write: what is physically left of an old key there is sealed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from teegpu.errors import ShieldError
from teegpu.tee.shield import sealed

KINDS: Final = ("body", "head")
"""A ``body`` pad serves the products of all layers for one token, a ``head`` pad that of lm_head."""

_SLOT_BYTES: Final = 4096
"""The state stands in two places that the disk writes apart, so that one is whole at any time."""
_STATE: Final = struct.Struct("<Q" + "Q32s" * len(KINDS))
_NONCE_BYTES: Final = 12


@dataclass(frozen=True, slots=True)
class Place:
    """How far a kind of pad is spent: ``next`` is the first leaf that is not, ``chain`` the key of it."""

    next: int
    chain: bytes

    def at(self, leaf: int) -> Place:
        """The place at a later leaf. There is no way back. Raises ``ValueError``."""
        if leaf < self.next:
            raise ValueError(f"leaf {leaf} is spent: the ledger stands at {self.next}")
        chain = self.chain
        for _ in range(leaf - self.next):
            chain = hmac.digest(chain, b"next", hashlib.sha256)
        return Place(leaf, chain)

    def leaf_key(self, salt: bytes) -> bytes:
        """The key of this leaf in the segment with ``salt``."""
        return hmac.digest(self.chain, b"leaf" + salt, hashlib.sha256)


Places = dict[str, Place]


def path_of(pool: str) -> Path:
    """Where the ledger of the pool with that id is."""
    return sealed.private_folder(sealed.state_folder() / "ledgers") / f"{pool}.ledger"


class Ledger:
    """The ledger of ``pool``. Raises ``ShieldError`` where there is none, or others can read it."""

    def __init__(self, pool: str, key: sealed.SealKey) -> None:
        self.path = path_of(pool)
        self._cipher = AESGCM(key.derive("pad ledger", pool.encode()))
        self._sequence = 0
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ShieldError(
                f"the pads have no ledger here ({self.path} is missing), so nobody knows which of them are spent: the "
                "pool was copied from elsewhere, or the ledger was lost. Remove it with 'teegpu pads rm' and make new "
                "ones with 'teegpu pads make'"
            ) from None
        except OSError as error:
            raise ShieldError(f"{self.path}: {(error.strerror or str(error)).lower()}") from error
        try:
            sealed.check_private(self.path, self._file)
        except BaseException:
            os.close(self._file)
            raise

    @classmethod
    def create(cls, pool: str, key: sealed.SealKey) -> None:
        """The ledger of a new pool, with keys from the operating system's randomness."""
        path = path_of(pool)
        with sealed.explaining(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, 2 * _SLOT_BYTES)
            finally:
                os.close(descriptor)
            ledger = cls(pool, key)
            try:
                ledger.write({kind: Place(0, os.urandom(sealed.KEY_BYTES)) for kind in KINDS})
            finally:
                ledger.close()
            sealed.flush_folder(path.parent)

    @contextlib.contextmanager
    def locked(self) -> Iterator[Places]:
        """The places as they are now; within it no other process changes them. Raises ``ShieldError`` for a ledger
        that is damaged."""
        with sealed.explaining(self.path):
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield self._read()
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _read(self) -> Places:
        found = [state for state in map(self._slot, (0, 1)) if state is not None]
        if not found:
            raise ShieldError(
                f"{self.path} is damaged, was changed, or was sealed under another key, so nobody knows which pads are "
                "spent: remove them with 'teegpu pads rm' and make new ones with 'teegpu pads make'"
            )
        self._sequence, places = max(found, key=lambda state: state[0])
        return places

    def _slot(self, number: int) -> tuple[int, Places] | None:
        content = os.pread(self._file, _NONCE_BYTES + _STATE.size + sealed.TAG_BYTES, number * _SLOT_BYTES)
        try:
            values = _STATE.unpack(self._cipher.decrypt(content[:_NONCE_BYTES], content[_NONCE_BYTES:], None))
        except (InvalidTag, ValueError, struct.error):
            return None
        return values[0], {kind: Place(*values[1 + 2 * i : 3 + 2 * i]) for i, kind in enumerate(KINDS)}

    def write(self, places: Places) -> None:
        """Within ``locked``: they are on the disk when it returns. Raises ``OSError``.

        First where the older state is: until it is on the disk, the newer one stays whole. Then over that too."""
        self._sequence += 1
        values = [value for kind in KINDS for value in (places[kind].next, places[kind].chain)]
        for number in (self._sequence % 2, (self._sequence + 1) % 2):
            nonce = os.urandom(_NONCE_BYTES)
            content = nonce + self._cipher.encrypt(nonce, _STATE.pack(self._sequence, *values), None)
            os.pwrite(self._file, content, number * _SLOT_BYTES)
            os.fdatasync(self._file)

    def destroy(self) -> None:
        """Overwrites and removes it: what is left of its pool can't be read from now on."""
        with sealed.explaining(self.path):
            os.pwrite(self._file, bytes(2 * _SLOT_BYTES), 0)
            os.fdatasync(self._file)
            self.path.unlink(missing_ok=True)
            sealed.flush_folder(self.path.parent)
        self.close()

    def close(self) -> None:
        """May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
