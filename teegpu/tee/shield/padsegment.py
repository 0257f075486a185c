"""A file of pads: a number of leaves, of so many tokens each, sealed so that a chunk of tokens is read at one go.

    header (4096): magic, the pool's high-water mark (8), length, JSON, salt (32)
    for each product:  for each leaf:  W·r of its tokens, int32 (tokens, out), sealed; tag (16)

A pad ``r`` is not stored: it is the key stream of AES-256 under a seed that follows from the leaf's key (see
``padledger``), as the cipher's key does. The tokens of one product stand together, so what a chunk needs of it is one
read. The header is part of what each tag covers.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from teegpu import ring
from teegpu.tee.shield import sealed
from teegpu.tee.shield.facts import Product

LEAF_TOKENS: Final = 8
"""Tokens that are claimed and sealed together: what a run has claimed and not used of them is lost."""

SUFFIX: Final = ".pads"

_MAGIC: Final = b"teegpu pads 1\n\0\0"
_HEADER_BYTES: Final = 4096
_FIXED: Final = struct.Struct(f"<{len(_MAGIC)}sQI")
_MARK_AT: Final = len(_MAGIC)
_SALT_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Matrix:
    """A product that pads are made for: int32 (tokens, ``rows``) of the product with pads (tokens, ``columns``)."""

    product: Product
    rows: int
    columns: int

    @property
    def block_bytes(self) -> int:
        """Of one leaf in the file."""
        return LEAF_TOKENS * self.rows * 4 + sealed.TAG_BYTES


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in a file with so many ``leaves`` for ``matrices``, in their order."""

    matrices: tuple[Matrix, ...]
    leaves: int

    def offset(self, index: int) -> int:
        """Of the first leaf of the ``index``-th matrix."""
        return _HEADER_BYTES + self.leaves * sum(matrix.block_bytes for matrix in self.matrices[:index])

    @property
    def nbytes(self) -> int:
        return self.offset(len(self.matrices))


def file_name(kind: str, start: int, leaves: int) -> str:
    """A segment's name tells its place, so that the pool needs no index that could be wrong."""
    return f"{kind}-{start:010d}-{leaves}{SUFFIX}"


def parse_name(name: str) -> tuple[str, int, int] | None:
    """(kind, first leaf, leaves), or None for another file."""
    parts = name.removesuffix(SUFFIX).split("-")
    if not name.endswith(SUFFIX) or len(parts) != 3 or not (parts[1].isdecimal() and parts[2].isdecimal()):
        return None
    return parts[0], int(parts[1]), int(parts[2])


class Leaf:
    """One leaf that was claimed: it alone can read its pads."""

    __slots__ = ("_cipher", "_key", "index", "segment")

    def __init__(self, segment: Segment, index: int, key: bytes) -> None:
        self.segment = segment
        self.index = index
        self._key = key
        self._cipher = AESGCM(_derived(key, b"seal"))

    def pads(self, place: int) -> torch.Tensor:
        """``r`` of the product at ``place`` in the layout: uniform int32 (tokens, columns)."""
        return pads_of(self._key, place, self.segment.layout.matrices[place].columns)

    def open(self, place: int, block: memoryview, out: memoryview) -> None:
        """Decrypts ``block``, which stands in the file for the product at ``place``, into ``out``. Raises
        ``DamagedError``."""
        try:
            self._cipher.decrypt_into(_nonce(place), block, self.segment.bound_to, out)
        except InvalidTag:
            raise sealed.DamagedError(self.segment.path) from None


def pads_of(key: bytes, place: int, columns: int) -> torch.Tensor:
    """The pads of a leaf with ``key`` for the product at ``place``: int32 (tokens, columns)."""
    return ring.expand(_derived(key, b"pad" + place.to_bytes(4, "big")), LEAF_TOKENS, columns)


def _derived(key: bytes, purpose: bytes) -> bytes:
    return hmac.digest(key, purpose, hashlib.sha256)


def _nonce(place: int) -> bytes:
    # Each leaf has a key of its own, and seals one block for each product.
    return place.to_bytes(12, "big")


def _header(pool: str, model: str, kind: str, start: int, layout: Layout, salt: bytes) -> bytes:
    shapes = [["+".join(matrix.product), matrix.rows, matrix.columns] for matrix in layout.matrices]
    shape_digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
    content: dict[str, Any] = {"pool": pool, "model": model, "kind": kind, "start": start, "leaves": layout.leaves}
    content |= {"leaf_tokens": LEAF_TOKENS, "shapes": shape_digest, "salt": salt.hex()}
    return json.dumps(content, sort_keys=True).encode()


