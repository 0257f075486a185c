"""Exact linear algebra modulo 2**32, which both sides share: what makes masked products possible.

A mask over floats is no one-time pad: a small one leaks, a large one rounds the message away. So a shielded product is
a product of whole numbers modulo 2**32. Weights are int8 with one scale per output row, made by a quantiser that gives
the same bits everywhere; activations are int32 fixed point, masked by adding uniform int32 values; results are int32.

How products are computed is in ``ringkernels``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from teegpu import ringkernels
from teegpu.blocks import blocks, spread

SEED_BYTES: Final = 32
"""A key of AES-256."""

_AES_BYTES: Final = 16
"""A block of the key stream."""

_ZEROS: Final = memoryview(bytes(2**18))
"""What a key stream is the encryption of, a piece at a time: they stay in the processor's cache."""

WEIGHT_MOST: Final = 127

_BLOCK_VALUES: Final = 2**22
"""Values that are quantised at once."""


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` (out, in), any float dtype → int8 (out, in) and the scale of each row, fp32 (out,).

    ``weight ≈ int8 · scale``. Every step is correctly rounded by IEEE 754, so all machines get the same bits. A row of
    zeros has the scale 1, one that is not finite a scale that is not.
    """
    values = weight.to(device="cpu", dtype=torch.float32)
    largest = torch.maximum(values.amax(-1), values.amin(-1).neg_())
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / WEIGHT_MOST)
    return (values / scale[:, None]).round_().clamp_(-WEIGHT_MOST, WEIGHT_MOST).to(torch.int8), scale


def quantise_into(values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Fills ``weight``, int8 (out, in), and ``scale``, fp32 (out,), with what ``quantise`` makes of ``values``
    (out, in): a block of rows at a time, since a whole lm_head in fp32 would take gigabytes."""
    step = max(1, _BLOCK_VALUES // values.shape[1])
    for first in range(0, values.shape[0], step):
        block = slice(first, first + step)
        weight[block], scale[block] = quantise(values[block])


def expand(seed: bytes, rows: int, columns: int, *, first: int = 0, plus: torch.Tensor | None = None) -> torch.Tensor:
    """Uniform int32 (rows, columns): the key stream of AES-256 in counter mode under ``seed`` (32 bytes), from row
    ``first`` on. With ``plus``, int32 (rows, columns), this is added to it modulo 2**32.

    The stream starts at counter 0, so a seed must not be used for two different things. Raises ``ValueError`` for a
    seed of another length.
    """
    values = np.empty((rows, columns), dtype=np.int32)
    added = None if plus is None else plus.numpy()

    def work(part: slice) -> None:
        counter, skipped = divmod((first + part.start) * columns * 4, _AES_BYTES)
        encryptor = Cipher(algorithms.AES256(seed), modes.CTR(counter.to_bytes(_AES_BYTES, "big"))).encryptor()
        encryptor.update(bytes(skipped))
        for block in blocks(part, columns):
            stream = memoryview(values[block]).cast("B")
            for start in range(0, len(stream), len(_ZEROS)):
                piece = stream[start : start + len(_ZEROS)]
                if encryptor.update_into(_ZEROS[: len(piece)], piece) != len(piece):
                    raise RuntimeError(f"a stream of {len(piece)} bytes ended before")
            if added is not None:
                np.add(values[block], added[block], out=values[block])

    spread(work, rows, columns)
    return torch.from_numpy(values)


@dataclass(frozen=True, slots=True)
class Seed:
    """Stands for the uniform int32 tensor ``expand(key, *shape)`` in ``shape[0] * shape[1] * 4`` bytes' place.

    Raises ``ValueError`` for a key that is not of ``SEED_BYTES``."""

    key: bytes = field(repr=False)
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.key) != SEED_BYTES:
            raise ValueError(f"a seed is a key of {SEED_BYTES} bytes, not {len(self.key)}")

    def expand(self, plus: torch.Tensor | None = None) -> torch.Tensor:
        return expand(self.key, *self.shape, plus=plus)


Operand = torch.Tensor | Seed
"""An input of a program: a tensor, or what it is expanded from."""


def add(one: torch.Tensor, other: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Sums of int32 modulo 2**32, in this thread: to wake torch's takes longer than adding what a cache holds."""
    return torch.from_numpy(np.add(one.numpy(), other.numpy(), out=None if out is None else out.numpy()))


def subtract(one: torch.Tensor, other: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Differences, as ``add`` makes sums."""
    return torch.from_numpy(np.subtract(one.numpy(), other.numpy(), out=None if out is None else out.numpy()))


def wrap(values: torch.Tensor) -> torch.Tensor:
    """Whole numbers in float64, at most 2**53 in size → int32 modulo 2**32."""
    return values.to(torch.int64).to(torch.int32)


class RingMatrix:
    """An int8 weight (out, in), ready for products modulo 2**32 on its device.

    ``roomy``: on a CPU it may take 4 bytes per value in place of 1, where products of few rows are quicker then.
    """

    def __init__(self, weight: torch.Tensor, *, roomy: bool = False) -> None:
        if weight.dtype != torch.int8 or weight.dim() != 2 or not weight.numel():
            raise TypeError(f"a ring matrix is int8 (out, in), not {weight.dtype} {tuple(weight.shape)}")
        self.shape = (weight.shape[0], weight.shape[1])
        self._narrow: torch.Tensor | None = ringkernels.padded(weight) if weight.is_cuda else weight
        self._wide: torch.Tensor | None = None
        if weight.is_cuda:
            ringkernels.measured(weight.device)  # now, so that no product waits until kernels are compiled
        elif roomy:
            ways = ringkernels.measured(weight.device).values()
            self._wide = weight.to(torch.int32) if "int32" in ways else None
            self._narrow = weight if "int8" in ways or self._wide is None else None

    def product(self, operand: torch.Tensor) -> torch.Tensor:
        """``operand @ weight.T`` modulo 2**32: int32 (rows, in) → int32 (rows, out)."""
        rows = operand.shape[0]
        out = torch.empty((rows, self.shape[0]), dtype=torch.int32, device=operand.device)
        way = ringkernels.quickest(rows, operand.device)
        first, second = (self._wide, self._narrow) if way == "int32" else (self._narrow, self._wide)
        weight = second if first is None else first
        if weight is not None:
            ringkernels.multiply(operand, weight, (out,), way)
        return out

    def rows(self, start: int, stop: int) -> RingMatrix:
        """Rows ``start`` to ``stop`` of the weight, as a matrix that shares their memory wherever it can."""
        part = copy(self)
        part.shape = (stop - start, self.shape[1])
        part._wide = None if self._wide is None else self._wide[start:stop]
        if self._narrow is not None:
            narrow = self._narrow[start:stop]
            part._narrow = ringkernels.padded(narrow) if narrow.is_cuda else narrow
        return part

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return sum(weight.nbytes for weight in (self._narrow, self._wide) if weight is not None)


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
