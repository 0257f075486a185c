"""Noise_IK_25519_AESGCM_SHA256: the key exchange of a link, and the ciphers that come of it. Bytes in, bytes out.

After The Noise Protocol Framework, revision 34 (https://noiseprotocol.org/noise.html): section 5 (the objects), 7.5
(the pattern IK), 4.2 and 11.3 (rekeying), 12 (X25519, AES-256-GCM, SHA-256). The names in comments are the
specification's. What each side proves, and by when:

    <- s                     the client knows the server's public key before
    -> e, es, s, ss          who has the client's key, or the server's, has said this at some time
    <- e, ee, se             the server has its key and is there now; only this client can go on
    -> what is sealed        the client has its key and is there now

Both sides give a key of their own that is made for one connection and forgotten with it. Who gets hold of both lasting
keys later can read nothing of what was sealed before.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from transports.errors import SealError

if TYPE_CHECKING:
    from transports.base import Buffer

NAME = b"Noise_IK_25519_AESGCM_SHA256"

KEY_BYTES = 32
TAG_BYTES = 16
FIRST_BYTES = 2 * KEY_BYTES + 2 * TAG_BYTES
SECOND_BYTES = KEY_BYTES + TAG_BYTES
"""Of the two messages of a handshake, without payload."""

MAX_DATA_BYTES = 2**31 - 1 - TAG_BYTES
"""What one seal holds at most: the library ends the process for more."""

_LAST_NONCE = 2**64 - 1
"""No message is sealed with it: rekeying uses it."""

REKEY_BYTES = 2**36
"""Sealed under one key, before the next one. With these 2^32 blocks, AES-GCM's can be told from chance with a
probability of 2^-65 (they are a permutation: the number of pairs of blocks over 2^128)."""


def public_of(secret: bytes) -> bytes:
    """The public half of an X25519 key, 32 bytes."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def new_secret() -> bytes:
    return X25519PrivateKey.generate().private_bytes_raw()


class Cipher:
    """CipherState with a key: one direction of a link. A nonce is a number that counts up, and is used once, by
    whatever thread; a fork has none. After what could not be opened, nothing is any more."""

    def __init__(self, key: bytes, *, nonce: int = 0, rekey_bytes: int = REKEY_BYTES) -> None:
        self._aes = AESGCM(key)
        self._nonce = nonce
        self._rekey_bytes = rekey_bytes
        self._bytes = 0
        self._generation = _generation
        self._broken = False
        self._lock = threading.Lock()

    def seal_into(self, data: Buffer, sealed: Buffer) -> None:
        """``sealed`` has room for ``TAG_BYTES`` more than ``data`` has."""
        with self._lock:
            aes, nonce = self._next(len(data))
            aes.encrypt_into(nonce, data, None, sealed)

    def seal(self, data: Buffer) -> bytes:
        with self._lock:
            aes, nonce = self._next(len(data))
            return aes.encrypt(nonce, data, None)

    def open(self, sealed: memoryview) -> memoryview:
        """What was sealed, in its own place: ``sealed`` is written over. Raises ``SealError``, from then on always."""
        with self._lock:
            size = len(sealed) - TAG_BYTES
            if not 0 <= size <= MAX_DATA_BYTES:
                self._broken = True
                raise SealError("it is shorter than its seal, or longer than any")
            aes, nonce = self._next(size)
            self._broken = True  # until it is open, whatever happens meanwhile
            data = sealed[:size]
            try:
                aes.decrypt_into(nonce, sealed, None, data)
            except InvalidTag:
                raise SealError("its seal is not the one that is due: it was changed, or is out of turn") from None
            self._broken = False
            return data

    def end(self) -> None:
        """Open nothing any more."""
        self._broken = True

    def _next(self, nbytes: int) -> tuple[AESGCM, bytes]:
        if self._broken:
            raise SealError("something before it could not be opened")
        if self._generation != _generation:
            raise SealError("it belongs to the process that made it: a fork of it would use the same numbers again")
        if nbytes > MAX_DATA_BYTES:
            raise SealError(f"{nbytes} bytes are too many for one seal")
        if self._nonce >= _LAST_NONCE:
            raise SealError("all numbers of this connection are used up")
        if self._bytes and self._bytes + nbytes > self._rekey_bytes:
            # Rekey()
            self._aes = AESGCM(self._aes.encrypt(_nonce(_LAST_NONCE), bytes(KEY_BYTES), None)[:KEY_BYTES])
            self._bytes = 0
        self._bytes += nbytes
        nonce = _nonce(self._nonce)
        self._nonce += 1
        return self._aes, nonce


_generation = 0
"""How many forks this process is away from the first. Its number may be its parent's, in a container."""


def _forked() -> None:
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_forked)


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")  # 32 bits of zeros, then 64 of the number


