"""What Textual 8 needs to be told, all in one place: our themes in its terms, and its screenshots."""

from __future__ import annotations

from typing import Any

from textual.app import App
from textual.theme import Theme

from teegpu.monitor import themes

VARIABLES = ("line", "focus", "title", "quiet", "head")
"""Names that ``styles.tcss`` uses beside Textual's own."""


def theme(name: str) -> Theme:
    """One of our palettes as a theme of Textual's."""
    colours = themes.COLOURS[name]
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
        dark=name == themes.DARK,
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
    colours = themes.COLOURS[name]
    roles = ("border", "focus", "bold", "dim", "track")
    return {variable: colours[role] for variable, role in zip(VARIABLES, roles, strict=True)}


def screenshot(app: App[Any], title: str) -> str:
    """The screen as SVG. Textual draws it with rich, which names its elements by a hash of what is in it."""
    return app.export_screenshot(title=title, simplify=True)
