"""The report of a run as one HTML file: charts, tables, advice. It fetches nothing and runs no script."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from teegpu.record.events import Event
from teegpu.report import facts, look
from teegpu.report.charts import charts, shares
from teegpu.report.opening import opening
from teegpu.report.parts import PARTS, took_place
from teegpu.report.sections import phase_grid, request_grids, run_grids, strip
from teegpu.report.timeline import timelines
from teegpu.units import human_seconds, times

_TEMPLATES = Environment(
    loader=PackageLoader("teegpu.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=StrictUndefined,
)  # fmt: skip


def page(document: look.Document, events: Iterable[Event] = ()) -> str:
    """The page. Timelines are made from ``events``; without them they are left out."""
    lines = timelines(events)
    phases = []
    for name in facts.PHASES:
        phase = look.mapping(document, "phases", name)
        if took_place(phase):
            phases.append(
                {
                    "grid": phase_grid(name, phase),
                    "legend": [part for part, tenths in shares(phase).items() if tenths] or list(PARTS),
                    "charts": charts(name, phase, lines.get(name), strip(name, phase)),
                }
            )
    run, started = look.text(document, "id"), look.text(document, "started_at")
    return _TEMPLATES.get_template("page.html").render(
        document=document,
        facts=facts,
        parts=PARTS,
        id=run,
        where=[part for part in (f"run {run}", started) if part],
        note=look.text(document, "note"),
        opening=opening(document),
        cards=_cards(document),
        advice=facts.advice(document),
        phases=phases,
        grids=[*request_grids(document), *run_grids(document)],
    )


def _cards(document: look.Document) -> list[tuple[str, str, str]]:
    """The figures that everybody asks for first: label, figure, and what is small beside it."""
    latency: dict[str, Any] = {name: look.number(document, "latency", f"{name}_seconds")
                               for name in ("ttft", "tpot_median", "tpot_p95")}  # fmt: skip
    found: list[tuple[str, str, str]] = []
    if latency["ttft"] is not None:
        found.append(("Time to first token", human_seconds(latency["ttft"]), ""))
    if latency["tpot_median"] is not None:
        p95 = f"p95 {human_seconds(latency['tpot_p95'])}" if latency["tpot_p95"] else ""
        found.append(("Time per output token", human_seconds(latency["tpot_median"]), p95))
    if speed := look.number(document, "phases", "decode", "tokens_per_second"):
        found.append(("Decode", f"{speed:,.1f} tokens/s", ""))
    for name in facts.PHASES:
        phase = look.mapping(document, "phases", name)
        if took_place(phase) and (calls := look.amount(phase, "rpc_calls")):
            tenths = shares(phase)
            share = (tenths["network"] + tenths["serialization"]) / 10
            found.append((f"Communication in {name}", f"{share:.1f}%", f"{calls:,.0f} RPC calls"))
    if (ratio := look.number(document, "limit", "ratio")) is not None:
        found.append(("Ratio to the limit", times(ratio), ""))
    return found
