"""Products of int32 operands with an int8 matrix, exact modulo 2**32: some ways, and which is quickest here.

No processor has an instruction for these, so each way borrows one that is there. ``float64`` is exact by IEEE 754,
whatever the values and the machine. The others are as exact as the kernels of torch and Triton, some of which have been
seen to be wrong for some shapes (a matrix of one column, say). So each is tried on the extremes of every shape before
it computes one of that shape, and where it isn't exact, ``float64`` does it.

- ``float64``: a weight is at most 128 and an operand 2**31 in size, so a sum of ``in`` products stays below 2**51 for
  ``in`` up to 8,192. The sum starts at 1.5 · 2**52, where float64 has a step of 1: its lowest 32 bits then are the
  result modulo 2**32, and nothing needs to be converted. Half of float32's speed on any CPU.
- ``int8``: an operand is four signed limbs of 8 bits, ``x = Σ limb[i] · 256**i``; their products with the matrix are
  one product of four times the rows, with int32 sums. Quick where there are instructions for it: VNNI, AMX, CUDA.
- ``bf16``: the same limbs as floats, whose products fp32 sums exactly where columns are cut at 1,024: the sizes of all
  terms together are at most 128 · 128 · 1,024 = 2**24. For devices whose units for int8 and float64 are weak.
- ``int32``: torch's own product of int32, which wraps. On CPUs, for few rows, where reading the matrix is the work.
- ``split``, ``fused``, ``gemv``: limbs and int32 on CUDA, by kernels of our own that write nothing but the result (see
  ``ringtriton``).

Which is quickest depends on the processor, the number of rows and the threads, so it is measured once per process: on a
CPU in a fraction of a second, on CUDA in some seconds the first time, since kernels are compiled then.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Final

import torch

log = logging.getLogger("teegpu.ring")

_MAGIC: Final = 1.5 * 2.0**52
EXACT_COLUMNS: Final = 2**51 // 2**38
"""Columns whose products a float64 sums exactly above ``_MAGIC``, whatever the operand. More are cut."""

INT8_COLUMNS: Final = 2**16
"""Columns whose products of limbs an int32 sums, also where limbs are shifted to be unsigned, as oneDNN does."""

BF16_COLUMNS: Final = 2**24 // 2**14
"""Columns whose products of limbs fp32 sums exactly, in whatever order."""

BLOCK_ROWS: Final = 1024
BLOCK_OUTPUTS: Final = {"cpu": 2**12, "cuda": 2**15}
BLOCK_WEIGHTS: Final = {"cpu": 2**22, "cuda": 2**27}
"""Rows of the operand, rows of the matrix, and values of the matrix that are worked on at once at most, so that what is
computed on the way stays bounded. A CUDA device works on all of most matrices at once."""

BIAS: Final = -0x7F7F7F80  # 0x80808080 as int32
"""Added, and taken away again bit by bit, it leaves the four signed limbs as bytes."""
LIMBS: Final = 4
_CUDA_ROWS: Final = 32
"""The fewest rows of an int8 product on CUDA, which asks for more than 16."""
MULTIPLE: Final = 16
"""Columns and rows of an int8 matrix on CUDA are multiples of this, so that each of its rows is aligned."""

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# torch's own products, of which nothing is taken on trust.
_int32_product: Product = torch.matmul
_int8_product: Product = torch._int_mm


def _bf16_product(limbs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """On a CPU, which has no such product with sums in fp32, in fp32."""
    if limbs.is_cuda:
        sums = torch.mm(limbs.to(torch.bfloat16), weight.to(torch.bfloat16), out_dtype=torch.float32)
    else:
        sums = limbs.to(torch.float32) @ weight.to(torch.float32)
    return sums.to(torch.int32)


Way = Callable[[torch.Tensor, torch.Tensor, Sequence[torch.Tensor]], None]
"""Takes an operand, int32 (rows, in), and a weight (out, in) of int8 or int32, and fills the outputs: int32 (rows, n),
each for ``n`` further rows of the weight."""


def float64(operand: torch.Tensor, weight: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
    for part in _steps(operand.shape[1], EXACT_COLUMNS):
        for rows in _steps(operand.shape[0], BLOCK_ROWS):
            wide = operand[rows, part].to(torch.float64)
            for block in _blocks(weight):
                factor = weight[block, part].to(torch.float64)
                sums = torch.full((wide.shape[0], factor.shape[0]), _MAGIC, dtype=torch.float64, device=wide.device)
                low = sums.addmm_(wide, factor.t()).view(torch.int32)[:, ::2]  # the first half: little-endian
                for out, found in _places(outputs, rows, block):
                    if part.start:
                        out.add_(low[:, found])
                    else:
                        out.copy_(low[:, found])


def int32(operand: torch.Tensor, weight: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
    for rows in _steps(operand.shape[0], BLOCK_ROWS):
        for block in _blocks(weight):
            product = _int32_product(operand[rows], weight[block].to(torch.int32).t())
            for out, found in _places(outputs, rows, block):
                out.copy_(product[:, found])


def int8(operand: torch.Tensor, weight: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
    _by_limbs(_int8_product, INT8_COLUMNS, operand, weight, outputs)


def bf16(operand: torch.Tensor, weight: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
    _by_limbs(_bf16_product, BF16_COLUMNS, operand, weight, outputs)


def _by_limbs(
    product: Product, columns: int, operand: torch.Tensor, weight: torch.Tensor, outputs: Sequence[torch.Tensor]
) -> None:
    """By a ``product`` of int8 that is exact for so many ``columns``. On CUDA ``weight`` has zeros up to a ``MULTIPLE``
    of rows and columns."""
    for first in range(0, operand.shape[1], columns):
        part = slice(first, first + columns)
        for rows in _steps(operand.shape[0], BLOCK_ROWS):
            limbs = _limbs(operand[rows, part], weight[:1, part].shape[1])
            count = operand[rows].shape[0]
            for block in _blocks(weight):
                sums = product(limbs, weight[block, part].t())[: LIMBS * count]
                lowest, low, high, highest = sums.view(LIMBS, count, -1).unbind()
                rest = low.add_(high.add_(highest, alpha=256), alpha=256)
                for out, found in _places(outputs, rows, block):
                    if first:
                        out.add_(lowest[:, found].add_(rest[:, found], alpha=256))
                    else:
                        torch.add(lowest[:, found], rest[:, found], alpha=256, out=out)


def _by_kernel(name: str, operand: torch.Tensor, weight: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
    """By that one of ``ringtriton``."""
    from teegpu import ringtriton  # not everywhere, and it takes a while

    multiply = getattr(ringtriton, name)
    for rows in _steps(operand.shape[0], BLOCK_ROWS):
        for block in _blocks(weight):
            for out, found in _places(outputs, rows, block):
                multiply(operand[rows].contiguous(), weight[block][found], out)


def padded(weight: torch.Tensor) -> torch.Tensor:
    """int8 ``weight`` with zeros up to a ``MULTIPLE`` of rows and columns; itself where it needs none."""
    rows, columns = (-size % MULTIPLE for size in weight.shape)
    return torch.nn.functional.pad(weight, (0, columns, 0, rows)) if rows or columns else weight


WAYS: Final[dict[str, Way]] = {
    "float64": float64,
    "int8": int8,
    "bf16": bf16,
    "int32": int32,
    "split": partial(_by_kernel, "split"),
    "fused": partial(_by_kernel, "fused"),
    "gemv": partial(_by_kernel, "gemv"),
}
CANDIDATES: Final = {"cpu": ("int8", "int32"), "cuda": ("int8", "bf16", "split", "fused", "gemv")}
"""What may be quicker than ``float64`` there."""


def multiply(operand: torch.Tensor, weight: torch.Tensor, outputs: Sequence[torch.Tensor], way: str = "") -> None:
    """As a ``Way``, by ``way`` or else the quickest one, and exact whatever the shape."""
    rows, device = operand.shape[0], operand.device
    way = way or quickest(rows, device)
    shape = (rows, operand.shape[1], *weight.shape)
    if way != "float64" and not _exact(way, shape, weight.dtype, device, torch.get_num_threads()):
        way = "float64"
    WAYS[way](operand, weight, outputs)


def scratch_bytes(rows: int, columns: int, outputs: int, device: torch.device) -> int:
    """The memory that any way needs on ``device`` beside its operand and its outputs, at most, for a weight (outputs,
    columns); what trying it takes included."""
    width = min(-(-outputs // MULTIPLE) * MULTIPLE, _block_outputs(columns, device))
    return min(rows, BLOCK_ROWS) * (16 * columns + 40 * width) + 13 * columns * width


def _steps(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _blocks(weight: torch.Tensor) -> Iterator[slice]:
    """Rows of ``weight`` to work on at once, a ``MULTIPLE`` of them but for the last."""
    return _steps(weight.shape[0], _block_outputs(weight.shape[1], weight.device))


def _block_outputs(columns: int, device: torch.device) -> int:
    fitting = BLOCK_WEIGHTS[_kind(device)] // columns // MULTIPLE * MULTIPLE
    return min(max(fitting, MULTIPLE), BLOCK_OUTPUTS[_kind(device)])


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cuda" else "cpu"


def _places(outputs: Sequence[torch.Tensor], rows: slice, block: slice) -> Iterator[tuple[torch.Tensor, slice]]:
    """Where the products of ``rows`` with a ``block`` of the weight belong: parts of outputs, and which of the products
    go there."""
    start = 0
    for out in outputs:
        left, right = max(block.start, start), min(block.stop, start + out.shape[1])
        if left < right:
            yield out[rows, left - start : right - start], slice(left - block.start, right - block.start)
        start += out.shape[1]


def _limbs(operand: torch.Tensor, columns: int) -> torch.Tensor:
    """int32 (rows, in) → int8 (4 · rows or more, columns): the lowest limbs of all rows first, zeros where there is no
    value."""
    rows, used = operand.shape
    signed = (operand + BIAS) ^ BIAS
    if operand.is_cuda:
        height = max(_CUDA_ROWS, LIMBS * rows)
        make = torch.empty if (height, columns) == (LIMBS * rows, used) else torch.zeros
        limbs = make((height, columns), dtype=torch.int8, device=operand.device)
        four = signed.view(torch.int8).view(rows, used, LIMBS).permute(2, 0, 1)
        limbs[: LIMBS * rows].view(LIMBS, rows, columns)[:, :, :used].copy_(four)
        return limbs
    # On a CPU the same copy takes twice the time of four shifts.
    limbs = torch.empty((LIMBS * rows, used), dtype=torch.int8)
    for index, part in enumerate(limbs.chunk(LIMBS)):
        part.copy_(signed >> (8 * index))
    return limbs


# Which are exact

_NOT_HERE: Final = (RuntimeError, ImportError)
"""What a way raises that can't be had."""


