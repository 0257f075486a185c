"""The non-linear operations of a decoder layer. All in fp32, all in the TEE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch

from teegpu.model.spec import GELU_TANH, SILU


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """``1 / sqrt(mean(x²) + eps)`` per row: (tokens, n) → (tokens, 1)."""
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(1.0 / x.shape[-1])
    return mean_square.add_(eps).rsqrt_()


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019): ``x * inverse_rms(x) * weight``, (…, n) → (…, n)."""
    # torch's own rms_norm is not vectorised on the CPU: this takes a third of its time.
    return (x * inverse_rms(x, eps)).mul_(weight)


def rmsnorm_of_heads(x: torch.Tensor, weight: torch.Tensor, eps: float, groups: Sequence[int] = ()) -> torch.Tensor:
    """``rmsnorm`` of (tokens, heads, d) with a ``weight`` (heads, d): each head by itself, or with ``groups`` so many
    neighbouring heads of a token together."""
    if not groups:
        return rmsnorm(x, weight, eps)
    scales = [
        inverse_rms(part.flatten(1), eps)[:, None].expand(-1, part.shape[1], 1) for part in x.split(groups, dim=1)
    ]
    return (x * torch.cat(scales, dim=1)).mul_(weight)


def capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    """``cap · tanh(x / cap)``, in place."""
    return x.mul_(1.0 / cap).tanh_().mul_(cap)


def silu_product(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of both side by side: (tokens, 2n) → (tokens, n), contiguous."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def gelu_product(gate_up: torch.Tensor) -> torch.Tensor:
    """``gelu(gate) * up``, the same way, with the tanh that stands for the Gaussian integral."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh").mul_(up)


ACTIVATIONS: Final[Mapping[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]]] = {
    SILU: (silu_product, "SILU"),
    GELU_TANH: (gelu_product, "GELU"),
}
"""What a model does with gate and up, and its name in records."""


def softmax(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax over keys of (heads, queries, keys) with an additive ``mask`` (queries, keys)."""
    return torch.softmax(scores if mask is None else scores.add_(mask), dim=-1)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates pairs (i, i + r/2) of the first r of (tokens, heads, d) by the angles whose cosines and sines are
    (tokens, 1, r/2); what is beyond them stays.

    Rotary position embedding (Su et al. 2021) in the half-split layout of the Llama family.
    """
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = torch.empty_like(x)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out
