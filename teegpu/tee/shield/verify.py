"""Whether a server's products are right, at a small part of what they cost: Freivalds' check.

With ``S``, k secret random 0/1 vectors over a product's rows, and ``S·W`` computed once from the runner's own weights,
``y`` is accepted for ``u`` when ``S·y = (S·W)·u`` modulo 2**32. A wrong ``y`` passes with a probability of 2**-k at
most: ``y - W·u`` is not zero modulo 2**32, so each vector, drawn without the server's knowledge, gives zero for it with
a probability of 1/2 at most. It works on masked values, and says nothing about them. Where the product itself is at
hand, and not a masked one, ``wholeverify`` does it with a tenth of the multiplications.

**Why a later process may use the same vectors.** A right answer passes whatever the vectors are, so a server learns
nothing of them by passing. A wrong one that passes tells it less than it had to guess, and one that fails ends the run:
the vectors are then thrown away (``Keys.discard``). So over all runs, a wrong answer is accepted with a probability of
2**-k for each time that somebody tried. For the same reason one ``S`` serves all products, as far as each needs it.

All of it is arithmetic modulo 2**32, so nothing is ever rounded.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from teegpu import ring
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.tee.shield.facts import Product, products, quantised
from teegpu.tee.shield.keyfiles import SEED, Parts, Progress, SecretVectors, name_of, sizes_of
from teegpu.tee.shield.wrapping import multiply

_EXACT_FLOAT_ROWS: Final = 2**24 // ring.WEIGHT_MOST
"""Rows of int8 whose sums float32 holds."""


class Keys(SecretVectors):
    """The secret vectors of a model for masked products."""

    kind = "verification keys"
    suffix = ""

    def __init__(
        self, seed: bytes, checks: int, folded: dict[Product, torch.Tensor], rows: int, path: Path | None = None
    ) -> None:
        self.checks = checks
        self.path = path
        self._vectors = vectors(seed, rows, checks).t().to(torch.int32, memory_format=torch.contiguous_format)
        # Negated, so that for what is right both sides add up to nothing.
        self._folded = {product: values.t().neg().contiguous() for product, values in folded.items()}

    def wrong_rows(self, product: Product, sent: torch.Tensor, received: torch.Tensor) -> list[int]:
        """The rows in which ``received``, int32 (rows, out), is not the product of ``sent``, int32 (rows, in), with the
        int8 matrix: empty where all is right. Raises ``KeyError`` for what is no product of the model."""
        chosen = self._vectors[:, : received.shape[1]]
        difference = multiply(received, chosen.t()).add_(multiply(sent, self._folded[product].t()))
        return difference.any(-1).nonzero().flatten().tolist()

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return self._vectors.nbytes + sum(folded.nbytes for folded in self._folded.values())

    @staticmethod
    def drawn(store: WeightStore, spec: ModelSpec, checks: int, progress: Progress) -> Parts:
        """A seed, and ``S·W`` of each product, int32 (columns, checks)."""
        seed = secrets.token_bytes(ring.SEED_BYTES)
        chosen = vectors(seed, max(sizes_of(spec).values()), checks).to(torch.float32)
        made = {SEED: np.frombuffer(seed, np.uint8)}
        for product, weight in streamed(store, spec, progress):
            made[name_of(product)] = fold(weight, chosen).numpy()
        return made

    @classmethod
    def of(cls, parts: Parts, spec: ModelSpec, checks: int, path: Path | None = None) -> Keys:
        folded = folded_of(parts, spec)
        return cls(parts[SEED].tobytes(), checks, folded, max(sizes_of(spec).values()), path)


def folded_of(parts: Parts, spec: ModelSpec) -> dict[Product, torch.Tensor]:
    """``S·W`` of each product, int32 (columns, vectors)."""
    return {
        product: torch.from_numpy(parts[name_of(product)].view(np.int32)).view(spec.weights[product[0]][1], -1)
        for product in products(spec)
    }


def streamed(store: WeightStore, spec: ModelSpec, progress: Progress) -> Iterator[tuple[Product, torch.Tensor]]:
    """Every product with its int8 matrix, one in memory at a time."""
    sizes = sizes_of(spec)
    total = sum(rows * spec.weights[product[0]][1] for product, rows in sizes.items())
    done = 0
    for product in sizes:
        weight, _ = quantised(store, spec, product)
        yield product, weight
        done += weight.numel()
        progress(done / total)


def vectors(seed: bytes, rows: int, checks: int) -> torch.Tensor:
    """``S`` as (rows, checks) of 0 and 1, uint8: the bits of AES-256 in counter mode under ``seed``."""
    count = rows * checks
    stream = bytes(-(-count // 8))
    drawn = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor().update(stream)
    return torch.from_numpy(np.unpackbits(np.frombuffer(drawn, dtype=np.uint8), count=count)).view(rows, checks)


def fold(weight: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """``S·W``: int8 (rows, columns) and 0/1 (rows or more, checks) in float32 → int32 (columns, checks), exact."""
    result = torch.zeros((weight.shape[1], chosen.shape[1]), dtype=torch.int32)
    step = min(_EXACT_FLOAT_ROWS, max(1, 2**22 // weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        block = slice(start, min(start + step, weight.shape[0]))
        result += (weight[block].to(torch.float32).t() @ chosen[block]).to(torch.int32)
    return result


def soundness(checks: int) -> float:
    """The probability with which a wrong product is accepted, at most."""
    return math.ldexp(1.0, -checks)
