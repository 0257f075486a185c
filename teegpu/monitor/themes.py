"""The monitor's two themes, with colours that people tell apart however they see them (after Okabe and Ito)."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from rich.style import Style

DARK: Final = "teegpu-dark"
LIGHT: Final = "teegpu-light"

COLOURS: Final[dict[str, dict[str, str]]] = {
    DARK: {
        "background": "#0d1219",
        "surface": "#121922",
        "border": "#2b3a4a",
        "focus": "#56b4e9",
        "text": "#d7dee7",
        "dim": "#8292a3",
        "bold": "#f2f5f8",
        "track": "#1e2834",
        "cursor": "#22384a",
        "tee": "#12b886",
        "serialization": "#f0c419",
        "network": "#e8590c",
        "server": "#cc79a7",
        "gpu": "#56b4e9",
        "other": "#5f6b78",
        "accent": "#56b4e9",
        "good": "#12b886",
        "warn": "#f0c419",
        "bad": "#ff6b4a",
    },
    LIGHT: {
        "background": "#f6f8fa",
        "surface": "#ffffff",
        "border": "#c3ccd6",
        "focus": "#0072b2",
        "text": "#1d2731",
        "dim": "#5b6875",
        "bold": "#05090d",
        "track": "#e6ebf0",
        "cursor": "#d5e7f4",
        "tee": "#009e73",
        "serialization": "#e0a800",
        "network": "#d55e00",
        "server": "#b65c8f",
        "gpu": "#3d9fda",
        "other": "#9aa5b1",
        "accent": "#0072b2",
        "good": "#007a5a",
        "warn": "#946c00",
        "bad": "#c2410c",
    },
}
"""By theme and role. Parts of the time are Okabe and Ito's bluish green, yellow, vermillion, purple and blue, a little
lighter or darker where the background asks for it; they differ in brightness too."""


@lru_cache(maxsize=4096)
def style(role: str, theme: str = DARK) -> Style:
    """The look of a role: ``"tee"``, ``"gpu on network"`` (a colour on another), ``"on track"``, ``""``. A ``bold``
    before it makes the text bold: ``"bold good"``."""
    colours = COLOURS.get(theme, COLOURS[DARK])
    front, _, back = role.partition("on ") if role.startswith("on ") else role.partition(" on ")
    bold = front == "bold" or front.startswith("bold ")
    name = front.removeprefix("bold ").strip() if front != "bold" else "bold"
    return Style(
        color=colours.get(name),
        bgcolor=colours.get(back),
        bold=bold or None,
    )