@lru_cache(4096)
def _exact(way: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, threads: int) -> bool:
    """Whether ``way`` is exact for an operand and a weight of ``shape`` (rows, columns; outputs, columns with padding):
    for each block that it makes of them."""
    rows, columns, outputs, padded_columns = shape
    return all(
        _exact_block(way, height, columns, width, padded_columns, dtype, device, threads)
        for height in _sizes(rows, BLOCK_ROWS)
        for width in _sizes(outputs, _block_outputs(padded_columns, device))
    )


def _sizes(count: int, step: int) -> set[int]:
    return {part.stop - part.start for part in (*_steps(min(count, step), step), *_steps(count % step, step))}


@cache
def _exact_block(
    way: str,
    rows: int,
    columns: int,
    outputs: int,
    padded_columns: int,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,  # noqa: ARG001 (kernels cut the work by it)
) -> bool:
    """Never forgotten: there are no more than ``BLOCK_ROWS`` heights, and a model's shapes; and what was found out must
    not be asked again while CUDA records a graph."""
    operand, weight = _extremes(rows, columns, outputs, padded_columns, device)
    expected = torch.empty((rows, outputs), dtype=torch.int32, device=device)
    float64(operand, weight, (expected,))
    found = torch.zeros_like(expected)
    try:
        WAYS[way](operand, weight.to(dtype), (found,))
    except _NOT_HERE:
        return False
    return torch.equal(found, expected)


