"""Figures and facts as the monitor writes them."""

from __future__ import annotations

from teegpu.monitor.draw import LETTERS, NAMES, PARTS, SHORT_NAMES, Look, Span
from teegpu.monitor.snapshot import Facts, Parts
from teegpu.units import human_bytes

NOTHING = "–"


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
    for size, unit in ((1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size * 0.9995:
            value = seconds / size
            return (
                f"{value:.0f} {unit}"
                if value >= 100
                else f"{value:.1f} {unit}"
                if value >= 10
                else f"{value:.2f} {unit}"
            )
    return "0 s" if not seconds else f"{seconds * 1e6:.2f} µs"


def rate(per_second: float) -> str:
    return f"{human_bytes(per_second)}/s"


def tokens_rate(per_second: float) -> str:
    return f"{per_second:,.0f} tok/s" if per_second >= 100 else f"{per_second:.1f} tok/s"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.9995 or share < 0.0005 else f"{share:.1%}"


def plural(count: int, word: str, many: str = "") -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {many or word + 's'}"


def legend(parts: Parts, look: Look, *, other: bool = True, short: bool = False) -> list[list[Span]]:
    """Each part: its colour or letter, its name, its share; in few cells where it is to be ``short``."""
    total = parts.total
    items: list[list[Span]] = []
    for role, value in zip(PARTS, parts.bars, strict=True):
        if role == "other" and (not other or value < 0.005 * total):
            continue
        mark = (LETTERS[role], role) if look.letters else (" ", f"on {role}")
        share = value / total if total else 0.0
        name = SHORT_NAMES.get(role, NAMES[role]) if short else NAMES[role]
        figure = (f"{share:.0%}" if short else percent(share)) if total else NOTHING
        items.append([mark, (f" {name} ", "dim"), (figure, "")])
    return items


def how(facts: Facts) -> list[str]:
    """How the work is split, in a few words."""
    words = [facts.model, facts.plan, privacy(facts)]
    if facts.plan != "local":
        words += [facts.transport, facts.wire_dtype]
    if facts.link:
        words.append(f"link {facts.link}")
    return [word for word in words if word]


def privacy(facts: Facts) -> str:
    """How values are hidden from the servers, and whether products are checked; empty where neither is."""
    if facts.privacy == "none":
        return "verified" if facts.verified else ""
    if facts.privacy == "reference":
        return facts.privacy
    return f"{facts.privacy}, {'verified' if facts.verified else 'not verified'}"


def tee(facts: Facts) -> str:
    if facts.tee_kind in ("", "none"):
        return "none: development mode"
    return f"{facts.tee_kind}, {'attested' if facts.attested else 'not attested'}"


def keys(facts: Facts) -> str:
    return {None: NOTHING, True: "on (CURVE)", False: "off"}[facts.keys]
