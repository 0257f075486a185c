"""The generated text."""

from __future__ import annotations

from teegpu.monitor.draw import Line, Look, fit, paragraph
from teegpu.monitor.snapshot import Snapshot
from teegpu.units import printable

TAIL = 8000
"""Characters that a pane of the overview looks at: more than it can show."""


def tail(state: Snapshot, width: int, height: int, look: Look) -> list[Line]:
    """The end of the text, as much as there is room for."""
    return [fit(line, width) for line in lines(state, width, look, most=TAIL)[-height:]]


def lines(state: Snapshot, width: int, look: Look, *, most: int | None = None) -> list[Line]:  # noqa: ARG001
    """All of the text (its last ``most`` characters), or why there is none."""
    if not state.text_known:
        if not state.ended and not state.replay and not state.tokens:
            return [(("no token yet", "dim"),)]
        told = "The text is not in the record. It stays with the run, unless record.save_text is on."
        return paragraph(told, width, "dim")
    text = state.text if most is None else state.text[-most:]
    shown: list[Line] = []
    for source in text.replace("\t", "    ").split("\n"):
        shown += paragraph(printable(source, len(source) + 1), width)
    if not state.ended and state.current.running and shown:
        shown[-1] = (*shown[-1], ("▌", "accent"))
    return shown