class _Symmetric:
    """SymmetricState, and what both sides of the pattern share. ``own`` is a secret key, ``prologue`` what both sides
    have to say alike. Any failure is a ``SealError``."""

    def __init__(self, own: bytes, prologue: bytes, responder: bytes | None, ephemeral: bytes | None) -> None:
        self._own = X25519PrivateKey.from_private_bytes(own)
        self._ephemeral = X25519PrivateKey.from_private_bytes(ephemeral or new_secret())
        self._key = b""
        self._nonce = 0
        self._generation = _generation
        # InitializeSymmetric(), MixHash(prologue), the pre-message
        self._chain = self.hash = NAME.ljust(hashlib.sha256().digest_size, b"\0")
        self._mix_hash(prologue)
        self._mix_hash(responder or self._own.public_key().public_bytes_raw())

    def _mix_hash(self, data: bytes) -> None:
        self.hash = hashlib.sha256(self.hash + data).digest()

    def _mix_key(self, ours: X25519PrivateKey, theirs: bytes) -> None:
        try:
            shared = ours.exchange(X25519PublicKey.from_public_bytes(theirs))
        except ValueError:  # a point of small order: what comes of it is known to all
            raise SealError("it holds a key that is none") from None
        self._chain, self._key = _hkdf(self._chain, shared)
        self._nonce = 0

    def _encrypt_and_hash(self, data: bytes) -> bytes:
        sealed = AESGCM(self._key).encrypt(_nonce(self._nonce), data, self.hash)
        self._nonce += 1
        self._mix_hash(sealed)
        return sealed

    def _decrypt_and_hash(self, sealed: bytes) -> bytes:
        try:
            data = AESGCM(self._key).decrypt(_nonce(self._nonce), sealed, self.hash)
        except InvalidTag:
            raise SealError("it is sealed for another key") from None
        self._nonce += 1
        self._mix_hash(sealed)
        return data

    def _split(self) -> tuple[bytes, bytes]:
        if self._generation != _generation:
            raise SealError("it belongs to the process that began it: a fork of it would have the same keys")
        return _hkdf(self._chain, b"")


def _hkdf(chain: bytes, material: bytes) -> tuple[bytes, bytes]:
    """HKDF(chaining_key, input_key_material, 2)"""
    temporary = hmac.digest(chain, material, "sha256")
    first = hmac.digest(temporary, b"\x01", "sha256")
    return first, hmac.digest(temporary, first + b"\x02", "sha256")


class Initiator(_Symmetric):
    """The client's side. ``write``, then ``read``, once each. ``ephemeral``: for tests alone, as no two connections may
    have the same."""

    def __init__(self, own: bytes, server: bytes, prologue: bytes, *, ephemeral: bytes | None = None) -> None:
        super().__init__(own, prologue, server, ephemeral)
        self._server = server

    def write(self, payload: bytes = b"") -> bytes:
        """The first message. Raises ``SealError`` where the server's key is none."""
        public = self._ephemeral.public_key().public_bytes_raw()
        self._mix_hash(public)
        self._mix_key(self._ephemeral, self._server)
        own = self._encrypt_and_hash(self._own.public_key().public_bytes_raw())
        self._mix_key(self._own, self._server)
        return public + own + self._encrypt_and_hash(payload)

    def read(self, message: bytes) -> tuple[bytes, bytes, bytes]:
        """The second message: its payload, and the keys to seal and to open with. Raises ``SealError``."""
        if len(message) < SECOND_BYTES:
            raise SealError("it is too short")
        theirs, sealed = message[:KEY_BYTES], message[KEY_BYTES:]
        self._mix_hash(theirs)
        self._mix_key(self._ephemeral, theirs)
        self._mix_key(self._own, theirs)
        payload = self._decrypt_and_hash(sealed)
        sending, receiving = self._split()
        return payload, sending, receiving


class Responder(_Symmetric):
    """The server's side. ``read``, then ``write``, once each. ``client`` is the public key that the first message is
    of."""

    def __init__(self, own: bytes, prologue: bytes, *, ephemeral: bytes | None = None) -> None:
        super().__init__(own, prologue, None, ephemeral)
        self.client = b""
        self._theirs = b""

    def read(self, message: bytes) -> bytes:
        """The first message: its payload. Raises ``SealError``."""
        if len(message) < FIRST_BYTES:
            raise SealError("it is too short")
        theirs, own = message[:KEY_BYTES], message[KEY_BYTES : 2 * KEY_BYTES + TAG_BYTES]
        self._mix_hash(theirs)
        self._mix_key(self._own, theirs)
        client = self._decrypt_and_hash(own)
        self._mix_key(self._own, client)
        payload = self._decrypt_and_hash(message[2 * KEY_BYTES + TAG_BYTES :])
        self._theirs, self.client = theirs, client
        return payload

    def write(self, payload: bytes = b"") -> tuple[bytes, bytes, bytes]:
        """The second message, and the keys to seal and to open with."""
        public = self._ephemeral.public_key().public_bytes_raw()
        self._mix_hash(public)
        self._mix_key(self._ephemeral, self._theirs)
        self._mix_key(self._ephemeral, self.client)
        message = public + self._encrypt_and_hash(payload)
        receiving, sending = self._split()
        return message, sending, receiving
