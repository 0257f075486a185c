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

**Nothing is rounded.** ``y`` may be any int32, a liar's too, so with ``n`` of them and ``S`` below 2**(b-1) in size the
sum is at most n · 2**(30 + b): ``b`` is chosen for each length such that it stays below 2**53, where float64 is exact.
``S·W`` then fits an int32; ``u`` is the runner's own, below 2**22, and is multiplied with two halves of ``S·W``.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from teegpu import ring
from teegpu.shield.quantised import Linear, Reader

_EXACT_BITS: Final = 53
_VALUE_BITS: Final = 31
_LOW_BITS: Final = 15
"""Of ``S·W``, in the lower of its halves."""
MOST_COLUMNS: Final = 2 ** (_EXACT_BITS - 22 - _LOW_BITS)
"""Of a matrix: sums of so many products of ``u`` with a half are exact."""
_MOST_BITS: Final = 16
"""Of a vector's values: float32 holds their products with int8, and sums of some."""
_BLOCK_VALUES: Final = 2**20
"""Values that are float64 at once: they stay in a processor's cache."""


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
        self._vectors: dict[int, torch.Tensor] = {}
        self._lengths: dict[Linear, int] = {}
        self._halves: dict[Linear, torch.Tensor] = {}

    def add(self, linear: Linear, weight: torch.Tensor, _: torch.Tensor) -> None:
        """Takes in an int8 matrix (rows, columns). Raises ``ValueError`` for one too large to be checked."""
        length = weight.shape[0]
        if length not in self._vectors:
            self._vectors[length] = vectors(self._seed, length, self.bits)
        self._lengths[linear] = length
        self._halves[linear] = _halves(fold(weight, self._vectors[length]))

    def wrong_rows(self, linear: Linear, sent: torch.Tensor, received: torch.Tensor) -> list[int]:
        """The rows in which ``received``, int32 (rows, out), is not the product of ``sent``, int32 (rows, in), with the
        int8 matrix: empty where all is right. ``sent`` is what ``fixedpoint.encode`` gave.

        Where there are some, the vectors that found them are not used again. Raises ``KeyError`` for what is no matrix
        of the model.
        """
        if not self._halves:
            self._stream(self.add)
        chosen, halves = self._vectors[self._lengths[linear]], self._halves[linear]
        high, low = _product(sent, halves).split(chosen.shape[0], dim=-1)
        # Whole numbers below 2**53, and where the difference of two is another one, it is not what is left.
        left = _product(received, chosen).sub_(high)
        if torch.equal(left, low):
            return []
        self.draw()
        wrong: list[int] = (left != low).any(-1).nonzero().flatten().tolist()
        return wrong

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return sum(values.nbytes for group in (self._vectors, self._halves) for values in group.values())


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
    """``S·W``: int8 (rows, columns) and ``S`` (vectors, rows) of float64 → int32 (vectors, columns), exact. Raises
    ``ValueError`` for more columns than can be checked.

    So many rows at once that float32 holds their sums: that takes a sixth of float64's time.
    """
    if weight.shape[1] > MOST_COLUMNS:
        raise ValueError(f"a matrix with {weight.shape[1]} columns can't be checked: {MOST_COLUMNS} at most")
    exact = 2**24 // (128 * max(1, int(chosen.abs().max())))
    left = chosen.to(torch.float32)
    result = torch.zeros((chosen.shape[0], weight.shape[1]), dtype=torch.float64)
    for start in range(0, weight.shape[0], exact):
        block = slice(start, start + exact)
        result += left[:, block] @ weight[block].to(torch.float32)
    return result.to(torch.int32)


def _halves(folded: torch.Tensor) -> torch.Tensor:
    """int32 (vectors, columns) → (2 · vectors, columns) of float64: what is above the lowest 15 bits, and then these,
    signed. Their sum is what was given."""
    whole = folded.to(torch.int64)
    half = 1 << (_LOW_BITS - 1)
    low = ((whole + half) & ((1 << _LOW_BITS) - 1)) - half
    return torch.cat([whole - low, low]).to(torch.float64)


def _product(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """int32 (rows, n) and float64 (m, n) → float64 (rows, m), a few rows at a time. ``factor`` lies as it does because
    with so few columns a product with its transpose takes twice the time."""
    step = max(1, _BLOCK_VALUES // max(1, values.shape[1]))
    if values.shape[0] <= step:
        return torch.nn.functional.linear(values.to(torch.float64), factor)
    result = torch.empty((values.shape[0], factor.shape[0]), dtype=torch.float64)
    for start in range(0, values.shape[0], step):
        block = slice(start, start + step)
        torch.mm(values[block].to(torch.float64), factor.t(), out=result[block])
    return result
