"""The few lines that end a run: what it took, for a person, from the document's own figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from teegpu.formats import aligned
from teegpu.report import facts
from teegpu.report.facts import PHASES
from teegpu.report.opening import prediction
from teegpu.units import human_bytes

_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("tokens", lambda phase: f"{phase['tokens']:,}"),
    ("seconds", lambda phase: f"{phase['seconds']:.3f}"),
    ("tokens/s", lambda phase: f"{phase['tokens_per_second']:,.1f}"),
    ("RPC calls", lambda phase: f"{phase['rpc_calls']:,}"),
    ("up", lambda phase: human_bytes(phase["bytes_up"])),
    ("down", lambda phase: human_bytes(phase["bytes_down"])),
    ("communication", lambda phase: f"{phase['communication_share']:.1%}"),
)


def brief(document: dict[str, Any], width: int | None = None, details: str = "") -> Text:
    """The summary of a ``teegpu.report/1`` document, for a terminal of ``width`` columns (None: as wide as it takes).

    ``details``: the command that shows more, where there is one. The lines are broken here: print them with
    ``soft_wrap=True``. Where the table is too wide, its columns become rows.
    """
    text = Text("\n".join(_packed(_facts(document), " · ", width)))
    table = _table(document)
    if len(table) > 1:
        upright = _aligned(table)
        if width is not None and cell_len(upright[0].plain) > width:
            upright = _aligned([list(column) for column in zip(*table, strict=True)])
        for line in upright:
            text.append("\n").append_text(line)
    for note in (*_notes(document), *_advice(document)):
        for part in _packed(note.split(" "), " ", width):
            text.append("\n").append(part)
    if details:
        text.append(f"\ndetails: {details}", style="dim")
    return text


def _facts(document: dict[str, Any]) -> list[str]:
    status = [] if document["status"] == "complete" else [document["status"]]
    return [*status, *facts.setup(document), *facts.latency(document, rate=False)]


def _table(document: dict[str, Any]) -> list[list[str]]:
    """Headings, and a row for each phase that took place."""
    rows = [["", *(heading for heading, _ in _COLUMNS)]]
    for name in PHASES:
        phase = document["phases"][name]
        if phase["passes"]:
            rows.append([name, *(shown(phase) for _, shown in _COLUMNS)])
    return rows


def _notes(document: dict[str, Any]) -> list[str]:
    """What is worth a line only where it happened."""
    notes = [f"predicted: {told}"] if (told := prediction(document)) else []
    answers = facts.answers(document)
    reused = sum(answer["reused_tokens"] for answer in answers)
    if reused:
        total = sum(answer["prompt_tokens"] for answer in answers)
        notes.append(f"{reused:,} of {total:,} prompt tokens reused from the prompt before")
    decode = document["phases"]["decode"]
    guesses = decode["speculation"]
    if guesses["drafted_tokens"] and decode["passes"]:
        notes.append(
            f"{guesses['accepted_tokens']:,} of {guesses['drafted_tokens']:,} guessed tokens accepted, "
            f"{decode['tokens'] / decode['passes']:.2f} tokens per step"
        )
    return notes


def _advice(document: dict[str, Any]) -> list[str]:
    """The advice that would save most; it is the first."""
    for entry in facts.advice(document)[:1]:
        # why in a sentence, then what to do; the rest is in the report
        why = re.split(r"(?<=[.:]) (?=[A-Z])", entry["text"])[0].rstrip(".:")
        what = " ".join(part for part in (entry["setting"], facts.saving(entry)) if part)
        return [f"advice: {why}" + (f": {what}" if what else "")]
    return []


def _aligned(rows: Sequence[Sequence[str]]) -> list[Text]:
    """Lines of equal width, figures to the right; headings dim where there is colour."""
    labels = max(cell_len(row[0]) for row in rows)
    lines = [Text(line) for line in aligned(rows).splitlines()]
    for number, line in enumerate(lines):
        line.stylize("dim", 0, labels if number else None)
    return lines


def _packed(parts: Sequence[str], joint: str, width: int | None) -> list[str]:
    """``parts`` joined into lines of at most ``width``, none of them torn apart."""
    lines: list[str] = []
    for part in parts:
        if lines and (width is None or cell_len(lines[-1] + joint + part) <= width):
            lines[-1] += joint + part
        else:
            lines.append(part)
    return lines
