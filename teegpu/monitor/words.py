"""Figures and facts as the monitor writes them."""

from __future__ import annotations

from teegpu.formats import NOTHING
from teegpu.monitor.draw import Look, Span
from teegpu.monitor.snapshot import Facts, Parts
from teegpu.report.parts import PARTS
from teegpu.units import human_bytes


def clock(seconds: float) -> str:
    """``65.2`` → ``1:05``; under a minute with one decimal."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def span_of(seconds: float) -> str:
    """A short time in three digits: ``12.3 ms``."""
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    size, unit = (1e-3, "ms") if seconds >= 0.9995e-3 else (1e-6, "µs")
    value = seconds / size
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}" if seconds else "0 s"


def rate(per_second: float) -> str:
    return f"{human_bytes(per_second)}/s"


def tokens_rate(per_second: float) -> str:
    return f"{per_second:,.0f} tok/s" if per_second >= 100 else f"{per_second:.1f} tok/s"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.9995 or share < 0.0005 else f"{share:.1%}"


def legend(parts: Parts, look: Look, *, other: bool = True, short: bool = False) -> list[list[Span]]:
    """Each part: its colour or letter, its name, its share; in few cells where it is to be ``short``."""
    total = parts.total
    items: list[list[Span]] = []
    for (role, part), value in zip(PARTS.items(), parts, strict=True):
        if role == "other" and (not other or value < 0.005 * total):
            continue
        mark = (part.letter, role) if look.letters else (" ", f"on {role}")
        share = value / total if total else 0.0
        name = part.shorter or part.short if short else part.short
        figure = (f"{share:.0%}" if short else percent(share)) if total else NOTHING
        items.append([mark, (f" {name} ", "dim"), (figure, "")])
    return items


def tee(facts: Facts) -> str:
    if not facts.tee_kind:
        return "none: development mode"
    return f"{facts.tee_kind}, {'attested' if facts.attested else 'not attested'}"


def keys(facts: Facts) -> str:
    return {None: NOTHING, True: "on", False: "off"}[facts.keys]
