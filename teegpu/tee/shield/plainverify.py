"""Verification of plain float products: what can be had where nothing is masked, and what that is not.

The check is the one of ``verify``, over real numbers: with ``S``, k secret random vectors of 1 and -1, ``S·y`` is held
against ``(S·W)·x``. A server that rounds is not a server that cheats, so they may differ by a tolerance, and **whatever
changes a result by less than that passes**: this check finds a server that does not do the work, uses other weights, or
makes answers up; it does not find one that bends them a little. Only integer products are verified to the bit.

**The tolerance** is ``FACTOR`` times the error that an honest server is expected to make, row by row. The vectors are
independent of the rounding errors, so an error ``e`` of the result moves ``S·e`` by about its Euclidean norm, and by 8
times that with a probability below 1 in 10**13 (Hoeffding). Expected are, with the unit roundoff of each dtype:

    of the reply, and of the product in the server's dtype      roundoff · ‖y‖
    of the input, on the wire and in the server's dtype         roundoff · ‖(S·W)ⱼ · xⱼ‖
    of the weights in the server's dtype, and of its sums       roundoff · ‖‖Wⱼ‖ · xⱼ‖ with Wⱼ the columns of W
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from teegpu import ring
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.tee.shield.facts import Product, products
from teegpu.tee.shield.keyfiles import SEED, Parts, Progress, SecretVectors, name_of, sizes_of
from teegpu.tee.shield.verify import vectors

FACTOR: Final = 16.0
ROUNDOFF: Final[Mapping[str, float]] = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11, "int8": 0.0182}
"""What rounding to a dtype changes a value by at most, relative to it. int8 has one scale for 64 values: relative to
the norm of a group, when one value of it outweighs all others."""

_SMALLEST: Final[Mapping[str, float]] = {"fp16": 2.0**-25}
"""What it changes a small value by, however small that is, where the range ends within reach."""
_BLOCK_VALUES: Final = 2**22


@dataclass(frozen=True, slots=True)
class Dtypes:
    """In what a product was sent, computed and answered: names of ``ROUNDOFF``."""

    sent: str
    server: str
    reply: str


@dataclass(frozen=True, slots=True)
class _Folded:
    """``S·W`` (columns, checks) and the norms of the columns of ``W`` (columns,), float32."""

    values: torch.Tensor
    norms: torch.Tensor


class PlainKeys(SecretVectors):
    """The secret vectors of a model for plain products."""

    kind = "plain verification keys"
    suffix = ".plain"

    def __init__(
        self, seed: bytes, checks: int, folded: dict[Product, _Folded], rows: int, path: Path | None = None
    ) -> None:
        self.checks = checks
        self.path = path
        self._signs = 1.0 - 2.0 * vectors(seed, rows, checks).to(torch.float32)
        self._folded = folded

    def wrong_rows(
        self,
        product: Product,
        sent: torch.Tensor,
        received: torch.Tensor,
        dtypes: Dtypes,
        extra: torch.Tensor | None = None,
    ) -> list[int]:
        """The rows in which ``received``, fp32 (rows, out), is further from the product of ``sent``, fp32 (rows, in),
        than an honest server's rounding explains. Values that are not finite are wrong.

        ``extra`` (rows, 1): the norm of an error that is to be expected beside those of the dtypes, such as that of a
        residual which was added to the product and taken off again.
        """
        folded = self._folded[product]
        out = received.shape[1]
        # Sums of thousands of values: float32 would add an error of its own.
        given = received.to(torch.float64) @ self._signs[:out].to(torch.float64)
        wanted = sent.to(torch.float64) @ folded.values.to(torch.float64)
        squares = sent.to(torch.float64).square()
        wire, server, reply = (ROUNDOFF[name] ** 2 for name in (dtypes.sent, dtypes.server, dtypes.reply))
        sums = sent.shape[1] * ROUNDOFF["fp32"] ** 2
        error = (server + reply) * received.to(torch.float64).square().sum(-1, keepdim=True)
        error = error + (wire + server + sums) * (squares @ folded.values.to(torch.float64).square())
        error += (server + sums) * (squares @ folded.norms.to(torch.float64).square()).unsqueeze(-1)
        tiny = max(_SMALLEST.get(name, 0.0) for name in (dtypes.sent, dtypes.server, dtypes.reply))
        error += tiny**2 * (out + folded.values.to(torch.float64).square().sum(0))
        if extra is not None:
            error += extra.to(torch.float64).square()
        right = (given - wanted).abs() <= FACTOR * error.sqrt()
        right &= torch.isfinite(given)
        return (~right).any(-1).nonzero().flatten().tolist()

    @staticmethod
    def drawn(store: WeightStore, spec: ModelSpec, checks: int, progress: Progress) -> Parts:
        """A seed, and of each product ``S·W`` (columns, checks) and then the norms of the columns, float32."""
        rows = sizes_of(spec)
        seed = secrets.token_bytes(ring.SEED_BYTES)
        signs = 1.0 - 2.0 * vectors(seed, max(rows.values()), checks).to(torch.float64)
        total = sum(math.prod(spec.weights[name]) for product in rows for name in product)
        done = 0
        made = {SEED: np.frombuffer(seed, np.uint8)}
        for product in rows:
            columns = spec.weights[product[0]][1]
            values = torch.zeros((columns, checks), dtype=torch.float64)
            squares = torch.zeros(columns, dtype=torch.float64)
            step = max(1, _BLOCK_VALUES // columns)
            start = 0
            for name in product:
                weight = store.load(name)
                for first in range(0, weight.shape[0], step):
                    block = weight[first : first + step].to(torch.float64)
                    values += block.t() @ signs[start : start + block.shape[0]]
                    squares += block.square().sum(0)
                    start += block.shape[0]
                    done += block.numel()
                progress(done / total)
            made[name_of(product)] = torch.cat([values.flatten(), squares.sqrt()]).to(torch.float32).numpy()
        return made

    @classmethod
    def of(cls, parts: Parts, spec: ModelSpec, checks: int, path: Path | None = None) -> PlainKeys:
        folded = {}
        for product in products(spec):
            columns = spec.weights[product[0]][1]
            both = torch.from_numpy(parts[name_of(product)].view(np.float32))
            values, norms = both.split([columns * checks, columns])
            folded[product] = _Folded(values.view(columns, checks), norms)
        return cls(parts[SEED].tobytes(), checks, folded, max(sizes_of(spec).values()), path)
