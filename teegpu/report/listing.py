"""The list of recorded runs: a line for each, or two where the terminal is narrow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from teegpu.formats import NOTHING
from teegpu.report import facts, look
from teegpu.report.parts import whole
from teegpu.units import human_age, human_seconds

_GAP = 2


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
    link = {} if facts.plans(document) == "local" else settings
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
        "generated_tokens": look.number(document, "phases", "decode", "tokens"),
        "ttft_seconds": look.number(document, "latency", "ttft_seconds"),
        "tpot_median_seconds": look.number(document, "latency", "tpot_median_seconds"),
        "communication_share": communication_share(document),
        "note": look.text(document, "note") or None,
        **({"problem": line.problem} if line.problem else {}),
    }


def _seconds(value: float | None) -> str:
    return NOTHING if value is None else human_seconds(value)


def _tokens(found: Mapping[str, Any]) -> str:
    prompt, made = found["prompt_tokens"], found["generated_tokens"]
    return NOTHING if prompt is None and made is None else f"{prompt or 0:,.0f} + {made or 0:,.0f}"


_FIRST: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("id", lambda found: found["id"]),
    ("age", lambda found: found["age"]),
    ("status", lambda found: found["status"]),
    ("model", lambda found: found["model"] or NOTHING),
)
_SECOND: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("plan", lambda found: found["plan"] or NOTHING),
    ("transport", lambda found: found["transport"] or NOTHING),
    ("wire", lambda found: found["wire_dtype"] or NOTHING),
    ("tokens", _tokens),
    ("TTFT", lambda found: _seconds(found["ttft_seconds"])),
    ("TPOT", lambda found: _seconds(found["tpot_median_seconds"])),
    ("comm.", lambda found: NOTHING if (share := found["communication_share"]) is None else f"{share:.1%}"),
)


def listing(runs: Sequence[Line], now: datetime, width: int | None = None) -> list[Text]:
    """Lines of text, headings first; where they would be wider than ``width``, each run takes two or three."""
    found = []
    for line in runs:
        age = line.age_seconds(now)
        shown = {"age": NOTHING if age is None else human_age(age), "plan": _plan(line.document)}
        found.append(entry(line) | shown)
    rows = [[*(heading for heading, _ in _FIRST + _SECOND), "note"]]
    rows += [[*(write(run) for _, write in _FIRST + _SECOND), _remark(run)] for run in found]
    wide = _aligned([row[:-1] for row in rows])
    full = [f"{line}  {row[-1]}".rstrip() for line, row in zip(wide, rows, strict=True)]
    if width is None or max(cell_len(line) for line in full) <= width:
        return [Text(line, style="dim" if place == 0 else "") for place, line in enumerate(full)]
    return _narrow(rows)


def _plan(document: look.Document) -> str:
    """The plans, and how values were hidden where they were."""
    mode = look.text(document, "settings", "privacy")
    return facts.plans(document) + (f" ({mode})" if mode not in ("", "none") else "")


def _remark(run: Mapping[str, Any]) -> str:
    return run.get("problem") or run["note"] or ""


def _narrow(rows: Sequence[Sequence[str]]) -> list[Text]:
    split = len(_FIRST)
    first = _aligned([row[:split] for row in rows])
    second = _aligned([row[split:-1] for row in rows])
    lines = []
    for place, row in enumerate(rows):
        style = "dim" if place == 0 else ""
        lines += [Text(first[place].rstrip(), style=style), Text(f"  {second[place]}".rstrip(), style=style)]
        if row[-1] and place:
            lines.append(Text(f"  {row[-1]}", style="italic"))
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(cell_len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        (" " * _GAP).join(
            cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)
        )
        for row in rows
    ]  # fmt: skip
