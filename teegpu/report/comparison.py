"""Runs side by side: the differences of each to the first one, what makes them hard to compare, and thresholds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from teegpu.errors import UsageError
from teegpu.report import facts, look
from teegpu.report.measures import HIGHER, MEASURES, NEITHER, Measure, find

SCHEMA = "teegpu.compare/1"

SAME = 0.0005
"""A change below this is ``same``: it would be printed as 0.0 %."""

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


@dataclass(frozen=True)
class Verdict:
    """What came of a condition for one run. ``reason`` says in a line why it failed, empty where it did not."""

    condition: Condition
    run: int
    value: float | None
    change: float | None
    reason: str


def parse(text: str, documents: Sequence[look.Document]) -> Condition:
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
    return Condition(text.strip(), find(found["name"], documents), found["sign"], limit, relative)


def judge(conditions: Sequence[Condition], documents: Sequence[look.Document]) -> list[Verdict]:
    """Each condition for each run after the first. A figure that is missing where it is needed fails: a gate that
    can't be checked is not passed."""
    return [
        _verdict(condition, run, documents[0], document)
        for condition in conditions
        for run, document in enumerate(documents)
        if run > 0
    ]


def _verdict(condition: Condition, run: int, first: look.Document, document: look.Document) -> Verdict:
    value, reference = condition.measure.value(document), condition.measure.value(first)
    change = relative_change(reference, value)
    name = _name(document, run)
    if value is None or (condition.relative and reference is None):
        missing = name if value is None else _name(first, 0)
        return Verdict(condition, run, value, change, f"{condition.text}: {missing} has no such figure")
    measured = change if condition.relative else value
    if measured is None or not _SIGNS[condition.sign](float(measured), condition.limit):
        return Verdict(condition, run, value, change, "")
    shown = condition.measure.shown
    told = f"{condition.text}: {name} has {shown(value)}"
    if condition.relative and reference is not None:
        told += f", {signed_percent(measured)} to the {shown(reference)} of {_name(first, 0)}"
    return Verdict(condition, run, value, change, told)


def relative_change(reference: float | None, value: float | None) -> float | None:
    """0.05: 5 % more than the reference. Infinite where the reference is 0 and the value is not."""
    if reference is None or value is None:
        return None
    if reference == 0:
        return 0.0 if value == 0 else math.copysign(math.inf, value)
    return (value - reference) / abs(reference)


def signed_percent(change: float) -> str:
    """``+5.0%``, ``0.0%``; from nothing to something is ``+∞``."""
    if not math.isfinite(change):
        return "+∞" if change > 0 else "-∞"
    return f"{change:+.1%}" if abs(change) >= SAME else "0.0%"


def word(measure: Measure, change: float | None) -> str:
    """``better``, ``worse``, ``same``; empty where neither way is better."""
    if change is None:
        return ""
    if abs(change) < SAME:
        return "same"
    if measure.better == NEITHER:
        return ""
    return "better" if (change > 0) == (measure.better == HIGHER) else "worse"


def shown_measures(documents: Sequence[look.Document], conditions: Sequence[Condition] = ()) -> list[Measure]:
    """Those that at least one run has a figure other than 0 for, and those that a condition names."""
    named = [condition.measure for condition in conditions]
    found = [
        measure for measure in MEASURES if measure in named or any(measure.value(document) for document in documents)
    ]
    return [*found, *(measure for measure in dict.fromkeys(named) if measure not in found)]


def warnings(documents: Sequence[look.Document]) -> list[str]:
    """What differs between the runs beside what is to be compared, a line each."""
    found = [f"{what} differ: {_listed(values)}" for what, values in _circumstances(documents) if len(set(values)) > 1]
    for run, document in enumerate(documents):
        status = look.text(document, "status") or "of unknown status"
        if status != "complete":
            found.append(f"{_name(document, run)} is {status}: its figures are of a part")
    return found


def _circumstances(documents: Sequence[look.Document]) -> Iterator[tuple[str, list[str]]]:
    yield "models", [facts.model(document) for document in documents]
    digests = [look.text(document, "model", "digest") for document in documents]
    if len({facts.model(document) for document in documents}) == 1 and all(digests):
        yield "weights of the model", [digest[:12] for digest in digests]
    yield "prompt lengths", [f"{tokens:,} tokens" for tokens in map(_prompt_tokens, documents)]
    yield "generated lengths", [_tokens(document, "decode") for document in documents]
    yield "machines", [" ".join(facts.environment(document)[:2]) for document in map(_machine, documents)]
    # a run with all of it in the TEE has neither, and is there to be compared with those that have
    remote = [document for document in documents if look.mapping(document, "server")]
    yield "servers", [_server(document) for document in remote]
    yield "links", [look.text(document, "settings", "link") or "real" for document in remote]


def _server(document: look.Document) -> str:
    """Without its version, which is often what is compared."""
    return " ".join(facts.server({"server": {**look.mapping(document, "server"), "version": ""}}))


def _machine(document: look.Document) -> dict[str, Any]:
    found = look.mapping(document, "environment")
    return {"environment": {name: found.get(name) for name in ("cpu", "machine", "cores")}}


def _prompt_tokens(document: look.Document) -> int:
    """Of all prompts, also what was reused from the one before."""
    output = look.at(document, "output")
    answers = [output] if isinstance(output, dict) else look.entries(document, "output")
    told = sum(int(look.amount(answer, "prompt_tokens")) for answer in answers)
    return told or int(look.amount(document, "phases", "prefill", "tokens"))


def _tokens(document: look.Document, phase: str) -> str:
    return f"{look.amount(document, 'phases', phase, 'tokens'):,.0f} tokens"


def _listed(values: Sequence[str]) -> str:
    return ", ".join(value or "unknown" for value in values)


def _name(document: look.Document, run: int) -> str:
    return look.text(document, "id") or f"run {run + 1}"


def comparison(documents: Sequence[look.Document], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The document ``teegpu.compare/1``: runs, warnings, figures with their differences to the first, thresholds."""
    conditions = list(dict.fromkeys(verdict.condition for verdict in verdicts))
    return {
        "schema": SCHEMA,
        "runs": [
            {
                "id": look.text(document, "id"),
                "status": look.text(document, "status"),
                "started_at": look.text(document, "started_at"),
                "model": facts.model(document),
                "note": look.text(document, "note"),
            }
            for document in documents
        ],
        "warnings": warnings(documents),
        "figures": [_figure(measure, documents) for measure in shown_measures(documents, conditions)],
        "thresholds": [
            {
                "condition": verdict.condition.text,
                "figure": verdict.condition.measure.path,
                "run": _name(documents[verdict.run], verdict.run),
                "value": verdict.value,
                "change": _finite(verdict.change),
                "failed": bool(verdict.reason),
                "reason": verdict.reason,
            }
            for verdict in verdicts
        ],
    }


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
        "verdicts": ["", *(word(measure, change) for change in changes[1:])],
    }


def _finite(change: float | None) -> float | None:
    """JSON knows no infinity."""
    return change if change is not None and math.isfinite(change) else None
