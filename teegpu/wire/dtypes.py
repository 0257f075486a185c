"""How a tensor becomes the bytes of one frame, and back.

| name  | bytes for (rows, n)                  | use                                       |
|-------|--------------------------------------|-------------------------------------------|
| fp32  | 4·rows·n                             | exact                                     |
| bf16  | 2·rows·n                             | fp32's range, 8 bits of precision         |
| fp16  | 2·rows·n                             | 11 bits of precision, ends at 65,504      |
| int8  | rows·n + 2·rows·⌈n/64⌉               | groups of 64 values share an fp16 scale   |
| int32 | 4·rows·n                             | token ids; values modulo 2**32            |
| seed  | 32                                   | the int32 tensor that is expanded from it |

What a wire dtype can't hold stays visible, it is never clipped in silence: in fp16 it becomes infinite; in int8, which
ends at ±127 · 65,504, its group's scale becomes infinite (or NaN, for NaN), and the receiver refuses the message.

Encoding copies only where the dtype changes or the memory is not contiguous; decoding wraps the received bytes and
copies only to change the dtype. Little-endian throughout.
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache
from typing import Final

import torch

from teegpu import facts
from teegpu.errors import WireError
from teegpu.kernels import convert
from teegpu.ring import SEED_BYTES

if sys.byteorder != "little":
    raise ImportError("teegpu's wire format is little-endian, and so must the machine be")

PLAIN: Final[dict[str, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int32": torch.int32,
}
FLOATS: Final = tuple(facts.WIRE_DTYPES)
TENSORS: Final = (*FLOATS, "int32")
NAMES: Final = (*TENSORS, "seed")
"""A seed stands for a tensor and holds none: it is read and written in ``codec``."""

GROUP: Final = facts.INT8.group
"""Values that share one int8 scale: 3 % more bytes than one scale per token, a fifth of its error."""

_SMALLEST_SCALE: Final = 2.0**-24
"""The smallest positive fp16: an all-zero group must not divide by zero."""
_SCALE_ROUNDING: Final = 2.0**-25
"""Half of the smallest step of fp16: no scale is then rounded down by more than a 2,048th of itself."""
_BLOCK_VALUES: Final = 2**18
"""Values that are quantised at once on a CPU: what is computed on the way stays in the cache, and small enough that the
allocator keeps the memory for the next block (fresh pages cost more than the arithmetic)."""


def itemsize(name: str) -> int:
    """Bytes per value, scales left out; of a seed, which holds none, 1."""
    return PLAIN[name].itemsize if name in PLAIN else 1


@lru_cache(maxsize=4096)
def nbytes(shape: tuple[int, ...], name: str) -> int:
    """Bytes of a frame that holds ``shape`` in wire dtype ``name``."""
    if name == "seed":
        return SEED_BYTES
    values = math.prod(shape)
    if name != "int8":
        return values * PLAIN[name].itemsize
    rows = values // shape[-1] if shape[-1] else 0
    return values + 2 * rows * math.ceil(shape[-1] / GROUP)


def narrow(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """``tensor`` as the tensor whose memory is the frame of wire dtype ``name``.

    It has 1 or more dimensions, is not empty, and may be on any device. Where no conversion is needed the result is
    ``tensor`` itself. int8 gives uint8 (bytes,): all values, then all scales.
    """
    return _quantise(tensor) if name == "int8" else convert(tensor, PLAIN[name]).contiguous()


def frame_of(narrowed: torch.Tensor) -> memoryview:
    """The bytes of what ``narrow`` returned, on the CPU. The view shares and keeps alive the tensor's memory."""
    if narrowed.dtype == torch.bfloat16:  # NumPy has none
        narrowed = narrowed.view(torch.int16)
    if narrowed.requires_grad:
        narrowed = narrowed.detach()
    return memoryview(narrowed.numpy()).cast("B")


def encode(tensor: torch.Tensor, name: str) -> memoryview:
    """The bytes of ``tensor`` (1 or more dimensions, on the CPU, not empty) in wire dtype ``name``.

    Where no conversion was needed the view *is* the tensor's memory, so the tensor must not be written until the frame
    has been sent.
    """
    return frame_of(narrow(tensor, name))


