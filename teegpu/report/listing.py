"""The list of recorded runs: a line for each, or two where the terminal is narrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from teegpu.formats import NOTHING, aligned
from teegpu.report import facts, look
from teegpu.report.parts import whole
from teegpu.units import human_age, human_seconds, percent


@dataclass(frozen=True)
class Line:
    """A run of the list. ``problem`` says why its document can't be read; then ``document`` is empty."""

    id: str
    status: str
    document: look.Document
    problem: str = ""

    def started(self) -> datetime | None:
        """When the run began, with a time zone. Where the record does not say, its id does."""
        for text, form in ((look.text(self.document, "started_at"), ""), (self.id[:15], "%Y%m%d-%H%M%S")):
            try:
                at = datetime.strptime(text, form) if form else datetime.fromisoformat(text)
            except ValueError:
                continue
            return at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        return None

    def age_seconds(self, now: datetime) -> float | None:
        started = self.started()
        return None if started is None else (now - started).total_seconds()


def communication_share(document: look.Document) -> float | None:
    """Serialization and network in all phases, as a fraction of their wall time; None without any time."""
    phases = [look.mapping(document, "phases", name) for name in facts.PHASES]
    seconds = sum(whole(phase) for phase in phases)
    spent = sum(look.amount(phase, f"{part}_seconds") for phase in phases for part in ("serialization", "network"))
    return spent / seconds if seconds else None


def entry(line: Line) -> dict[str, Any]:
    """A run as ``list --json`` has it; None where the record does not say."""
    document = line.document
    # with all of it in the TEE there is no link, whatever its settings are
    settings = look.mapping(document, "settings")
    link = settings if facts.remote(document) else {}
    return {
        "id": line.id,
        "status": line.status,
        "started_at": look.text(document, "started_at") or None,
        "model": look.text(document, "model", "name") or None,
        "prefill_plan": look.text(settings, "prefill_plan") or None,
        "decode_plan": look.text(settings, "decode_plan") or None,
        "privacy": look.text(settings, "privacy") or None,
        "transport": look.text(link, "transport") or None,
        "wire_dtype": look.text(link, "wire_dtype") or None,
        "prompt_tokens": look.number(document, "phases", "prefill", "tokens"),
        "generated_tokens": facts.generated(document),
        "ttft_seconds": look.number(document, "latency", "ttft_seconds"),
        "tpot_median_seconds": look.number(document, "latency", "tpot_median_seconds"),
        "communication_share": communication_share(document),
        "note": look.text(document, "note") or None,
        **({"problem": line.problem} if line.problem else {}),
    }


def _row(line: Line, now: datetime) -> list[str]:
    found, age = entry(line), line.age_seconds(now)
    mode = found["privacy"]
    plan = facts.plans(line.document) + (f" ({mode})" if mode not in (None, "none") else "")
    prompt, made = found["prompt_tokens"], found["generated_tokens"]
    ttft, tpot, share = (found[name] for name in ("ttft_seconds", "tpot_median_seconds", "communication_share"))
    cells = (
        found["id"],
        None if age is None else human_age(age),
        f"{found['status']}, cut" if facts.remarks(line.document) else found["status"],
        found["model"],
        plan,
        found["transport"],
        found["wire_dtype"],
        None if prompt is None and made is None else f"{prompt or 0:,.0f} + {made or 0:,.0f}",
        None if ttft is None else human_seconds(ttft),
        None if tpot is None else human_seconds(tpot),
        None if share is None else percent(share),
    )
    return [*(cell or NOTHING for cell in cells), found.get("problem") or found["note"] or ""]


_HEADINGS = ["id", "age", "status", "model", "plan", "transport", "wire", "tokens", "TTFT", "TPOT", "comm.", "note"]
_FIRST = 4
"""Columns of the first line where a run takes several."""


def listing(runs: Sequence[Line], now: datetime, width: int | None = None) -> list[Text]:
    """Lines of text, headings first; where they would be wider than ``width``, each run takes two or three."""
    rows = [_HEADINGS, *(_row(line, now) for line in runs)]
    full = aligned(rows, left=len(_HEADINGS)).splitlines()
    if width is None or max(cell_len(line) for line in full) <= width:
        return [Text(line, style="" if place else "dim") for place, line in enumerate(full)]
    first = aligned([row[:_FIRST] for row in rows], left=_FIRST).splitlines()
    second = aligned([row[_FIRST:-1] for row in rows], left=len(_HEADINGS)).splitlines()
    lines = []
    for place, row in enumerate(rows):
        lines += [Text(text, style="" if place else "dim") for text in (first[place], f"  {second[place]}")]
        if row[-1] and place:
            lines.append(Text(f"  {row[-1]}", style="italic"))
    return lines
