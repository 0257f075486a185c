"""The mode ``lwe``: masks that look uniform to who can't solve learning with errors. **Experimental**: nobody outside
of this project has reviewed it, and its masks are made by code that is not constant in time.

It is SimplePIR's structure with a weight matrix as the database. For each token and product a fresh secret ``s`` and a
fresh error ``e`` are drawn, ``q + A·s + e`` modulo 2**32 is sent, and ``H·s`` is subtracted from what comes back, with
the hint ``H = W·A`` computed once. The error stays in the result, as ``W·e``. ``A`` is public: it follows from the
model's digest and the product's width. No pads, no second server; the hints take memory, and ``A·s`` and ``H·s`` time.

**Parameters.** Dimension 1,408, q = 2**32, errors of standard deviation 6.4, as HintlessPIR (Li, Micciancio, Raykova,
Schultz; CRYPTO 2024) states them for 128 bits, and a secret that is uniform in -1, 0 and 1, as its published code draws
it (that code has smaller errors than the paper, of variance 8; ours are the paper's). Our own estimate, of the primal
attack alone in the core-SVP model: block size 440, 128 bits classically and 117 with quantum computers, with 1,260 or
more samples of a secret. A secret has as many samples as its product has columns: 576 of them, as in most products of a
small model, give 158 bits. Hybrid and dual attacks on small secrets were not estimated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch

from teegpu import ring
from teegpu.errors import ShieldError
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.tee.shield import sealed
from teegpu.tee.shield.facts import Product, products, quantised
from teegpu.tee.shield.samplers import SIGMA, Stream, gaussian, ternary
from teegpu.tee.shield.wrapping import multiply

DIMENSION: Final = 1408

_KIND: Final = "hints"
_VERSION: Final = 1
_BLOCK_ROWS: Final = 2048
"""Rows of a matrix whose hint is computed at once: so that progress is seen, and an interrupt is soon."""

Progress = Callable[[float], None]


def public_matrix(digest: str, columns: int) -> torch.Tensor:
    """``A`` for all products of the model with ``digest`` that have so many columns: int32 (columns, dimension)."""
    text = f"teegpu lwe matrix {_VERSION}\0{digest}\0{columns}\0{DIMENSION}"
    return ring.expand(hashlib.sha256(text.encode()).digest(), columns, DIMENSION)


class LweMask:
    """The mask of one message: see ``masks.Mask``."""

    def __init__(self, operand: torch.Tensor, secret: torch.Tensor, hint: torch.Tensor) -> None:
        self.operand = operand
        self._secret: torch.Tensor | None = secret
        self._hint = hint

    def correction(self) -> torch.Tensor:
        """``H·s``, int32 (rows, out)."""
        if self._secret is None:
            raise RuntimeError("a mask's correction is there once")
        correction = multiply(self._secret, self._hint.t())
        self._secret = None
        return correction


class LweSource:
    """Masks of the model with ``digest`` from its hints, int32 (rows, dimension): see ``masks.MaskSource``."""

    mode = "lwe"
    noise = SIGMA

    def __init__(self, digest: str, spec: ModelSpec, hints: Mapping[Product, torch.Tensor]) -> None:
        self._hints = dict(hints)
        widths = {product: spec.weights[product[0]][1] for product in hints}
        matrices = {width: public_matrix(digest, width) for width in set(widths.values())}
        self._matrices = {product: matrices[width] for product, width in widths.items()}

    def take(self, product: Product, rows: int) -> LweMask:
        """A fresh mask for ``rows`` rows of ``product``: there is no end of them."""
        matrix = self._matrices[product]
        stream = Stream()
        secret = ternary(stream, rows, DIMENSION)
        operand = multiply(secret, matrix.t()).add_(gaussian(stream, rows, matrix.shape[0]))
        return LweMask(operand, secret, self._hints[product])

    @property
    def nbytes(self) -> int:
        """Memory of the hints."""
        return sum(hint.nbytes for hint in self._hints.values())

    def close(self) -> None:
        """Lets go of the hints. May be called twice."""
        self._hints.clear()


# Hints


def hint_path(data: Path, digest: str) -> Path:
    """Where the hints of the model with ``digest`` are, or will be."""
    return data / f"{digest[:32]}.hints"


def hint_bytes(spec: ModelSpec) -> int:
    """What all hints take, on the disk and in memory."""
    return sum(spec.weights[name][0] for product in products(spec) for name in product) * DIMENSION * 4


def make_hints(
    store: WeightStore,
    spec: ModelSpec,
    digest: str,
    data: Path,
    *,
    progress: Progress = lambda _: None,
    waiting: Callable[[], None] = lambda: None,
) -> Path:
    """Computes ``H = W·A`` of all products, from the runner's own weights, and seals them in the place of older ones.

    Whole or not at all. Raises ``ShieldError`` where the disk is too small or full, or others can read the folder.
    """
    path = hint_path(data, digest)
    todo = products(spec)
    parts = [("+".join(p), sum(spec.weights[name][0] for name in p) * DIMENSION * 4) for p in todo]
    total = sum(size * spec.weights[product[0]][1] for (_, size), product in zip(parts, todo, strict=True))
    done = 0
    seal = sealed.SealKey.load()
    with sealed.making(path, waiting):
        sealed.check_space(path, sum(size for _, size in parts), "the hints")
        with sealed.SealedWriter(path, seal, _KIND, _binding(digest), parts) as writer:
            for product in todo:
                weight, _ = quantised(store, spec, product)
                matrix = public_matrix(digest, weight.shape[1])
                for start in range(0, weight.shape[0], _BLOCK_ROWS):
                    block = weight[start : start + _BLOCK_ROWS].to(torch.int32)
                    writer.append(multiply(block, matrix).numpy())
                    done += block.numel() * DIMENSION * 4
                    progress(done / total)
    return path


def load_hints(
    spec: ModelSpec, digest: str, data: Path, *, progress: Progress = lambda _: None
) -> dict[Product, torch.Tensor]:
    """All hints of the model, int32 (rows, dimension). Raises ``ShieldError`` where there are none, or they are
    damaged."""
    path = hint_path(data, digest)
    hints: dict[Product, torch.Tensor] = {}
    todo = products(spec)
    try:
        with sealed.SealedFile(path, sealed.SealKey.load(), _KIND, _binding(digest)) as file:
            for number, product in enumerate(todo):
                values = torch.from_numpy(file.read("+".join(product)).view(np.int32))
                hints[product] = values.view(-1, DIMENSION)
                progress((number + 1) / len(todo))
    except FileNotFoundError:
        raise ShieldError(
            f"run.privacy is lwe, and there are no hints for this model in {data}: make them with 'teegpu hint make'"
        ) from None
    return hints


def _binding(digest: str) -> sealed.Binding:
    return {"model": digest, "dimension": DIMENSION, "version": _VERSION}
