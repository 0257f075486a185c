"""Activations as whole numbers, so that products modulo 2**32 give them back: fixed point with one step per token.

A product of a row of the int8 matrix with a token's whole numbers is at most the product of their Euclidean norms
(Cauchy-Schwarz). So the step is chosen from the token's norm such that ``largest_norm · ‖q‖`` stays below 2**31, with
room for rounding: whatever the values, nothing wraps. That leaves a token 16 to 22 bits. A row that is not finite, or
so small that it is nothing, becomes zeros, which wrap as little.

Every operation is one correctly rounded step of IEEE 754 but the sum of squares, which may differ in its last bits
between machines. So results are the same bits wherever one machine computes them: locally, with two servers, with pads.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from teegpu.shield.quantised import Measure

_BITS: Final = 2**31
_MAGIC: Final = 1.5 * 2**23
"""Added to a float32 below 2**22 in size, it leaves the nearest whole number in the low bits of the sum."""
_MAGIC_BITS: Final = 0x4B400000
MOST: Final = 2**22 - 1
"""The largest whole number that an activation becomes. A matrix with small norms would allow more, and float32's 24
bits could hold no more than its fourfold."""

_ROUNDING: Final = 2.0**-24
"""What a step of float32 loses, as a share."""
_SLACK: Final = 16
"""Roundings for norm, step, reciprocal and product, of which there are fewer."""
_USUAL: Final = (2.0**-40, 2.0**60)
"""Norms whose squares are far from both ends of float32: there their sum is right but for its rounding."""
_NOTHING: Final = 2.0**-80
"""A row of a smaller norm is zero. Above it, steps and their reciprocals are normal numbers."""


def room(measure: Measure) -> float:
    """The largest norm, as it is computed, that the whole numbers of a token may have before they are rounded, so that
    no rounding makes a product reach 2**31. At least 1.

    A sum of n squares in float32, in whatever order, is less than the true one by a share of n roundings at most, as no
    term is negative; its root by half of that. That half is kept as a reserve for the shares of shares.

    Raises ``ValueError`` for a matrix so large that no room is left.
    """
    lost = 0.5 * math.sqrt(measure.columns)  # rounding moves a value by half at most
    left = min((_BITS - 1) / max(measure.largest_norm, 1.0) - lost, float(MOST))
    left *= max(0.0, 1.0 - (measure.columns + _SLACK) * _ROUNDING)
    if left < 1.0:
        raise ValueError(f"a product with {measure.columns} columns of norm {measure.largest_norm:.0f} has no room")
    return left


def encode(x: torch.Tensor, measure: Measure) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` fp32 (rows, in) → int32 (rows, in), which nothing else holds, and the step of each row, fp32 (rows, 1):
    ``x ≈ int32 · step``.

    A row that is not finite gets zeros and a step that is not finite, and so is what is computed of it.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    least, largest = map(float, norm.aminmax()) if len(norm) > 1 else (float(norm),) * 2
    scale = 1.0 / room(measure)
    odd: torch.Tensor | None = None
    if _USUAL[0] <= least <= largest <= _USUAL[1]:  # nor are NaNs
        step = norm.mul_(scale)
    else:
        step, odd = _unusual_steps(x, norm, scale)
    whole = (x * step.reciprocal()).add_(_MAGIC).view(torch.int32).sub_(_MAGIC_BITS)
    return (whole if odd is None else whole.masked_fill_(odd, 0)), step


def _unusual_steps(x: torch.Tensor, norm: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The step of each row, and which rows have no number of their own to be made whole with: a step that is 0,
    infinite or NaN. A row of a usual norm has the step that it would have without the others."""
    exact = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    usual = (norm >= _USUAL[0]) & (norm <= _USUAL[1])
    step = torch.where(usual, norm * scale, exact.mul(scale).to(torch.float32))
    odd = ~((exact >= _NOTHING) & torch.isfinite(step))
    return torch.where(exact < _NOTHING, 1.0, step), odd


def decode(product: torch.Tensor, step: torch.Tensor, measure: Measure) -> torch.Tensor:
    """int32 (rows, out), the product of what ``encode`` gave with the int8 matrix → fp32 (rows, out)."""
    return product.to(torch.float32).mul_(step).mul_(measure.scale)
