"""Matrix products and conversions on the CPU at the speed that the processor allows.

torch's ``linear`` takes a weight as it lies in memory. oneDNN, which torch carries, multiplies faster with a weight
that was brought into its own blocked layout once: measured on one core of an AMD EPYC (Zen 4) with SmolLM2's
matrices, one row takes half the time in bf16 and 1,024 rows less than half in fp32. torch offers that through
operators that its compiler uses, and that may change between releases, so this file alone knows them, and falls back
to ``linear`` without them.

Both sides use it: the GPU server where there is no GPU, and the runner for the plan ``local``, which would otherwise be
a baseline that is easy to beat.
"""

from __future__ import annotations

import torch


def _packable(weight: torch.Tensor) -> bool:
    # fp16 has no quick kernel on most processors, and oneDNN refuses it there.
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class Matrix:
    """A weight (out, in), ready for products, in the layout that is quickest on its device.

    ``packed`` says that this is a layout of its own: then the matrix holds a copy, else the tensor that it was given.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.dtype = weight.dtype
        self.packed = _packable(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight
        if self.packed:
            self._multiply = torch.ops.mkldnn._linear_pointwise.default  # looked up once: that takes microseconds

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T``, (rows, in) → (rows, out), in the weight's dtype."""
        if self.packed:
            return self._multiply(x.contiguous(), self._weight, None, "none", [], "")
        return torch.nn.functional.linear(x, self._weight)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of the weight, (stop - start, in): a view where the layout allows it."""
        weight = self._weight.to_dense() if self.packed else self._weight
        return weight[start:stop]

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


_HALVES = (torch.float16, torch.bfloat16)
_WORTH_TWO_STEPS = 4096
"""Values from which on the slow loop costs more than a second call."""


def convert(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` in ``dtype``; ``x`` itself where it has that already.

    On a CPU it goes through fp32 between fp16 and bf16, which is exact on the way up: torch has vectorised loops for
    either half, and a slow one (five times as slow) straight between the two."""
    if _two_steps(x, dtype) and x.numel() >= _WORTH_TWO_STEPS:
        return x.to(torch.float32).to(dtype)
    return x.to(dtype)


def copy_into(out: torch.Tensor, x: torch.Tensor) -> None:
    """Writes ``x`` into ``out``, of the same shape and of any dtype, as ``convert`` would bring it there."""
    if _two_steps(x, out.dtype):
        x = x.to(torch.float32)
    out.copy_(x)


def _two_steps(x: torch.Tensor, dtype: torch.dtype) -> bool:
    return x.dtype in _HALVES and dtype in _HALVES and x.dtype != dtype and x.device.type == "cpu"
