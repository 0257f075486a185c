"""Matrix products and conversions on the CPU at the speed that the processor allows.

torch's ``linear`` takes a weight as it lies in memory. oneDNN, which torch carries, multiplies faster with a weight
that was brought into its own blocked layout once: measured on one core of an AMD EPYC (Zen 4) with SmolLM2's
matrices, one row takes half the time in bf16 and 1,024 rows less than half in fp32. torch offers that through
operators that its compiler uses, and that may change between releases, so this file alone knows them, and falls back
to ``linear`` without them.

Where few rows are multiplied, as in decode, reading the weights is the work, and int8 ones are read in a quarter of the
time (``Int8Matrix``).

Both sides use it: the GPU server where there is no GPU, and the runner for the plan ``local``, which would otherwise be
a baseline that is easy to beat.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache
from typing import Final

import torch

from teegpu import facts


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


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What products are computed in, by its name in the settings and on the wire."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name in ``DTYPES`` of ``dtype``."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def products_in(dtype: torch.dtype, *, int8: bool) -> str:
    """How reports and servers name what products are computed in."""
    return dtype_name(dtype) + (facts.INT8_WEIGHTS if int8 else "")


def quickest_dtype() -> torch.dtype:
    """What products take least time in on this processor, with fp32's range: bf16 where it has such instructions.
    Without them bf16 is emulated, and slower than fp32."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


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

    def part(self, start: int, stop: int) -> Matrix:
        """Rows ``start`` to ``stop`` as a matrix."""
        return Matrix(self.rows(start, stop))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of the weight, (stop - start, in): a view where the layout allows it."""
        weight = self._weight.to_dense() if self.packed else self._weight
        return weight[start:stop]

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


# What of torch multiplies bf16 rows (n, in) with int8 weights (out, in), each row of which has a scale: (n, out). Some
# processors lack it, or are slow at it, and nothing of it is taken on trust.
_int8_product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = getattr(
    torch, "_weight_int8pack_mm", None
)
_FEW: Final = (1, 2, 4, 8, 16)
"""Numbers of rows that are tried."""
_PROBE: Final = 2048
_PROBE_TIMES: Final = 3
_CHECKED_OUTPUTS: Final = 256


class Int8Matrix(Matrix):
    """A weight (out, in) on a CPU that is ``codes``, int8, times a ``scale`` for each row, fp32 (out,).

    Products of so few rows that this is quicker here read the int8 values, and take the rows in bf16; others are those
    of a ``Matrix`` of the same values in ``dtype``, which is held as well. Either way they are in ``dtype``.
    """

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__((codes * scale[:, None]).to(dtype))
        self._codes, self._scale = codes, scale
        self._ones = torch.ones(codes.shape[0], dtype=torch.bfloat16)
        self._few = int8_rows(dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        if rows > self._few or not _right(rows, *self.shape, torch.get_num_threads()) or _int8_product is None:
            return super().product(x)
        # A scale in bf16 would be off by as much as the whole quantisation; so it comes after.
        sums = _int8_product(x.to(torch.bfloat16).contiguous(), self._codes, self._ones)
        return sums.to(torch.float32).mul_(self._scale).to(self.dtype)

    def part(self, start: int, stop: int) -> Matrix:
        return Int8Matrix(self._codes[start:stop], self._scale[start:stop], self.dtype)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._codes.nbytes


def matrix_bytes(dtype: torch.dtype, *, int8: bool) -> int:
    """Bytes for each value of a ``Matrix``, or an ``Int8Matrix``."""
    return dtype.itemsize + int8


def int8_rows(dtype: torch.dtype) -> int:
    """Up to how many rows int8 weights are quicker here than those in ``dtype``; 0: never. Measured at the first call,
    and again for another number of threads."""
    return _int8_rows(dtype, torch.get_num_threads())


@cache
def _int8_rows(dtype: torch.dtype, threads: int) -> int:
    quicker = 0
    codes = _extremes(_PROBE, _PROBE)
    full, ones = Matrix(codes.to(dtype)), torch.ones(_PROBE, dtype=torch.bfloat16)
    for rows in _FEW:
        if not _right(rows, _PROBE, _PROBE, threads) or _int8_product is None:
            break
        x = torch.ones(rows, _PROBE, dtype=dtype)
        if _seconds(_int8_product, x.to(torch.bfloat16), codes, ones) >= _seconds(full.product, x):
            break
        quicker = rows
    return quicker


def _seconds(product: Callable[..., torch.Tensor], *operands: torch.Tensor) -> float:
    taken = math.inf
    for _ in range(1 + _PROBE_TIMES):
        started = time.perf_counter()
        product(*operands)
        taken = min(taken, time.perf_counter() - started)
    return taken


@cache
def _right(rows: int, outputs: int, columns: int, threads: int) -> bool:  # noqa: ARG001 (kernels cut the work by it)
    """Whether the product of int8 weights is right for this shape, tried with whole numbers whose sums are exact: what
    comes of them has to be these sums, rounded once. Of many outputs as many are tried as make another remainder."""
    if _int8_product is None or columns > _EXACT_COLUMNS or columns % _VECTOR:
        return False
    tried = outputs if outputs <= _CHECKED_OUTPUTS else _CHECKED_OUTPUTS + outputs % _CHECKED_OUTPUTS
    codes = _extremes(tried, columns)
    x = (torch.arange(rows * columns).reshape(rows, columns) * 7 % 5 - 2).to(torch.float32)
    try:
        found = _int8_product(x.to(torch.bfloat16), codes, torch.ones(tried, dtype=torch.bfloat16))
    except (RuntimeError, NotImplementedError):
        return False
    expected = torch.nn.functional.linear(x.double(), codes.double())
    return found.dtype == torch.bfloat16 and torch.equal(found, expected.to(torch.float32).to(torch.bfloat16))


_VECTOR: Final = 32
"""Columns that are read at once, at most. Where they are no multiple, torch's kernel reads past the last row's end: to
try it may end the process (2.13 with AVX2 and 1, 3 or 5 columns does)."""
_EXACT_COLUMNS: Final = 2**24 // (2 * 128)
"""Sums of so many products of the numbers that are tried are exact in fp32, in any order."""


def _extremes(outputs: int, columns: int) -> torch.Tensor:
    """int8 (outputs, columns) with the largest values that there are, and different enough that what is read in the
    wrong place shows."""
    codes = (torch.arange(outputs * columns).reshape(outputs, columns) * 31 % 256 - 128).to(torch.int8)
    codes[::3, ::2] = -128
    codes[1::3, 1::2] = 127
    return codes


_HALVES = (torch.float16, torch.bfloat16)
_WORTH_TWO_STEPS = 4096
"""Values from which on the slow loop costs more than a second call."""


def convert(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` in ``dtype``; ``x`` itself where it has that already.

    On a CPU it goes through fp32 between fp16 and bf16, which is exact on the way up: torch has vectorised loops for
    either half, and a slow one (five times as slow) straight between the two."""
    slow = x.dtype != dtype and x.dtype in _HALVES and dtype in _HALVES and x.device.type == "cpu"
    if slow and x.numel() >= _WORTH_TWO_STEPS:
        return x.to(torch.float32).to(dtype)
    return x.to(dtype)