def _extremes(
    rows: int, columns: int, outputs: int, padded_columns: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """An operand and an int8 weight with the largest values that there are, so that what overflows on the way shows,
    and different enough that what is read in the wrong place does."""
    weight = torch.full((outputs, padded_columns), 127, dtype=torch.int8, device=device)
    weight[::2] = -127
    weight[::3, ::5] = 1
    weight[1::7, 1::3] = -86
    weight[:, columns:] = 0
    operand = torch.full((rows, columns), -(2**31), dtype=torch.int32, device=device)
    operand[:, ::3] = 2**31 - 1
    operand[::2, ::7] = 0x7F80FF01
    operand[1::3, 1::5] = -0x55AA1234
    return operand, weight


# Which is quickest

_PROBES: Final[Mapping[str, Mapping[int, tuple[int, int]]]] = {
    "cpu": {1: (1024, 1024), 8: (1024, 1024), 64: (512, 512)},
    "cuda": dict.fromkeys((1, 4, 8, 64, 256, 1024), (28672, 4096)),
}
"""Numbers of rows that are tried, and the rows and columns of the matrix. On a CPU enough of them that the work counts
and not the calls, and few enough that the slowest way is soon done; on CUDA gate and up of a model of 8 billion
weights, which no cache holds."""
_MANY: Final = 64
"""Rows from which on ``int32`` is not tried: it goes through the matrix without thought for the caches, and on a larger
one than is tried here it takes ten times as long as ``float64``."""
_PROBE_TIMES: Final = 3
_HOPELESS: Final = 4.0
"""A way that takes this many times as long as another at its first call is not called again on a CPU. On CUDA the first
call may compile."""
_ASLEEP_CYCLES: Final = 2**21
"""For about a millisecond a device waits until all kernels of a call are queued: what counts is how long they run."""


def quickest(rows: int, device: torch.device) -> str:
    """The name in ``WAYS`` of the quickest for this many rows on ``device``."""
    found = measured(device)
    return found[max(probed for probed in found if probed <= rows)]


def measured(device: torch.device) -> dict[int, str]:
    """The quickest way on ``device`` for each number of rows that was tried; up to the next one, it stands for all.
    Measured at the first call, and again for another number of threads."""
    return _measured(device, torch.get_num_threads())


@cache
def _measured(device: torch.device, threads: int) -> dict[int, str]:  # noqa: ARG001
    best: dict[int, str] = {}
    for rows, (outputs, columns) in _PROBES[_kind(device)].items():
        operand, weight = _extremes(rows, columns, outputs, columns, device)
        wide = weight.to(torch.int32) if "int32" in CANDIDATES[_kind(device)] else weight
        expected = torch.empty((rows, outputs), dtype=torch.int32, device=device)
        float64(operand, weight, (expected,))  # where memory is short this raises: nothing can be told then
        seconds: dict[str, float] = {}
        for name in ("float64", *CANDIDATES[_kind(device)]):
            if name == "int32" and rows >= _MANY:
                continue
            result, rival = torch.zeros_like(expected), min(seconds.values(), default=math.inf)
            taken = _seconds(name, operand, wide if name == "int32" else weight, result, rival)
            if torch.equal(result, expected):
                seconds[name] = taken
        best[rows] = min(seconds, key=seconds.__getitem__)
        log.debug("products of %d rows on %s, seconds: %s", rows, device, seconds)
    return best


def _seconds(name: str, operand: torch.Tensor, weight: torch.Tensor, result: torch.Tensor, rival: float) -> float:
    """The least seconds of some calls of a way; infinity where it can't be had here. ``rival``: those of another."""
    taken = math.inf
    for call in range(1 + _PROBE_TIMES):
        try:
            spent = timed(partial(WAYS[name], operand, weight, (result,)), operand.device)
        except _NOT_HERE as error:
            log.info("no products by %s on %s: %s", name, operand.device, error)
            return math.inf
        if call:  # the first one also prepares what is kept
            taken = min(taken, spent)
        elif not operand.is_cuda and spent > _HOPELESS * max(rival, 1e-3):
            return spent
    return taken


def timed(call: Callable[[], object], device: torch.device) -> float:
    """The seconds that ``call`` takes; on CUDA those of the kernels that it queues."""
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_ASLEEP_CYCLES)
        begin.record()
        call()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3
