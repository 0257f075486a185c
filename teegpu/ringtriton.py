"""Products modulo 2**32 on CUDA, as Triton kernels. Triton comes with torch's builds for CUDA; where it is missing,
importing this raises ``ImportError``, and nothing else needs it.

A tile of the result is one int8 product: rows of the weight times the four limbs of each row of the operand, side by
side. Its int32 sums wrap, so they are right modulo 2**32 however many the columns; shifted and added up in registers
they are the result, and nothing else is written.

What a kernel is compiled for does not depend on the number of rows and outputs, beyond the choice of ``_tile``, nor on
where the result lies: trying a shape compiles what a CUDA graph records of it.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from teegpu.files import user_folder
from teegpu.ringkernels import BIAS, LIMBS

# What is compiled is kept with all else of ours, where a service may write.
os.environ.setdefault("TRITON_CACHE_DIR", str(user_folder("cache") / "triton"))

_BIAS = tl.constexpr(BIAS)
_LIMBS = tl.constexpr(LIMBS)
_SPLIT_COLUMNS: Final = 1024
_GEMV_OUTPUTS: Final = 8
_GEMV_COLUMNS: Final = 512
_STAGES: Final = 4
"""Tiles of the inputs that are on their way at once, where the device's shared memory has room for them."""


def split(operand: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Fills ``out``, int32 (rows, outputs), for an operand, int32 (rows, columns), and an int8 weight (outputs, columns
    or more, a multiple of 16), both contiguous. A first kernel splits the operand into limbs."""
    (rows, columns), width = operand.shape, weight.shape[1]
    limbs = torch.empty((LIMBS * rows, width), dtype=torch.int8, device=operand.device)
    _launch(_split, (rows, triton.cdiv(width, _SPLIT_COLUMNS)), operand, limbs, columns, width, _SPLIT_COLUMNS)
    _multiply(limbs, operand.shape, weight, out)


def fused(operand: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """As ``split``, but each tile splits what it reads: one kernel less, and the same work once more for each tile."""
    _multiply(operand, operand.shape, weight, out)


def gemv(operand: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """As ``split``, but by int32 products, row by row: for so few that reading the weight is the work."""
    (rows, columns), (outputs, width) = operand.shape, weight.shape
    sizes = (outputs, columns, width, out.stride(0))
    grid = (rows, triton.cdiv(outputs, _GEMV_OUTPUTS))
    _launch(_gemv, grid, operand, weight, out, *sizes, _GEMV_OUTPUTS, _GEMV_COLUMNS, _STAGES)


class _Tile(NamedTuple):
    rows: int
    outputs: int
    columns: int
    warps: int

    @property
    def nbytes(self) -> int:
        """Of what is read for ``columns`` of it."""
        return self.columns * (LIMBS * self.rows + self.outputs)


def _tile(rows: int) -> _Tile:
    """Few rows: tiles so small that all processors of a device have one, and read the weight. Many: one as large as
    registers hold."""
    if rows <= 16:
        return _Tile(4 if rows <= 4 else 16, 32, 256, 4)
    return _Tile(64, 64 if rows <= 64 else 128, 128, 8)


def _multiply(values: torch.Tensor, shape: tuple[int, ...], weight: torch.Tensor, out: torch.Tensor) -> None:
    """By ``values``: an operand of ``shape``, or its limbs."""
    (rows, columns), (outputs, width), tile = shape, weight.shape, _tile(shape[0])
    stages = _STAGES
    if values.is_cuda:
        properties: Any = torch.cuda.get_device_properties(values.device)
        stages = min(stages, properties.shared_memory_per_block_optin // tile.nbytes)
    sizes = (rows, outputs, columns, width, out.stride(0))
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.outputs))
    limbs = values.dtype == torch.int8
    _launch(_product, grid, values, weight, out, *sizes, limbs, *tile[:3], num_warps=tile.warps, num_stages=stages)


def _launch(kernel: Any, grid: tuple[int, int], values: torch.Tensor, *others: Any, **options: int) -> None:
    """Raises ``RuntimeError`` where there can be no such kernel: it is compiled at its first call, which takes a C
    compiler, and a device may be too small."""
    try:
        with torch.cuda.device_of(values):
            kernel[grid](values, *others, **options)
    except (TritonError, subprocess.SubprocessError, OSError, AssertionError) as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


@triton.jit
def _limb(values, index):
    """Limb ``index`` of int32 values, as int8: see ``ringkernels.BIAS``."""
    return (((values + _BIAS) ^ _BIAS) >> (8 * index)).to(tl.int8)


@triton.jit
def _split(operand, limbs, columns, width, deep: tl.constexpr):
    """A row of ``operand`` (rows, columns) → its four of ``limbs`` (4 · rows, width), with zeros after the columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * deep + tl.arange(0, deep)
    values = tl.load(operand + row * columns + column, mask=column < columns, other=0)
    for index in tl.static_range(_LIMBS):
        tl.store(limbs + (row * _LIMBS + index) * width + column, _limb(values, index), mask=column < width)


@triton.jit(do_not_specialize=["rows", "outputs", "stride"], do_not_specialize_on_alignment=["out"])
def _product(
    values,
    weight,
    out,
    rows,
    outputs,
    columns,
    width,
    stride,
    limbs: tl.constexpr,
    high: tl.constexpr,
    wide: tl.constexpr,
    deep: tl.constexpr,
):
    """A tile of ``out``: ``high`` rows and ``wide`` outputs, by ``deep`` columns at once. ``limbs``: whether ``values``
    are these (4 · rows, width), or the operand (rows, columns)."""
    row = tl.program_id(0) * high + tl.arange(0, high)
    output = tl.program_id(1) * wide + tl.arange(0, wide)
    line = tl.program_id(0) * high * _LIMBS + tl.arange(0, high * _LIMBS)
    index = tl.arange(0, _LIMBS)
    factors = weight + output.to(tl.int64)[:, None] * width
    sums = tl.zeros((wide, high * _LIMBS), dtype=tl.int32)
    for start in range(0, width, deep):
        column = start + tl.arange(0, deep)
        mask = (output < outputs)[:, None] & (column < width)[None, :]
        factor = tl.load(factors + column[None, :], mask=mask, other=0)
        if limbs:
            mask = (line < rows * _LIMBS)[None, :] & (column < width)[:, None]
            four = tl.load(values + line.to(tl.int64)[None, :] * width + column[:, None], mask=mask, other=0)
        else:
            mask = (row < rows)[:, None] & (column < columns)[None, :]
            whole = tl.load(values + row.to(tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0)
            four = tl.trans(tl.reshape(_limb(whole[:, None, :], index[None, :, None]), (high * _LIMBS, deep)))
        sums = tl.dot(factor, four, sums, out_dtype=tl.int32)
    result = tl.sum(tl.reshape(sums, (wide, high, _LIMBS)) << (8 * index)[None, None, :], axis=2)
    places = out + row.to(tl.int64)[None, :] * stride + output[:, None]
    tl.store(places, result, mask=(row < rows)[None, :] & (output < outputs)[:, None])


@triton.jit(do_not_specialize=["outputs", "stride"], do_not_specialize_on_alignment=["out"])
def _gemv(
    operand,
    weight,
    out,
    outputs,
    columns,
    width,
    stride,
    wide: tl.constexpr,
    deep: tl.constexpr,
    stages: tl.constexpr,
):
    """``wide`` outputs of a row. Those of all rows come one after the other, so that a cache has the weight."""
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * wide + tl.arange(0, wide)
    factors = weight + output.to(tl.int64)[:, None] * width
    sums = tl.zeros((wide, deep), dtype=tl.int32)
    for start in tl.range(0, columns, deep, num_stages=stages):
        column = start + tl.arange(0, deep)
        values = tl.load(operand + row * columns + column, mask=column < columns, other=0)
        mask = (output < outputs)[:, None] & (column < columns)[None, :]
        factor = tl.load(factors + column[None, :], mask=mask, other=0)
        sums += factor.to(tl.int32) * values[None, :]
    tl.store(out + row * stride + output, tl.sum(sums, axis=1), mask=output < outputs)
