"""Products of int32 matrices modulo 2**32, as integers wrap: what verification and ``lwe`` compute with.

torch multiplies int32 on a CPU about as fast as float64, without a conversion, whatever the values; but it promises
nothing of what happens beyond 2**31, so it is looked at once, and float64 is taken where it does not wrap.
"""

from __future__ import annotations

import functools

import torch

from teegpu import ring


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` modulo 2**32, int32 matrices."""
    if wraps():
        return left @ right
    # Three limbs of 11 bits: each sum stays below 2**53 for up to 2,048 values.
    result = torch.zeros((left.shape[0], right.shape[1]), dtype=torch.int32)
    for start in range(0, left.shape[1], 2048):
        part = left[:, start : start + 2048]
        factor = right[start : start + 2048].to(torch.float64)
        for shift in (0, 11, 22):
            limb = (part >> shift) & 0x7FF if shift < 22 else part >> shift
            result += ring.wrap(limb.to(torch.float64) @ factor) << shift
    return result


@functools.cache
def wraps() -> bool:
    """Whether torch's products of int32 are right modulo 2**32 here, for few rows and many, and in both layouts."""
    right = ring.expand(bytes(31) + b"2", 131, 70)
    for rows in (1, 3, 64):
        left = ring.expand(bytes(31) + b"1", rows, 131)
        low, high = left & 0xFFFF, left >> 16
        halves = [(half.to(torch.float64) @ right.to(torch.float64)).to(torch.int64) for half in (low, high)]
        expected = (halves[0] + (halves[1] << 16)).to(torch.int32)
        for layout in (right, right.t().contiguous().t()):
            if not torch.equal(left @ layout, expected):
                return False
    return True
