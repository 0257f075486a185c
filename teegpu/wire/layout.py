"""Which tensors of a message share a frame, and where each lies in it.

Neighbouring rows of a tensor table that have one narrow wire dtype (fp16, bf16, int8) share a frame, one tensor after
the other; in int8 all values come before all scales. They have to be converted in any case, so they are converted into
one piece of memory, and the receiver converts and checks them at once. So do those in int32, of which the server makes
several in one piece of memory. fp32 travels as it lies in memory, and a seed as it is, in a frame of its own. The rule
needs the table alone, so nothing else says what a frame holds, and every byte of it belongs to one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Final, NamedTuple

import msgpack
import torch

from teegpu.wire import dtypes
from teegpu.wire.limits import REMEMBERED, REMEMBERED_TENSORS

SHARED: Final = frozenset({"fp16", "bf16", "int8", "int32"})
"""Wire dtypes whose neighbours share a frame."""


class Row(NamedTuple):
    """One row of a tensor table."""

    register: str
    shape: tuple[int, ...]
    encoding: str


class FrameLayout:
    """One frame: the ``rows`` that it carries, all of wire dtype ``encoding``.

    ``sizes`` has the number of values of each row, ``nbytes`` the length of the frame. ``seamless``: the rows are of
    shape (1, n), and their tensors side by side are the frame's values, so that several may be handled as one."""

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self.rows = rows
        self.registers = tuple(row.register for row in rows)
        self.shapes = tuple(row.shape for row in rows)
        self.encoding = rows[0].encoding
        self.sizes = tuple(math.prod(shape) for shape in self.shapes)
        self.nbytes = sum(dtypes.nbytes(shape, self.encoding) for shape in self.shapes)
        self.seamless = all(len(shape) == 2 and shape[0] == 1 for shape in self.shapes)
        if self.encoding == "int8":  # no group of values may reach over a seam
            self.seamless = self.seamless and all(size % dtypes.GROUP == 0 for size in self.sizes[:-1])

    def narrow(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor whose memory is the frame: ``tensors``, one for each row and of its shape, in the wire's dtype.

        Of a seamless frame, neighbours may also come as one tensor (1, sum of n)."""
        if len(tensors) > 1 and self.seamless:
            # So short that one pass more costs less than a second call.
            tensors = (torch.cat(tuple(tensors), -1),)
        return dtypes.narrow_all(tensors, self.encoding)

    def decode(self, frame: memoryview) -> torch.Tensor:
        """All values of ``frame`` (n,), in the wire's own dtype (fp32 for int8), over its memory where that can be.

        Raises ``WireError`` as ``dtypes.decode`` does."""
        dtype = dtypes.PLAIN.get(self.encoding)
        if dtype is not None and frame.nbytes == self.nbytes and dtypes.is_plain(frame):
            return torch.frombuffer(frame, dtype=dtype)  # the way of nearly every frame
        return dtypes.decode_all(frame, self.shapes, self.encoding)

    def split(self, values: torch.Tensor) -> Sequence[torch.Tensor]:
        """Views of ``values`` (n,), one of each row's shape."""
        if len(self.shapes) == 1:
            return (values.view(self.shapes[0]),)
        if self.seamless:
            return torch.split_with_sizes(values.unsqueeze(0), self.sizes, -1)
        parts = torch.split_with_sizes(values, self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


class Layout:
    """The tensors of one message: the ``rows`` of its table, the ``frames`` that carry them, the table ``packed``, and
    of every frame, the header's included, the kind: a label and the bytes per value."""

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self.rows = rows
        self.frames = tuple(FrameLayout(run) for run in _runs(rows))
        self.packed: bytes = msgpack.packb(rows)
        self.kinds: tuple[tuple[str, int], ...] = (
            HEADER_KIND,
            *(
                (f"{'+'.join(frame.registers)}/{frame.encoding}", dtypes.itemsize(frame.encoding))
                for frame in self.frames
            ),
        )


HEADER_KIND: Final = ("header", 1)


def _runs(rows: tuple[Row, ...]) -> list[tuple[Row, ...]]:
    """``rows`` as they share frames."""
    found: list[tuple[Row, ...]] = []
    for encoding, group in groupby(rows, lambda row: row.encoding):
        run = tuple(group)
        found += [run] if encoding in SHARED else [(row,) for row in run]
    return found


def layout_of(rows: tuple[Row, ...]) -> Layout:
    """The layout of ``rows``; made once for those that come again."""
    return (_layout_of if len(rows) <= REMEMBERED_TENSORS else Layout)(rows)


_layout_of = lru_cache(maxsize=REMEMBERED)(Layout)
