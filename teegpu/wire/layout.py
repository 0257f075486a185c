"""The tensors of a message: one row of a table for each, and one frame, in the table's order.

A frame is exactly as long as its row says, so every byte belongs to one tensor: nothing can hide between them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import msgpack

from teegpu.wire import dtypes
from teegpu.wire.limits import REMEMBERED, REMEMBERED_TENSORS


class Row(NamedTuple):
    """One row of a tensor table."""

    register: str
    shape: tuple[int, ...]
    encoding: str


class Layout:
    """The ``rows`` of a table, the table ``packed``, and of every frame, the header's included, the kind: a label and
    the bytes per value."""

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self.rows = rows
        self.registers = tuple(row.register for row in rows)
        self.packed: bytes = msgpack.packb(rows)
        self.kinds: tuple[tuple[str, int], ...] = (
            HEADER_KIND,
            *((f"{row.register}/{row.encoding}", dtypes.itemsize(row.encoding)) for row in rows),
        )


HEADER_KIND: Final = ("header", 1)


def layout_of(rows: tuple[Row, ...]) -> Layout:
    """The layout of ``rows``; made once for those that come again."""
    return (_layout_of if len(rows) <= REMEMBERED_TENSORS else Layout)(rows)


_layout_of = lru_cache(maxsize=REMEMBERED)(Layout)
