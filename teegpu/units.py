"""Figures as people read them."""

from __future__ import annotations

from collections.abc import Callable


def human_bytes(count: float) -> str:
    """``1536`` → ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        # what would be rounded up to 1024 belongs to the next unit
        if count < 1023.95 or (unit == "B" and count < 1024):
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def fixed(digits: int) -> Callable[[float], str]:
    """Writes numbers with so many decimals."""
    return lambda value: f"{value:,.{digits}f}"


def count(value: float) -> str:
    """A whole number as such, else one decimal (calls per step, with speculation)."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def plural(number: float, word: str, many: str = "") -> str:
    """``1 token``, ``1,024 tokens``; ``many`` where it is not ``word`` with an s."""
    return f"{number:,.0f} {word if number == 1 else many or word + 's'}"


def percent(value: float) -> str:
    """``0.125`` → ``12.5%``."""
    return f"{value:.1%}"


def times(value: float) -> str:
    """``1.5`` → ``1.50×``."""
    return f"{value:.2f}×"


def human_seconds(seconds: float) -> str:
    """Three or four digits that say something: ``0.00123`` → ``1.23 ms``, ``75.2`` → ``75.20 s``."""
    size = abs(seconds)
    if size >= 0.9995:
        return f"{seconds:,.3f} s" if size < 10 else f"{seconds:,.2f} s"
    if size >= 0.0009995:
        return f"{seconds * 1e3:.3g} ms" if size < 0.1 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds * 1e6:.3g} µs" if seconds else "0 s"


def about_seconds(seconds: float) -> str:
    """An estimate: two digits. ``9.337`` → ``9.3 s``, ``0.0212`` → ``21 ms``."""
    if abs(seconds) >= 0.995:
        return f"{seconds:,.1f} s" if abs(seconds) < 9.95 else f"{seconds:,.0f} s"
    return f"{float(f'{seconds * 1e3:.2g}'):g} ms"


def human_age(seconds: float) -> str:
    """How long ago: ``90`` → ``1 min``, ``200000`` → ``2 d``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"


def one_line(text: object, limit: int = 200) -> str:
    """What an error of somebody else's says, cut to ``limit``, without line breaks and runs of spaces."""
    return " ".join(str(text).split())[:limit]


def printable(text: str, limit: int = 400) -> str:
    """``text`` from elsewhere, as one line that is fit for a terminal: no control characters, so no escape sequences,
    and nothing that turns its direction around. What is longer than ``limit`` is cut."""
    shown = "".join(char if char.isprintable() else " " if char.isspace() else "�" for char in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
