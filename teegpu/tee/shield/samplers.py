"""Random values for learning with errors: ternary secrets and discrete Gaussian errors, from AES-256 in counter mode.

Every sampler gets a fresh key from the operating system for each use, so a process that forks, or one that was copied
while it ran, does not draw the same values twice. They are vectorised and not constant in time: who can measure the
runner's time to the nanosecond learns how many draws had to be repeated.
"""

from __future__ import annotations

import functools
import os
from decimal import Decimal, localcontext
from typing import Any, Final

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

SIGMA: Final = 6.4
"""Standard deviation of errors, which is the parameter of the discrete Gaussian too: they agree far beyond float64."""

_TAIL: Final = 96
"""Errors are at most this, 15 σ: what is cut off has a probability of 2**-160."""
_DIGITS: Final = 5
"""Ternary digits in a byte below 3**5 = 243."""
_UNSURE: Final = 127
"""Marks draws of 16 bits that could become either of two values: they take 48 bits more."""

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Stream:
    """The key stream of AES-256 in counter mode under a key of its own; ``key`` None: a fresh one."""

    def __init__(self, key: bytes | None = None) -> None:
        self._encryptor = Cipher(algorithms.AES256(key or os.urandom(32)), modes.CTR(bytes(16))).encryptor()

    def take(self, count: int) -> _Bytes:
        """The next ``count`` bytes."""
        drawn = np.zeros(count, dtype=np.uint8)
        view = memoryview(drawn)
        self._encryptor.update_into(view, view)
        return drawn


def ternary(stream: Stream, rows: int, columns: int) -> torch.Tensor:
    """Uniform in -1, 0 and 1: int32 (rows, columns)."""
    table = _ternary_table()
    missing = rows * columns
    parts = []
    while missing > 0:
        drawn = stream.take(missing // _DIGITS * 256 // 243 + 64)
        digits = table[drawn[drawn < len(table)]].reshape(-1)[:missing]
        parts.append(digits)
        missing -= digits.size
    values = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return torch.from_numpy(values.astype(np.int32)).view(rows, columns)


def gaussian(stream: Stream, rows: int, columns: int) -> torch.Tensor:
    """Discrete Gaussian with parameter ``SIGMA``: int32 (rows, columns).

    By inversion of the distribution in 64 bits, so its statistical distance from the ideal one is below 2**-56 a value.
    Nearly always the first 16 bits decide, by a table.
    """
    table, thresholds = _gaussian_tables()
    drawn = stream.take(2 * rows * columns).view(np.uint16)
    values = table[drawn].astype(np.int32)
    (unsure,) = np.nonzero(values == _UNSURE)
    if unsure.size:
        rest = np.zeros((unsure.size, 8), dtype=np.uint8)
        rest[:, :6] = stream.take(6 * unsure.size).reshape(-1, 6)
        whole = (drawn[unsure].astype(np.uint64) << np.uint64(48)) | rest.view(np.uint64).reshape(-1)
        values[unsure] = np.searchsorted(thresholds, whole, side="right").astype(np.int32) - _TAIL
    return torch.from_numpy(values).view(rows, columns)


@functools.cache
def _ternary_table() -> np.ndarray[Any, np.dtype[np.int8]]:
    numbers = np.arange(3**_DIGITS)
    return np.stack([numbers // 3**place % 3 - 1 for place in range(_DIGITS)], axis=-1).astype(np.int8)


@functools.cache
def _gaussian_tables() -> tuple[np.ndarray[Any, np.dtype[np.int8]], np.ndarray[Any, np.dtype[np.uint64]]]:
    """The value that each 16 bits decide, or ``_UNSURE``; and where each value but the first begins, of 2**64."""
    with localcontext() as context:
        context.prec = 60
        sigma = Decimal(str(SIGMA))
        weights = [(-(Decimal(k) ** 2) / (2 * sigma**2)).exp() for k in range(-_TAIL, _TAIL + 1)]
        total = sum(weights)
        starts, cumulated = [], Decimal(0)
        for weight in weights[:-1]:
            cumulated += weight
            starts.append(int(cumulated / total * 2**64))
    # The last values begin at 2**64 but for less than 64 bits can tell: they are not drawn.
    thresholds = np.array([min(start, 2**64 - 1) for start in starts], dtype=np.uint64)
    first = np.arange(2**16, dtype=np.uint64) << np.uint64(48)
    low = np.searchsorted(thresholds, first, side="right")
    high = np.searchsorted(thresholds, first | np.uint64(2**48 - 1), side="right")
    return np.where(low == high, low - _TAIL, _UNSURE).astype(np.int8), thresholds
