"""The report of a run as one HTML file: charts, tables, advice. It fetches nothing and runs no script."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from teegpu.metrics.events import Event
from teegpu.report import facts, look
from teegpu.report.charts import layer_chart, legend, share_chart, shares, timeline_chart
from teegpu.report.grid import HEADING, TOTAL, Grid
from teegpu.report.parts import PARTS, took_place
from teegpu.report.privacy import privacy_grid
from teegpu.report.sections import endpoint_grid, limit_grid, link_grid, phase_grid, strip
from teegpu.report.style import STYLE
from teegpu.report.timeline import Timeline, timelines
from teegpu.units import human_seconds, times


def page(document: look.Document, events: Iterable[Event] = ()) -> str:
    """The page. Timelines are made from ``events``; without them they are left out."""
    lines = timelines(events)
    title = f"teegpu run {look.text(document, 'id') or '(without an id)'}"
    body = [_header(document), _cards(document), _advice(document)]
    body += [_phase(name, document, lines.get(name)) for name in facts.PHASES]
    grids = (privacy_grid(document), link_grid(document), limit_grid(document), endpoint_grid(document))
    body += [_grid(grid) for grid in grids if grid]
    body.append(_footer(document))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(document: look.Document) -> str:
    told = facts.status(document)
    lines = [f"<h1>{escape(facts.model(document))}</h1>"]
    lines.append(_line(facts.setup(document)[1:] + facts.details(document), "setup"))
    where = [f"run {look.text(document, 'id')}", look.text(document, "started_at")]
    lines.append(_line([part for part in where if part], "dim"))
    if told:
        lines.append(f'<p class="status">{escape(told)}</p>')
    if note := look.text(document, "note"):
        lines.append(f'<p class="note">{escape(note)}</p>')
    lines += [f'<p class="status">{escape(line)}</p>' for line in facts.remarks(document)]
    return "<header>" + "".join(lines) + "</header>"


def _line(parts: list[str], kind: str) -> str:
    return f'<p class="{kind}">{escape(" · ".join(parts))}</p>' if parts else ""


def _cards(document: look.Document) -> str:
    """The figures that everybody asks for first."""
    found: list[tuple[str, str, str]] = []
    ttft = look.number(document, "latency", "ttft_seconds")
    median = look.number(document, "latency", "tpot_median_seconds")
    p95 = look.number(document, "latency", "tpot_p95_seconds")
    if ttft is not None:
        found.append(("Time to first token", human_seconds(ttft), ""))
    if median is not None:
        found.append(("Time per output token", human_seconds(median), f"p95 {human_seconds(p95)}" if p95 else ""))
    if speed := look.number(document, "phases", "decode", "tokens_per_second"):
        found.append(("Decode", f"{speed:,.1f} tokens/s", ""))
    for name in facts.PHASES:
        phase = look.mapping(document, "phases", name)
        if took_place(phase) and look.amount(phase, "rpc_calls"):
            tenths = shares(phase)
            found.append(
                (
                    f"Communication in {name}",
                    f"{(tenths['network'] + tenths['serialization']) / 10:.1f}%",
                    f"{look.amount(phase, 'rpc_calls'):,.0f} RPC calls",
                )
            )
    if (ratio := look.number(document, "limit", "ratio")) is not None:
        found.append(("Ratio to the limit", times(ratio), ""))
    cards = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(figure)}<small>{escape(more)}</small></dd></div>"
        for label, figure, more in found
    )
    return f'<dl class="cards">{cards}</dl>' if cards else ""


def _advice(document: look.Document) -> str:
    items = []
    for entry in facts.advice(document):
        more = []
        if entry["setting"]:
            more.append(f"<code>{escape(entry['setting'])}</code>")
        if saving := facts.saving(entry):
            more.append(f'<span class="saving">{escape(saving)}</span>')
        items.append(f"<li><p>{escape(entry['text'])}</p><p>{' '.join(more)}</p></li>")
    return f'<section class="advice"><h2>Advice</h2><ol>{"".join(items)}</ol></section>' if items else ""


def _phase(name: str, document: look.Document, timeline: Timeline | None) -> str:
    phase: Mapping[str, object] = look.mapping(document, "phases", name)
    if not took_place(phase):
        return ""
    grid, title = phase_grid(name, phase), name.capitalize()
    used = [part for part, tenths in shares(phase).items() if tenths] or list(PARTS)
    blocks = [f"<h2>{escape(grid.title)}</h2>", legend(used)]
    blocks.append(_figure("Shares of the time", share_chart(title, phase)))
    if timeline is not None and timeline.steps:
        blocks.append(_figure("Timeline: what each moment went into", timeline_chart(title, timeline)))
    if (layers := strip(name, phase)) is not None:
        blocks.append(_figure("Time by layer", layer_chart(layers)))
    return f"<section>{''.join(blocks)}{_table(grid)}</section>"


def _figure(caption: str, chart: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>"


def _grid(grid: Grid) -> str:
    return f"<section><h2>{escape(grid.title)}</h2>{_table(grid)}</section>"


def _table(grid: Grid) -> str:
    columns = max(len(row.cells) for row in grid.rows)
    lines = []
    for row in grid.rows:
        cells = [*(cell.strip() for cell in row.cells), *[""] * (columns - len(row.cells))]
        kind = {HEADING: ' class="head"', TOTAL: ' class="total"'}.get(row.kind, "")
        if row.kind == HEADING:
            first = f'<th scope="colgroup">{escape(cells[0])}</th>'
            rest = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in cells[1:])
        else:
            first = f'<th scope="row">{escape(cells[0])}</th>'
            rest = "".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])
        lines.append(f"<tr{kind}>{first}{rest}</tr>")
    notes = "".join(f'<p class="dim">{escape(note)}</p>' for note in grid.notes)
    caption = f'<caption class="hidden">{escape(grid.title)}</caption>'
    return f'<div class="scroll"><table>{caption}{"".join(lines)}</table></div>{notes}'


def _footer(document: look.Document) -> str:
    lines = _line(facts.environment(document), "dim") + _line(facts.server(document), "dim")
    return f"<footer>{lines}</footer>" if lines else ""
