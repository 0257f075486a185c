"""The monitor's two themes, and all that Textual 8 has to know of them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

from rich.style import Style

from teegpu.report.parts import PARTS

if TYPE_CHECKING:
    from textual.theme import Theme

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
        **{part.name: part.dark for part in PARTS.values()},
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
        **{part.name: part.light for part in PARTS.values()},
        "accent": "#0072b2",
        "good": "#007a5a",
        "warn": "#946c00",
        "bad": "#c2410c",
    },
}
"""By theme and role."""


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


VARIABLES = ("line", "focus", "title", "quiet", "head")
"""Names that ``styles.tcss`` uses beside Textual's own."""


def theme(name: str) -> Theme:
    """One of our palettes as a theme of Textual's."""
    from textual.theme import Theme  # what needs no screen does without it

    colours = COLOURS[name]
    return Theme(
        name=name,
        primary=colours["accent"],
        secondary=colours["tee"],
        warning=colours["warn"],
        error=colours["bad"],
        success=colours["good"],
        accent=colours["accent"],
        foreground=colours["text"],
        background=colours["background"],
        surface=colours["surface"],
        panel=colours["track"],
        dark=name == DARK,
        variables={
            **variables(name),
            "footer-background": colours["track"],
            "footer-key-foreground": colours["accent"],
            "footer-description-foreground": colours["dim"],
            "footer-description-background": colours["track"],
            "footer-item-background": colours["track"],
            "footer-key-background": colours["track"],
        },
    )


def variables(name: str) -> dict[str, str]:
    """Our own names, for themes that do not know them."""
    colours = COLOURS[name]
    roles = ("border", "focus", "bold", "dim", "track")
    return {variable: colours[role] for variable, role in zip(VARIABLES, roles, strict=True)}
