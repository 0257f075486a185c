"""Freivalds' check: whether a server's product is right, at a small part of what the product costs.

What a run goes on with is the product of its fixed-point values itself, once shares are put together or a pad is taken
off, and the fixed point is chosen such that it stays below 2**31 (``fixedpoint.room``). So the check is one over the
whole numbers: ``S·y = (S·W)·u`` for secret vectors ``S`` whose values are uniform among 2**b. A wrong ``y`` differs
from ``W·u`` by whole numbers that are not all zero. Take one that is not: whatever the vector's other values are, at
most one of the 2**b that stand with it makes the sum zero. So a vector accepts it with a probability of 2**-b at most,
and k bits take k/b vectors.

**How long vectors serve.** A right answer passes whatever they are, so a server learns nothing of them by passing. A
wrong one that passes tells it less than it had to guess, and after one that fails others are drawn. They are drawn for
each process, from the operating system's randomness, and are in its memory alone. So a wrong answer is accepted with a
probability of 2**-k for each time that somebody tried. For the same reason one ``S`` serves all matrices of a length.

**Nothing is rounded.** ``y`` may be any int32, a liar's too, so with ``n`` of them and ``S`` of 2**(b-1) in size at
most, any sum of their products is at most n · 2**(30 + b): ``b`` is chosen for each length such that this is 2**53 at
most, up to which float64 is exact. ``(S·W)·u`` keeps to the same bound: whichever part ``u'`` of ``u`` was summed so
far, that is ``S·(W·u')``, and ``u'`` is no longer than ``u``, so ``W·u'`` is below 2**31 as well (``fixedpoint.room``).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from teegpu import ring
from teegpu.blocks import blocks, spread
from teegpu.shield.quantised import Linear, Reader

_EXACT_BITS: Final = 53
_VALUE_BITS: Final = 31
_MOST_BITS: Final = 16
"""Of a vector's values: float32 holds their products with int8, and sums of some."""
_ONE_THREAD: Final = 2**18
"""Products of two values up to which OpenBLAS, which numpy carries, keeps to the thread that asks."""

Floats = npt.NDArray[np.float64]


class Checks:
    """The secret vectors of a run: a wrong product passes with a probability of 2**-``bits`` at most.

    ``add`` is a ``Reader``: once it has seen all matrices, products can be checked. ``stream`` shows it all of them
    again, when other vectors have to be drawn.
    """

    def __init__(self, bits: int, stream: Callable[[Reader], None]) -> None:
        self.bits = bits
        self._stream = stream
        self.draw()

    def draw(self) -> None:
        """Forgets the vectors and draws others."""
        self._seed = secrets.token_bytes(ring.SEED_BYTES)
        self._vectors: dict[int, Floats] = {}
        self._lengths: dict[Linear, int] = {}
        self._folded: dict[Linear, Floats] = {}

    def add(self, linear: Linear, weight: torch.Tensor, _: torch.Tensor) -> None:
        """Takes in an int8 matrix (rows, columns). Raises ``ValueError`` for one with too many rows to be checked."""
        length = weight.shape[0]
        if length not in self._vectors:
            self._vectors[length] = vectors(self._seed, length, self.bits).numpy()
        self._lengths[linear] = length
        self._folded[linear] = fold(weight, torch.from_numpy(self._vectors[length])).numpy()

    def prepare(self, linear: Linear, sent: torch.Tensor) -> Callable[[torch.Tensor], list[int]]:
        """What finds the rows in which an int32 (rows, out) is not the product of ``sent``, int32 (rows, in), with the
        int8 matrix: none where all is right. ``sent`` is what ``fixedpoint.encode`` gave; its half of the work is done
        here, so that it can be done while the product is waited for.

        Where there are some, the vectors that found them are not used again. Raises ``KeyError`` for what is no matrix
        of the model.
        """
        if not self._folded:
            self._stream(self.add)
        chosen = self._vectors[self._lengths[linear]]
        expected = _product(sent, self._folded[linear])

        def wrong_rows(received: torch.Tensor) -> list[int]:
            right = _product(received, chosen) == expected
            if right.all():
                return []
            self.draw()
            found: list[int] = (~right.all(-1)).nonzero()[0].tolist()
            return found

        return wrong_rows

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return sum(values.nbytes for group in (self._vectors, self._folded) for values in group.values())


def bits_of(length: int, checks: int) -> tuple[int, int]:
    """How many vectors for products of ``length`` values, and of how many bits each of their values is. Together they
    have ``checks`` or more. Raises ``ValueError`` for products so long that no sum of them is exact."""
    most = min(_MOST_BITS, _EXACT_BITS - _VALUE_BITS + 1 - math.ceil(math.log2(length)))
    if most < 1:
        raise ValueError(f"sums of {length} values of 32 bits are beyond what float64 holds")
    count = -(-checks // most)
    return count, -(-checks // count)


def vectors(seed: bytes, length: int, checks: int) -> torch.Tensor:
    """``S`` for products of ``length`` values, (vectors, length) of float64: whole numbers from -2**(b-1) to
    2**(b-1) - 1, uniform."""
    count, bits = bits_of(length, checks)
    powers = 2.0 ** torch.arange(bits, dtype=torch.float64)
    random = _random_bits(seed, count * length * bits).view(count, length, bits)
    return random.to(torch.float64) @ powers - 2.0 ** (bits - 1)


def _random_bits(seed: bytes, count: int) -> torch.Tensor:
    """Of AES-256 in counter mode under ``seed``: (count,) of 0 and 1, uint8."""
    stream = bytes(-(-count // 8))
    drawn = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor().update(stream)
    return torch.from_numpy(np.unpackbits(np.frombuffer(drawn, dtype=np.uint8), count=count))


def fold(weight: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """``S·W``: int8 (rows, columns) and ``S`` (vectors, rows) of float64 → float64 (vectors, columns), exact.

    So many rows at once that float32 holds their sums: that takes a sixth of float64's time.
    """
    exact = 2**24 // (128 * max(1, int(chosen.abs().max())))
    left = chosen.to(torch.float32)
    result = torch.zeros((chosen.shape[0], weight.shape[1]), dtype=torch.float64)
    for start in range(0, weight.shape[0], exact):
        block = slice(start, start + exact)
        result += left[:, block] @ weight[block].to(torch.float32)
    return result


def _product(values: torch.Tensor, factor: Floats) -> Floats:
    """int32 (rows, n) and float64 (m, n) → float64 (rows, m), exact. numpy's BLAS multiplies with so few columns in a
    third of the time of torch's."""
    whole, (rows, columns) = values.numpy(), values.shape
    at_once = _ONE_THREAD // factor.shape[0]
    if rows * columns <= at_once:
        return whole.astype(np.float64).dot(factor.T)
    result = np.zeros((rows, factor.shape[0]))

    def work(part: slice) -> None:
        for block in blocks(part, columns, at_once):
            for piece in blocks(slice(0, columns), 1, at_once):
                result[block] += whole[block, piece].astype(np.float64).dot(factor[:, piece].T)

    spread(work, rows, columns)
    return result
