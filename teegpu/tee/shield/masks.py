"""The seam between shielded products and what makes their masks.

A product ``W·q`` of whole numbers modulo 2**32 is asked for as ``W·(q + operand)``, and ``correction``, which is
``W·operand`` (``lwe``: but for a noise that is stated), is subtracted from the answer. What the server sees of ``q`` is
what it can learn of ``operand``: nothing, where that is uniform and never used again.
"""

from __future__ import annotations

from typing import Protocol

import torch

from teegpu.tee.shield.facts import Product


class Mask(Protocol):
    """The mask of one message. It is used for that message alone; a message that is sent again is the same bytes."""

    @property
    def operand(self) -> torch.Tensor:
        """int32 (rows, in): what is added to the fixed-point values, modulo 2**32."""

    def correction(self) -> torch.Tensor:
        """int32 (rows, out): what is subtracted from the product that comes back.

        Called once, and where the work allows it while the request is on its way: what it costs is then hidden behind
        the link. The caller may write to it."""


class MaskSource(Protocol):
    """Makes masks, each of which it hands out once, ever, across processes and crashes.

    ``mode`` is a privacy mode of the settings. ``noise`` is the standard deviation of what ``operand`` leaves in each
    value of the product's input, in steps of the fixed point; 0 where the products are exact.
    """

    mode: str
    noise: float

    def take(self, product: Product, rows: int) -> Mask:
        """A fresh mask for ``rows`` rows of ``product``. Raises ``ShieldError`` where there is none, and there will be
        none: then the run ends, it never goes on without."""

    def close(self) -> None:
        """Destroys what is left of masks in memory. May be called twice."""
