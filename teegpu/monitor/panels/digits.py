"""Figures three rows high."""

from __future__ import annotations

from typing import Final

_GLYPHS: Final[dict[str, tuple[str, str, str]]] = {
    "0": ("╭─╮", "│ │", "╰─╯"),
    "1": ("╶╮ ", " │ ", "╶┴╴"),
    "2": ("╶─╮", "╭─╯", "╰─╴"),
    "3": ("╶─╮", " ─┤", "╶─╯"),
    "4": ("╷ ╷", "╰─┤", "  ╵"),
    "5": ("╭─╴", "╰─╮", "╶─╯"),
    "6": ("╭─╴", "├─╮", "╰─╯"),
    "7": ("╶─╮", "  │", "  ╵"),
    "8": ("╭─╮", "├─┤", "╰─╯"),
    "9": ("╭─╮", "╰─┤", "╶─╯"),
    ".": (" ", " ", "."),
    ",": (" ", " ", ","),
    "%": ("o ╱", " ╱ ", "╱ o"),
    "–": ("   ", "╶─╴", "   "),
}


def big(text: str) -> tuple[str, str, str]:
    """``text`` in three rows of equal length; a character that has no shape stands in the middle row as it is."""
    glyphs = [_GLYPHS.get(character, (" ", character, " ")) for character in text]
    first, second, third = ("".join(glyph[row] for glyph in glyphs) for row in range(3))
    return first, second, third
