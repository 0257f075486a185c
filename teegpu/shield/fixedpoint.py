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

_SLACK: Final = 1.0 - 2.0**-20
"""The norm is summed in float64; step, reciprocal and product are rounded to float32, which loses 2**-24 each."""
_NOTHING: Final = 2.0**-80
"""A row of a smaller norm is zero. Above it, steps and their reciprocals are normal numbers."""
_FINITE: Final = 2.0**127
"""Up to here a step is finite in float32, whatever the matrix."""


def room(measure: Measure) -> float:
    """The largest norm that the whole numbers of a token may have before they are rounded, so that rounding doesn't
    make a product reach 2**31. At least 1.

    Raises ``ValueError`` for a matrix so large that no room is left.
    """
    lost = 0.5 * math.sqrt(measure.columns)  # rounding moves a value by half at most
    left = min((_BITS - 1) / max(measure.largest_norm, 1.0) - lost, float(MOST))
    if left < 1.0:
        raise ValueError(f"a product with {measure.columns} columns of norm {measure.largest_norm:.0f} has no room")
    return left * _SLACK


def encode(x: torch.Tensor, measure: Measure) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` fp32 (rows, in) → int32 (rows, in), which nothing else holds, and the step of each row, fp32 (rows, 1):
    ``x ≈ int32 · step``.

    A row that is not finite gets zeros and a step that is not finite, and so is what is computed of it.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    scale = 1.0 / room(measure)
    least, largest = map(float, norm.aminmax() if len(norm) > 1 else (norm, norm))
    odd: torch.Tensor | None = None
    if not _NOTHING <= least <= largest <= _FINITE:  # nor are NaNs
        step = norm.mul(scale).to(torch.float32)
        # These have no number of their own to be made whole with: a step that is 0, infinite or NaN.
        odd = ~((norm >= _NOTHING) & torch.isfinite(step))
        step = torch.where(norm < _NOTHING, 1.0, step)
    elif len(norm) > 1:
        step = norm.mul(scale).to(torch.float32)
    else:  # a step of decoding, where each operation costs more than what it does; the bits are the same
        step = torch.full((1, 1), least * scale, dtype=torch.float32)
    whole = (x * step.reciprocal()).add_(_MAGIC).view(torch.int32).sub_(_MAGIC_BITS)
    return (whole if odd is None else whole.masked_fill_(odd, 0)), step


def decode(product: torch.Tensor, step: torch.Tensor, measure: Measure) -> torch.Tensor:
    """int32 (rows, out), the product of what ``encode`` gave with the int8 matrix → fp32 (rows, out)."""
    return product.to(torch.float32).mul_(step).mul_(measure.scale)