class Segment:
    """A segment, open for reading as long as anybody refers to it, also when its file was removed.

    Raises ``OSError``, ``ShieldError`` where others can read it, and ``DamagedError`` where it is not that segment.
    """

    def __init__(self, path: Path, pool: str, model: str, matrices: tuple[Matrix, ...]) -> None:
        self._file = -1
        parsed = parse_name(path.name)
        if parsed is None:
            raise ValueError(f"{path.name} is no segment")
        kind, self.start, leaves = parsed
        self.path = path
        self.layout = Layout(matrices, leaves)
        self._file = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        sealed.check_private(path, self._file)
        content = os.pread(self._file, _HEADER_BYTES, 0)
        magic, self.mark, length = _FIXED.unpack_from(content.ljust(_FIXED.size, b"\0"))
        header = content[_FIXED.size : _FIXED.size + length]
        try:
            self.salt = bytes.fromhex(json.loads(header)["salt"])
        except (ValueError, KeyError, TypeError):
            raise sealed.DamagedError(path) from None
        expected = _header(pool, model, kind, self.start, self.layout, self.salt)
        if magic != _MAGIC or header != expected or os.fstat(self._file).st_size != self.layout.nbytes:
            raise sealed.DamagedError(path)
        self.bound_to = hashlib.sha256(header).digest()

    @property
    def stop(self) -> int:
        """The first leaf after it."""
        return self.start + self.layout.leaves

    def raise_mark(self, leaf: int) -> None:
        """Notes that all leaves before ``leaf`` are spent: a ledger that says less is an old one. Raises
        ``OSError``."""
        os.pwrite(self._file, struct.pack("<Q", leaf), _MARK_AT)
        os.fdatasync(self._file)
        self.mark = leaf

    def read(self, place: int, index: int, count: int) -> memoryview:
        """The sealed blocks of ``count`` leaves from ``index`` on, of the product at ``place``. Raises
        ``DamagedError``."""
        size = self.layout.matrices[place].block_bytes
        block = memoryview(bytearray(count * size))
        if os.preadv(self._file, [block], self.layout.offset(place) + index * size) != block.nbytes:
            raise sealed.DamagedError(self.path)
        return block

    def __del__(self) -> None:
        """A mask may be the last to need it, long after its pads were claimed."""
        if self._file >= 0:
            os.close(self._file)


class SegmentWriter:
    """Makes a segment of ``len(keys)`` leaves: ``put`` once for each product, in their order, then ``finish``.

    Its whole size is reserved at once, so a full disk is noticed before the work. Raises ``OSError``.
    """

    def __init__(
        self, folder: Path, pool: str, model: str, kind: str, start: int, matrices: tuple[Matrix, ...], leaves: int
    ) -> None:
        self.salt = os.urandom(_SALT_BYTES)
        self.layout = Layout(matrices, leaves)
        self._path = folder / file_name(kind, start, leaves)
        self._partial = folder / f".{self._path.name}~"
        header = _header(pool, model, kind, start, self.layout, self.salt)
        self._bound_to = hashlib.sha256(header).digest()
        self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(self._file, 0, self.layout.nbytes)
            os.pwrite(self._file, _FIXED.pack(_MAGIC, 0, len(header)) + header, 0)
        except BaseException:
            self.abandon()
            raise

    def put(self, place: int, keys: Sequence[bytes], products: torch.Tensor) -> None:
        """``W·r`` of all leaves for the product at ``place``, int32 (leaves · tokens, out)."""
        size = self.layout.matrices[place].block_bytes
        plain = memoryview(np.ascontiguousarray(products.numpy())).cast("B")
        block = memoryview(bytearray(len(keys) * size))
        each = size - sealed.TAG_BYTES
        for number, key in enumerate(keys):
            into = block[number * size : (number + 1) * size]
            part = plain[number * each : (number + 1) * each]
            AESGCM(_derived(key, b"seal")).encrypt_into(_nonce(place), part, self._bound_to, into)
        offset = self.layout.offset(place)
        while block.nbytes:
            written = os.pwrite(self._file, block, offset)
            block, offset = block[written:], offset + written

    def finish(self) -> None:
        """From now on it is part of the pool."""
        os.fsync(self._file)
        os.rename(self._partial, self._path)
        sealed.flush_folder(self._path.parent)
        os.close(self._file)
        self._file = -1

    def abandon(self) -> None:
        """Removes what there is of it, where it was not finished."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._partial.unlink(missing_ok=True)
