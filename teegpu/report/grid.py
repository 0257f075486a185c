"""Rows and columns of a report, in plain strings."""

from __future__ import annotations

from dataclasses import dataclass

HEADING, TOTAL, PLAIN = "heading", "total", ""


@dataclass(frozen=True)
class Row:
    """``kind``: ``HEADING`` (column titles of the rows below it), ``TOTAL`` or ``PLAIN``."""

    cells: tuple[str, ...]
    kind: str = PLAIN


@dataclass(frozen=True)
class Grid:
    """The first cell of a row is a label, the others are figures. ``notes`` stand below the rows."""

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> int:
        return max(len(row.cells) for row in self.rows)
