"""Whether what a server gets looks like random numbers that have nothing to do with the text.

A test that finds nothing proves nothing: numbers may look random and still tell all to who knows how to ask. One that
finds something proves that the masks are broken.
"""

from __future__ import annotations

import math

import torch

from teegpu.audit.chance import among, chi_squared_tail, normal_tails
from teegpu.audit.findings import Finding
from teegpu.audit.known import PROMPT, Known, Truth
from teegpu.audit.reading import View

_MOST_VALUES = 2**22
"""So many values are looked at: enough to see a bias of a thousandth."""
_LEAST_VALUES = 2**13
"""With fewer, the tests' own approximations would raise false alarms."""


def distribution(view: View) -> Finding:
    """Whether all bytes, and all bits, of the values are equally frequent (chi-squared, and each bit's share)."""
    attack, target = "uneven values", "bytes and bits of the values"
    values = _values(view)
    if values is None or values.shape[0] < _LEAST_VALUES:
        return Finding(attack, target, view.label, None, "too few values are sent", control=view.control)
    octets = values.view(torch.uint8).view(values.shape[0], values.element_size())
    probabilities = [_bytes_even(octets[:, place]) for place in range(octets.shape[1])]
    for place in range(octets.shape[1]):
        probabilities += [_bit_even((octets[:, place] >> bit) & 1) for bit in range(8)]
    smallest = among(min(probabilities), len(probabilities))
    return Finding(
        attack,
        target,
        view.label,
        smallest,
        f"{len(probabilities)} tests on {values.shape[0]:,} values",
        control=view.control,
    )


def neighbours(view: View) -> Finding:
    """Whether a value tells something of the one beside it, or of the one in the row below."""
    attack, target = "correlation of neighbours", "along rows and columns"
    works = [operand for work in view.works(PROMPT) for operand in work.operands.values() if operand.dim() == 2]
    if sum(operand.numel() for operand in works) < _LEAST_VALUES:
        return Finding(attack, target, view.label, None, "too few values are sent", control=view.control)
    sums = {"rows": (0.0, 0), "columns": (0.0, 0)}
    seen = 0
    for operand in works:
        standard = _standardised(operand)
        for name, product in (
            ("rows", standard[:, 1:] * standard[:, :-1]),
            ("columns", standard[1:] * standard[:-1]),
        ):
            total, count = sums[name]
            sums[name] = total + float(product.sum()), count + product.numel()
        seen += operand.numel()
        if seen >= _MOST_VALUES:
            break
    scores = [total / math.sqrt(count) for total, count in sums.values() if count]
    probability = among(min(normal_tails(score) for score in scores), len(scores))
    largest = max(abs(total / count) for total, count in sums.values() if count)
    return Finding(attack, target, view.label, probability, f"largest {largest:.4f}", control=view.control)


def correlation_with_plain(view: View, known: Known, truth: Truth) -> Finding:
    """Whether what is sent for layer 0 goes up and down with the true values, which the auditor knows."""
    attack, target = "correlation with the truth", "layer 0, input of Q, K, V"
    entering = view.entering(PROMPT, 0)
    if entering is None or entering.rows.shape[0] != len(truth.computed):
        return Finding(attack, target, view.label, None, "it is not sent", control=view.control)
    sent = _standardised(entering.rows)
    plain = _standardised(known.entering_first(truth.computed))
    mean = float((sent * plain).mean())
    probability = normal_tails(mean * math.sqrt(sent.numel()))
    return Finding(attack, target, view.label, probability, f"{mean:.4f}", control=view.control)


def _values(view: View) -> torch.Tensor | None:
    """Values that were sent in the scene ``prompt``, one after the other, up to ``_MOST_VALUES``."""
    parts: list[torch.Tensor] = []
    count = 0
    for work in view.works(PROMPT):
        for operand in work.operands.values():
            if operand.dim() == 2 and (not parts or operand.dtype == parts[0].dtype):
                parts.append(operand.flatten())
                count += operand.numel()
        if count >= _MOST_VALUES:
            break
    return torch.cat(parts)[:_MOST_VALUES] if parts else None


def _standardised(rows: torch.Tensor) -> torch.Tensor:
    """fp64 of mean 0 and variance 1, as far as rows are what they should be: int32 uniform. Others have their own."""
    values = rows.to(torch.float64)
    if rows.dtype == torch.int32:
        return (values + 0.5) * (math.sqrt(3.0) / 2**31)
    return values / values.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)


def _bytes_even(octets: torch.Tensor) -> float:
    counts = torch.bincount(octets.to(torch.int64), minlength=256).to(torch.float64)
    expected = octets.shape[0] / 256.0
    return chi_squared_tail(float(((counts - expected) ** 2).sum() / expected), 255)


def _bit_even(bits: torch.Tensor) -> float:
    count = bits.shape[0]
    return normal_tails((2.0 * float(bits.sum()) - count) / math.sqrt(count))