def decode(frame: memoryview, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """A tensor of ``shape`` over the bytes of ``frame``: the wire's own dtype, fp32 for int8.

    Raises ``WireError`` when the frame has another length than ``shape`` needs, or an int8 scale is not finite.
    """
    expected = nbytes(shape, name)
    if frame.nbytes != expected:
        raise WireError(f"a tensor {shape} in {name} takes {expected} bytes, its frame holds {frame.nbytes}")
    if frame.readonly or frame.ndim != 1 or frame.itemsize != 1:  # of memory that can't be written torch warns
        frame = memoryview(bytearray(frame))
    return _dequantise(frame, shape) if name == "int8" else torch.frombuffer(frame, dtype=PLAIN[name]).view(shape)


def _quantise(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 (bytes,): all values, then the scales of all groups in fp16."""
    rows, n, groups = _blocks(tuple(tensor.shape))
    scales = torch.empty((rows, groups, 1), dtype=torch.float16, device=tensor.device)
    out = torch.empty(rows * n + scales.nbytes, dtype=torch.uint8, device=tensor.device)
    source, quantised = tensor.detach().reshape(rows, n), out[: rows * n].view(torch.int8).view(rows, n)
    step = rows if tensor.is_cuda else max(1, _BLOCK_VALUES // n)
    for first in range(0, rows, step):
        block = slice(first, first + step)
        _quantise_rows(source[block], quantised[block], scales[block])
    out[rows * n :].copy_(scales.view(torch.uint8).view(-1))
    return out


@lru_cache(maxsize=4096)
def _blocks(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Rows, values of a row, and groups of a row."""
    n = shape[-1]
    return math.prod(shape) // n, n, math.ceil(n / GROUP)


def _quantise_rows(source: torch.Tensor, quantised: torch.Tensor, scales: torch.Tensor) -> None:
    """Fills ``quantised`` (rows, n) and ``scales`` (rows, groups, 1) from ``source`` (rows, n)."""
    rows, groups, _ = scales.shape
    n = source.shape[-1]
    values = source.to(torch.float32)
    if n % GROUP:
        values = torch.nn.functional.pad(values, (0, groups * GROUP - n))
    grouped = values.view(rows, groups, GROUP)
    # Two reductions: over rows of 64, torch's aminmax takes eight times as long as amax and amin together.
    largest = torch.maximum(grouped.amax(-1, keepdim=True), grouped.amin(-1, keepdim=True).neg_())
    scales.copy_(largest.mul_(1.0 / 127.0).add_(_SCALE_ROUNDING).clamp_min_(_SMALLEST_SCALE))
    # By the scale as it will be read, rounded to fp16, so that the rounding of the scale costs no accuracy. No quotient
    # is then beyond 127.1, so nothing has to be clipped.
    steps = (grouped * scales.to(torch.float32).reciprocal_()).round_()
    quantised.copy_(steps.view(rows, groups * GROUP)[:, :n])


def _dequantise(frame: memoryview, shape: tuple[int, ...]) -> torch.Tensor:
    rows, n, groups = _blocks(shape)
    count = rows * n
    quantised = torch.frombuffer(frame, dtype=torch.int8, count=count)
    if count % 2:  # the scales do not start on an even address
        halves = torch.frombuffer(frame, dtype=torch.uint8, offset=count).clone().view(torch.float16)
    else:
        halves = torch.frombuffer(frame, dtype=torch.float16, offset=count)
    scales = halves.to(torch.float32)
    if not math.isfinite(scales.sum().item()):
        raise WireError("an int8 tensor has a scale that is not finite: what was sent is out of range, or not finite")
    values = quantised.to(torch.float32)
    if n % GROUP == 0:
        return values.view(-1, GROUP).mul_(scales.unsqueeze(-1)).view(shape)
    expanded = scales.view(rows, groups, 1).expand(rows, groups, GROUP).reshape(rows, groups * GROUP)[:, :n]
    return values.view(rows, n).mul_(expanded).view(shape)
