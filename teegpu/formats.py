"""How results are written: the format that is meant, aligned rows, Markdown, and JSON that people can read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len

from teegpu.errors import UsageError, nearest

NOTHING = "–"
"""What stands where there is no figure."""

_NUMBERS_ONLY = re.compile(r"\[\s+[-+.\deE,\s]+\]")


def choose(given: str, out: str, formats: Sequence[str]) -> str:
    """The format: the one that is given, else that of the suffix of the file ``out``, else the first of ``formats``.

    Raises ``UsageError`` for one that is not among them.
    """
    if given and given not in formats:
        raise UsageError(f"--format {given} is not one of {', '.join(formats)}{nearest(given, list(formats))}")
    suffix = out.rpartition(".")[2].lower()
    return given or (suffix if suffix in formats else formats[0])


def as_json(document: Mapping[str, Any]) -> str:
    """``document``, indented, with lists of numbers on one line; ends in a line break."""
    return _NUMBERS_ONLY.sub(_on_one_line, json.dumps(document, indent=2, ensure_ascii=False)) + "\n"


def _on_one_line(numbers: re.Match[str]) -> str:
    return "[" + ", ".join(numbers.group()[1:-1].replace(",", " ").split()) + "]"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """``rows`` (headings first) as lines: the first column to the left, the others to the right."""
    widths = [max(cell_len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [_padded(row[0], widths[0], left=True)]
        cells += [_padded(cell, width, left=False) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _padded(text: str, width: int, *, left: bool) -> str:
    space = " " * (width - cell_len(text))
    return text + space if left else space + text


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """``rows`` (headings first) as a Markdown table, figures to the right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join([line(rows[0]), line(rule), *(line(row) for row in rows[1:])])
