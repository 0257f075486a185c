"""Exact linear algebra modulo 2**32, which both sides share: what makes masked products possible.

A mask over floats is no one-time pad: a small one leaks, a large one rounds the message away. So a shielded product is
a product of whole numbers modulo 2**32. Weights are int8 with one scale per output row, made by a quantiser that gives
the same bits everywhere; activations are int32 fixed point, masked by adding uniform int32 values; results are int32.

**How it is computed on a CPU.** An int8 weight is at most 127 and an int32 operand at most 2**31 in size, so a sum over
``in`` of their products stays below ``in · 127 · 2**31``, which a float64 holds exactly (2**53) up to ``in = 33,025``.
One float64 product is therefore exact, at half of float32's speed and on any processor. Longer rows are cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

SEED_BYTES: Final = 32
"""A key of AES-256."""

WEIGHT_MOST: Final = 127
_EXACT_COLUMNS: Final = 2**53 // (WEIGHT_MOST * 2**31)
"""Columns whose products a float64 sums exactly, whatever the int32 operand."""


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` (out, in), any float dtype → int8 (out, in) and the scale of each row, fp32 (out,).

    ``weight ≈ int8 · scale``. Every step is correctly rounded by IEEE 754, so all machines get the same bits. A row of
    zeros has the scale 1.
    """
    values = weight.to(device="cpu", dtype=torch.float32)
    largest = torch.maximum(values.amax(-1), values.amin(-1).neg_())
    scale = torch.where(largest > 0, largest / WEIGHT_MOST, torch.ones_like(largest))
    return (values / scale[:, None]).round_().clamp_(-WEIGHT_MOST, WEIGHT_MOST).to(torch.int8), scale


def expand(seed: bytes, rows: int, columns: int) -> torch.Tensor:
    """Uniform int32 (rows, columns): the key stream of AES-256 in counter mode under ``seed`` (32 bytes).

    The stream starts at counter 0, so a seed must not be used for two different things. Raises ``ValueError`` for a
    seed of another length.
    """
    stream = np.zeros(rows * columns * 4, dtype=np.uint8)
    encryptor = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
    view = memoryview(stream)
    written = encryptor.update_into(view, view)
    if written != stream.nbytes:
        raise RuntimeError(f"a stream of {stream.nbytes} bytes ended after {written}")
    return torch.from_numpy(stream.view(np.int32)).view(rows, columns)


@dataclass(frozen=True, slots=True)
class Seed:
    """Stands for the uniform int32 tensor ``expand(key, *shape)`` in ``shape[0] * shape[1] * 4`` bytes' place.

    Raises ``ValueError`` for a key that is not of ``SEED_BYTES``."""

    key: bytes = field(repr=False)
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.key) != SEED_BYTES:
            raise ValueError(f"a seed is a key of {SEED_BYTES} bytes, not {len(self.key)}")

    def expand(self) -> torch.Tensor:
        return expand(self.key, *self.shape)


Operand = torch.Tensor | Seed
"""An input of a program: a tensor, or what it is expanded from."""


def wrap(values: torch.Tensor) -> torch.Tensor:
    """Whole numbers in float64, at most 2**53 in size → int32 modulo 2**32."""
    return values.to(torch.int64).to(torch.int32)


class RingMatrix:
    """An int8 weight (out, in), ready for products modulo 2**32 on the CPU."""

    def __init__(self, weight: torch.Tensor) -> None:
        if weight.dtype != torch.int8 or weight.dim() != 2:
            raise TypeError(f"a ring matrix is int8 (out, in), not {weight.dtype} {tuple(weight.shape)}")
        self.weight = weight
        self.shape = (weight.shape[0], weight.shape[1])

    def product(self, operand: torch.Tensor) -> torch.Tensor:
        """``operand @ weight.T`` modulo 2**32: int32 (rows, in) → int32 (rows, out)."""
        result: torch.Tensor | None = None
        for start in range(0, self.shape[1], _EXACT_COLUMNS):
            columns = slice(start, start + _EXACT_COLUMNS)
            part = wrap(operand[:, columns].to(torch.float64) @ self.weight[:, columns].to(torch.float64).t())
            result = part if result is None else result.add_(part)
        if result is None:
            raise ValueError("a matrix without columns has no products")
        return result

    def rows(self, start: int, stop: int) -> RingMatrix:
        """Rows ``start`` to ``stop`` of the weight, as a matrix that shares their memory."""
        return RingMatrix(self.weight[start:stop])

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


def digest(weight: torch.Tensor, scale: torch.Tensor) -> bytes:
    """SHA-256 of an int8 weight and its scales, for ``hello``: both sides must have quantised alike."""
    state = hashlib.sha256(repr(tuple(weight.shape)).encode())
    state.update(memoryview(weight.contiguous().numpy()).cast("B"))
    state.update(memoryview(scale.contiguous().numpy()).cast("B"))
    return state.digest()


def combined(digests: Iterable[tuple[str, bytes]]) -> str:
    """Hex SHA-256 over the names and ``digest``s of several weights: of all matrices that a server holds for shielded
    products, in the order of ``ModelSpec.weights``. The server tells it, the runner holds it against its own."""
    state = hashlib.sha256()
    for name, value in digests:
        state.update(f"{name}\0".encode())
        state.update(value)
    return state.hexdigest()
