"""Runs side by side (``teegpu.compare/1``): the differences of each to the first one, what makes them hard to compare,
and thresholds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from teegpu.errors import UsageError
from teegpu.report import facts, look
from teegpu.report.measures import MEASURES, Measure, find, relative_change, signed_percent

SCHEMA = "teegpu.compare/1"

_CONDITION = re.compile(
    r"\s*(?P<name>[A-Za-z][\w.@+-]*?)\s*(?P<sign>>=|<=|>|<)\s*(?P<value>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(?P<percent>%?)\s*"
)
_SIGNS = {">": float.__gt__, "<": float.__lt__, ">=": float.__ge__, "<=": float.__le__}


@dataclass(frozen=True)
class Condition:
    """``text`` as it was given. ``relative``: ``limit`` is a fraction of the first run's figure, by which another may
    differ from it; else it is the figure itself."""

    text: str
    measure: Measure
    sign: str
    limit: float
    relative: bool

    @classmethod
    def parse(cls, text: str, documents: Sequence[look.Document]) -> Condition:
        """``tpot_median_seconds>5%``, ``ttft_seconds>1.5``, ``decode.tokens_per_second<-5%``.

        Raises ``UsageError`` for what is not of that form, and for a figure that none of the runs has.
        """
        found = _CONDITION.fullmatch(text)
        if found is None:
            raise UsageError(
                f"--fail-if '{text}' is not of the form FIGURE>VALUE, FIGURE<VALUE or FIGURE>PERCENT%, such as "
                "'tpot_median_seconds>5%'"
            )
        relative = found["percent"] == "%"
        limit = float(found["value"]) / (100 if relative else 1)
        if not math.isfinite(limit):
            raise UsageError(f"--fail-if '{text}': {found['value']} is not a number that can be reached")
        return cls(text.strip(), find(found["name"], documents), found["sign"], limit, relative)

    def judge(self, first: look.Document, document: look.Document, name: str) -> dict[str, Any]:
        """What came of it for the run ``name``, as ``thresholds`` have it. A figure that is missing where it is needed
        fails: a gate that can't be checked is not passed."""
        value, reference = self.measure.value(document), self.measure.value(first)
        change = relative_change(reference, value)
        measured, shown, reason = change if self.relative else value, self.measure.shown, ""
        if value is None or measured is None:
            reason = f"{self.text}: {name if value is None else _name(first, 0)} has no such figure"
        elif _SIGNS[self.sign](float(measured), self.limit):
            reason = f"{self.text}: {name} has {shown(value)}"
            if self.relative and reference is not None:
                reason += f", {signed_percent(measured)} to the {shown(reference)} of {_name(first, 0)}"
        return {
            "condition": self.text,
            "figure": self.measure.path,
            "run": name,
            "value": value,
            "change": _finite(change),
            "failed": bool(reason),
            "reason": reason,
        }


def comparison(documents: Sequence[look.Document], fail_if: Sequence[str] = ()) -> dict[str, Any]:
    """The document: runs, warnings, figures with their differences to the first, and what came of each condition of
    ``fail_if`` for each run after the first. Raises ``UsageError`` for a condition that is none."""
    conditions = [Condition.parse(text, documents) for text in dict.fromkeys(fail_if)]
    named = dict.fromkeys(condition.measure for condition in conditions)
    # Those that at least one run has a figure other than 0 for, and those that a condition names.
    shown = [measure for measure in MEASURES if measure in named or any(map(measure.value, documents))]
    names = ("id", "status", "started_at")
    return {
        "schema": SCHEMA,
        "runs": [
            {name: look.text(document, name) for name in names}
            | {"model": facts.model(document), "note": look.text(document, "note")}
            for document in documents
        ],
        "warnings": warnings(documents),
        "figures": [_figure(measure, documents) for measure in (*shown, *(one for one in named if one not in shown))],
        "thresholds": [
            condition.judge(documents[0], document, _name(document, run))
            for condition in conditions
            for run, document in enumerate(documents)
            if run > 0
        ],
    }


def failures(comparison: look.Document) -> list[str]:
    """Why thresholds were missed, a line each."""
    return [look.text(entry, "reason") for entry in comparison["thresholds"] if entry["failed"]]


def _figure(measure: Measure, documents: Sequence[look.Document]) -> dict[str, Any]:
    values = [measure.value(document) for document in documents]
    changes = [relative_change(values[0], value) for value in values]
    return {
        "figure": measure.path,
        "label": measure.label,
        "better": measure.better,
        "values": values,
        "differences": [None if values[0] is None or value is None else value - values[0] for value in values],
        "changes": [_finite(change) for change in changes],
        "verdicts": ["", *(measure.verdict(change) for change in changes[1:])],
    }


def _finite(change: float | None) -> float | None:
    """JSON knows no infinity."""
    return change if change is not None and math.isfinite(change) else None


def _name(document: look.Document, run: int) -> str:
    return look.text(document, "id") or f"run {run + 1}"


def warnings(documents: Sequence[look.Document]) -> list[str]:
    """What differs between the runs beside what is to be compared, a line each."""
    found = [
        f"{what} differ: {', '.join(value or 'unknown' for value in values)}"
        for what, values in _circumstances(documents)
        if len(set(values)) > 1
    ]
    for run, document in enumerate(documents):
        status = look.text(document, "status") or "of unknown status"
        if status != "complete":
            found.append(f"{_name(document, run)} is {status}: its figures are of a part")
        found += [f"{_name(document, run)}: {remark}" for remark in facts.remarks(document)]
    if not any(measure.value(document) for measure in MEASURES for document in documents):
        found.append("nothing was computed in any of them")
    return found


def _circumstances(documents: Sequence[look.Document]) -> Iterator[tuple[str, list[str]]]:
    models = [facts.model(document) for document in documents]
    yield "models", models
    digests = [look.text(document, "model", "digest") for document in documents]
    if len(set(models)) == 1 and all(digests):
        yield "digest of the model", [digest[:12] for digest in digests]
    yield "prompt lengths", [f"{_prompt_tokens(document):,} tokens" for document in documents]
    made = (look.amount(document, "phases", "decode", "tokens") for document in documents)
    yield "generated lengths", [f"{tokens:,.0f} tokens" for tokens in made]
    yield "machines", [" ".join(facts.machine(document)) for document in documents]
    # a run with all of it in the TEE has neither, and is there to be compared with those that have
    remote = [document for document in documents if look.mapping(document, "server")]
    # without its version, which is often what is compared
    yield "servers", [" ".join(facts.server(document, version=False)) for document in remote]
    yield "links", [look.text(document, "settings", "link") or "real" for document in remote]


def _prompt_tokens(document: look.Document) -> int:
    """Of all prompts, also what was reused from the one before."""
    told = sum(int(look.amount(answer, "prompt_tokens")) for answer in facts.answers(document))
    return told or int(look.amount(document, "phases", "prefill", "tokens"))
