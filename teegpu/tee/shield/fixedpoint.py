"""Activations as whole numbers, so that products modulo 2**32 give them back: fixed point with one step per token.

A product of a row of the int8 matrix with a token's whole numbers is at most the product of their Euclidean norms
(Cauchy-Schwarz). So the step is chosen from the token's norm such that ``largest_norm · ‖q‖`` stays below 2**31, with
room for rounding and for the noise of a mask: whatever the values, nothing wraps. That leaves a token 16 to 22 bits.

Every operation is one correctly rounded step of IEEE 754 but the sum of squares, which may differ in its last bits
between machines. So results are the same bits wherever one machine computes them: locally, with two servers, with pads.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from teegpu.tee.shield.facts import Facts

_BITS: Final = 2**31
_MAGIC: Final = 1.5 * 2**23
"""Added to a float32 below 2**22 in size, it leaves the nearest whole number in the low bits of the sum."""
_MAGIC_BITS: Final = 0x4B400000
MOST: Final = 2**22 - 1
"""The largest whole number that an activation becomes. A matrix with small norms would allow more, and float32's 24
bits could hold no more than its fourfold."""

_NORM_SLACK: Final = 1.0 - 2.0**-10
"""A norm of up to 2**15 values is off by less than this, in whatever order float32 adds its squares up."""
_NOISE_TAIL: Final = 12.0
"""The norm of n Gaussian values is above (√n + t)·σ with a probability below exp(-t²/2): here 1 in 10**31."""


def room(facts: Facts, noise: float = 0.0) -> float:
    """The largest norm that the whole numbers of a token may have before they are rounded, so that neither rounding nor
    Gaussian noise of standard deviation ``noise`` on each makes a product reach 2**31. At least 1.

    Raises ``ValueError`` for a matrix so large that no room is left.
    """
    root = math.sqrt(facts.columns)
    # Rounding moves a value by half at most, and so does that of the noise.
    lost = 0.5 * root + (noise * (root + _NOISE_TAIL) + 0.5 * root if noise else 0.0)
    left = min((_BITS - 1) / max(facts.largest_norm, 1.0) - lost, float(MOST))
    if left < 1.0:
        raise ValueError(f"a product with {facts.columns} columns of norm {facts.largest_norm:.0f} has no room")
    return left * _NORM_SLACK


def encode(x: torch.Tensor, facts: Facts, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` fp32 (rows, in) → int32 (rows, in), which nothing else holds, and the step of each row, fp32 (rows, 1):
    ``x ≈ int32 · step``.

    A row that is not finite gets a step that is not finite, and so does what is computed of it.
    """
    step = torch.linalg.vector_norm(x, dim=-1, keepdim=True).mul_(1.0 / room(facts, noise))
    # A row of zeros has no step of its own; a subnormal one has no reciprocal.
    step.clamp_min_(2.0**-100)
    scaled = x * step.reciprocal()
    whole = scaled.add_(_MAGIC).view(torch.int32)
    return whole.sub_(_MAGIC_BITS), step


def decode(product: torch.Tensor, step: torch.Tensor, facts: Facts) -> torch.Tensor:
    """int32 (rows, out), the product of what ``encode`` gave with the int8 matrix → fp32 (rows, out)."""
    return product.to(torch.float32).mul_(step).mul_(facts.scale)
