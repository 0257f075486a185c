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

_CONTROLS = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}
"""Those that JSON allows bare, and a terminal obeys."""

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
    """``document``, indented, with lists of numbers on one line and no control characters; ends in a line break."""
    text = json.dumps(document, indent=2, ensure_ascii=False).translate(_CONTROLS)
    return _NUMBERS_ONLY.sub(_on_one_line, text) + "\n"


def _on_one_line(numbers: re.Match[str]) -> str:
    return "[" + ", ".join(numbers.group()[1:-1].replace(",", " ").split()) + "]"


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """``rows`` (headings first) as lines: the first ``left`` columns to the left, the others to the right."""
    widths = [max(cell_len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = [_padded(cell, width, left=place < left) for place, (cell, width) in enumerate(cells)]
        lines.append("  ".join(padded).rstrip())
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
