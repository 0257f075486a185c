"""The generated text; of a run that serves others, who is under way instead."""

from __future__ import annotations

from teegpu.monitor.draw import Line, Look, fit, paragraph
from teegpu.monitor.panels import requests
from teegpu.monitor.snapshot import Snapshot
from teegpu.units import printable

TAIL = 8000
"""Characters that a pane of the overview looks at: more than it can show."""


def tail(state: Snapshot, width: int, height: int, look: Look) -> list[Line]:
    """The end of the text, as much as there is room for."""
    if state.serving is not None:
        return requests.under_way(state.serving, width, height, look)
    return [fit(line, width) for line in lines(state, width, most=TAIL)[-height:]]


def shown(state: Snapshot, width: int, height: int, look: Look) -> list[Line]:
    """All of it."""
    if state.serving is not None:
        return requests.all_of_them(state.serving, width, height, look)
    return lines(state, width)


def lines(state: Snapshot, width: int, *, most: int | None = None) -> list[Line]:
    """All of the text (its last ``most`` characters), or why there is none."""
    if not state.text_known:
        if not state.ended and not state.replay and not state.tokens:
            return [(("no token yet", "dim"),)]
        told = "The text is not in the record. It stays with the run, unless record.save_text is on."
        return paragraph(told, width, "dim")
    text = state.text if most is None else state.text[-most:]
    made: list[Line] = []
    for source in text.replace("\t", "    ").split("\n"):
        made += paragraph(printable(source, len(source) + 1), width)
    if not state.ended and state.current.running and made:
        made[-1] = (*made[-1], ("▌", "accent"))
    return made
