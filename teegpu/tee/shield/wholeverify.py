"""Freivalds' check of a product of whole numbers that did not wrap: as sure as the one of ``verify``, with a tenth of
its multiplications.

What a shielded run goes on with is the product of its fixed-point values itself, once shares are put together or a pad
is taken off, and the fixed point is chosen such that it stays below 2**31 (``fixedpoint.room``). So the check is one
over the whole numbers: ``S·y = (S·W)·u`` for secret vectors ``S`` whose values are uniform among 2**b. A wrong ``y``
differs from ``W·u`` by whole numbers that are not all zero. Take one that is not: whatever the vector's other values
are, at most one of the 2**b that stand with it makes the sum zero. So a vector accepts it with a probability of 2**-b
at most, and k bits take k/b vectors, where modulo 2**32, in which an error of 2**31 shows to every second vector only,
they take k. What ``verify`` says about vectors that serve more than one run holds here too.

**Nothing is rounded.** ``y`` may be any int32, a liar's too, so with ``n`` of them and ``S`` below 2**(b-1) in size the
sum is at most n · 2**(30 + b): ``b`` is chosen for each length such that it stays below 2**53, where float64 is exact.
``S·W`` then fits an int32; ``u`` is the runner's own, below 2**22, and is multiplied with two halves of ``S·W``.
"""

from __future__ import annotations

import math
import secrets
from pathlib import Path
from typing import Final

import numpy as np
import torch

from teegpu import ring
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.tee.shield import fixedpoint
from teegpu.tee.shield.facts import Product
from teegpu.tee.shield.keyfiles import SEED, Parts, Progress, SecretVectors, name_of, sizes_of
from teegpu.tee.shield.verify import folded_of, streamed, vectors

_EXACT_BITS: Final = 53
_VALUE_BITS: Final = 31
_LOW_BITS: Final = 15
"""Of ``S·W``, in the lower of its halves."""
MOST_COLUMNS: Final = 2 ** (_EXACT_BITS - 22 - _LOW_BITS)
"""Of a matrix: sums of so many products of ``u`` with a half are exact."""
_BLOCK_VALUES: Final = 2**20
"""Values that are float64 at once: they stay in a processor's cache."""
_FOLD_VALUES: Final = 2**22


class WholeKeys(SecretVectors):
    """The secret vectors of a model for products that did not wrap."""

    kind = "whole verification keys"
    suffix = ".whole"

    def __init__(
        self,
        seed: bytes,
        checks: int,
        folded: dict[Product, torch.Tensor],
        rows: dict[Product, int],
        path: Path | None = None,
    ) -> None:
        """``folded``: ``S·W`` of each product, int32 (columns, vectors); ``rows``: those of its matrix."""
        self.checks = checks
        self.path = path
        self._lengths = rows
        self._vectors = {length: whole_vectors(seed, length, checks) for length in set(rows.values())}
        self._halves = {product: _halves(values) for product, values in folded.items()}

    def wrong_rows(self, product: Product, sent: torch.Tensor, received: torch.Tensor) -> list[int]:
        """The rows in which ``received``, int32 (rows, out), is not the product of ``sent``, int32 (rows, in), with the
        int8 matrix: empty where all is right. Raises ``KeyError`` for what is no product of the model.

        ``sent`` is what ``fixedpoint.encode`` gave. Of a row with larger values, which it makes of what is not finite,
        nothing is said: what becomes of it is not finite either.
        """
        chosen, halves = self._vectors[self._lengths[product]], self._halves[product]
        given = _product(received, chosen)
        wanted = _product(sent, halves)
        high, low = wanted.split(chosen.shape[1], dim=-1)
        # Whole numbers below 2**53, and where the sum of two is another one, its parts leave nothing of it.
        left = given.sub_(high).sub_(low)
        if not left.any():
            return []
        wrong = left.any(-1).nonzero().flatten()
        return wrong[(sent[wrong].to(torch.int64).abs() <= fixedpoint.MOST).all(-1)].tolist()

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return sum(values.nbytes for group in (self._vectors, self._halves) for values in group.values())

    @staticmethod
    def drawn(store: WeightStore, spec: ModelSpec, checks: int, progress: Progress) -> Parts:
        """A seed, and ``S·W`` of each product, int32 (columns, vectors)."""
        seed = secrets.token_bytes(ring.SEED_BYTES)
        made = {SEED: np.frombuffer(seed, np.uint8)}
        for product, weight in streamed(store, spec, progress):
            made[name_of(product)] = fold(weight, whole_vectors(seed, weight.shape[0], checks)).numpy()
        return made

    @classmethod
    def of(cls, parts: Parts, spec: ModelSpec, checks: int, path: Path | None = None) -> WholeKeys:
        return cls(parts[SEED].tobytes(), checks, folded_of(parts, spec), sizes_of(spec), path)


def bits_of(length: int, checks: int) -> tuple[int, int]:
    """How many vectors for products of ``length`` values, and of how many bits each of their values is. Together they
    have ``checks`` or more. Raises ``ValueError`` for products so long that no sum of them is exact."""
    most = _EXACT_BITS - _VALUE_BITS + 1 - math.ceil(math.log2(length))
    if most < 1:
        raise ValueError(f"sums of {length} values of 32 bits are beyond what float64 holds")
    count = -(-checks // most)
    return count, -(-checks // count)


def whole_vectors(seed: bytes, length: int, checks: int) -> torch.Tensor:
    """``S`` for products of ``length`` values, (length, vectors) of float64: whole numbers from -2**(b-1) to
    2**(b-1) - 1, uniform."""
    count, bits = bits_of(length, checks)
    powers = 2.0 ** torch.arange(bits, dtype=torch.float64)
    random = vectors(seed, length, count * bits).view(length, count, bits)
    return random.to(torch.float64) @ powers - 2.0 ** (bits - 1)


def fold(weight: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """``S·W``: int8 (rows, columns) and ``S`` (rows, vectors) of float64 → int32 (columns, vectors), exact. Raises
    ``ValueError`` for more columns than can be checked."""
    if weight.shape[1] > MOST_COLUMNS:
        raise ValueError(f"a matrix with {weight.shape[1]} columns can't be checked: {MOST_COLUMNS} at most")
    result = torch.zeros((weight.shape[1], chosen.shape[1]), dtype=torch.float64)
    step = max(1, _FOLD_VALUES // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        block = slice(start, start + step)
        result.addmm_(weight[block].to(torch.float64).t(), chosen[block])
    return result.to(torch.int32)


def _halves(folded: torch.Tensor) -> torch.Tensor:
    """int32 (columns, vectors) → (columns, 2 · vectors) of float64: what is above the lowest 15 bits, and then these,
    signed. Their sum is what was given."""
    whole = folded.to(torch.int64)
    half = 1 << (_LOW_BITS - 1)
    low = ((whole + half) & ((1 << _LOW_BITS) - 1)) - half
    return torch.cat([whole - low, low], dim=-1).to(torch.float64)


def _product(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """int32 (rows, n) and float64 (n, m) → float64 (rows, m), a few rows at a time."""
    step = max(1, _BLOCK_VALUES // max(1, values.shape[1]))
    if values.shape[0] <= step:
        return values.to(torch.float64) @ factor
    result = torch.empty((values.shape[0], factor.shape[1]), dtype=torch.float64)
    for start in range(0, values.shape[0], step):
        block = slice(start, start + step)
        torch.mm(values[block].to(torch.float64), factor, out=result[block])
    return result
