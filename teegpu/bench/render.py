"""A benchmark's document as tables for people, as Markdown, CSV or JSON. Pure: text out of a document.

CSV has every figure of the document, the nested ones by joined keys, units in their names.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from teegpu import formats
from teegpu.bench.plot import link_name
from teegpu.formats import NOTHING
from teegpu.units import count, fixed, percent, times

FORMATS = ("table", "json", "csv", "md")

Entry = Mapping[str, Any]
Shown = Callable[[Any], str]
Column = tuple[str, str, Shown]
"""Its heading, the dotted path of its figure in an entry, and how that is written for people."""

_APART = frozenset({"samples", "warm_up", "texts"})
"""What a row of CSV does not have: the single runs."""


@dataclass(frozen=True)
class Table:
    """``tracks``: of which an entry has to be; empty: all. Rows and columns without a figure are left out."""

    title: str
    columns: tuple[Column, ...]
    tracks: tuple[str, ...] = ()


def choose(given: str, out: str) -> str:
    """The format: the one that is given, else that of the file's suffix, else ``table``. Raises ``UsageError``."""
    return formats.choose(given, out, FORMATS)


def render(document: Entry, form: str) -> str:
    """``document`` in ``form``, one of ``FORMATS``, ending in a line break."""
    if form == "json":
        return formats.as_json(document)
    if form == "csv":
        return _csv(document["results"])
    return _text(document, markdown=form == "md")


def side_by_side(documents: Sequence[Entry], *, markdown: bool) -> str:
    """Results of the ladder over several links: a row for each rung, a column for each link."""
    links = [link_name(document["settings"]["link"], document["settings"]["endpoint"]) for document in documents]
    labels = {entry["rung"]: entry["label"] for document in documents for entry in document["results"]}
    found = [{entry["rung"]: entry for entry in document["results"]} for document in documents]
    blocks = [_heading(document) for document in documents]
    for title, path, shown in _SIDE_BY_SIDE:
        rows = [["rung", *links]]
        for rung, label in labels.items():
            row = [label]
            for entry in (entries.get(rung, {}) for entries in found):
                cell = _cell(entry, path, shown)
                row.append(f"{cell}*" if cell != NOTHING and entry["cold"] else cell)
            if any(cell != NOTHING for cell in row[1:]):
                rows.append(row)
        if len(rows) > 1:
            blocks.append(_titled(title, rows, markdown=markdown))
    if any(entry.get("cold") for entries in found for entry in entries.values()):
        blocks.append("* one run alone, the first one")
    return "\n\n".join(blocks) + "\n"


def _titled(title: str, rows: Sequence[Sequence[str]], *, markdown: bool) -> str:
    return f"{title}\n\n{formats.markdown(rows)}" if markdown else f"{title}\n{formats.aligned(rows)}"


def _csv(results: Sequence[Entry]) -> str:
    rows = [dict(_flat(entry)) for entry in results]
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _flat(entry: Entry, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in entry.items():
        if isinstance(value, Mapping) and name not in _APART:
            yield from _flat(value, f"{prefix}{name}_")
        elif not isinstance(value, (Mapping, list)) and name not in _APART:
            yield prefix + name, value


def _text(document: Entry, *, markdown: bool) -> str:
    results = document["results"]
    blocks = [_heading(document)]
    for table in TABLES[document["benchmark"]]:
        rows = [[heading for heading, _, _ in table.columns]]
        for entry in results:
            row = [_cell(entry, path, shown) for _, path, shown in table.columns]
            if any(cell != NOTHING for cell in row[1:]) and (not table.tracks or entry["track"] in table.tracks):
                rows.append(row)
        if len(rows) > 1:
            blocks.append(_titled(table.title, _columns_that_say_something(rows), markdown=markdown))
    failures = [f"{entry['label']} failed: {entry['error']}" for entry in results if entry.get("error")]
    remarks = [*failures, *document["notes"]]
    if remarks:
        blocks.append("\n".join(f"- {line}" if markdown else line for line in remarks))
    return "\n\n".join(blocks) + "\n"


def _heading(document: Entry) -> str:
    model, machine, settings = document["model"], document["machine"], document["settings"]
    facts = [f"teegpu bench {document['benchmark']}", *([model["name"]] if model else [])]
    facts += [f"{settings[key]:,} {word}" for key, word in _NUMBERS if key in settings]
    if "link" in settings:
        facts.append(f"link {settings['link']}" if settings["link"] else "no emulated link")
    if document["status"] != "complete":
        facts.append(document["status"])
    cores = machine["cores"]
    where = [machine["cpu"], f"{cores} core{'s' * (cores != 1)}", f"teegpu {document['versions']['teegpu']}"]
    versions = document["versions"]
    where += [f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions]
    return " · ".join(facts) + "\n" + " · ".join(where)


_NUMBERS = (
    ("prompt_tokens", "prompt tokens"),
    ("decode_tokens", "decode tokens"),
    ("tokens", "tokens a text"),
    ("repeats", "repeats"),
    ("rounds", "rounds"),
)


def _cell(entry: Entry, path: str, shown: Shown) -> str:
    value: Any = entry
    for name in path.split(".") if path else ():
        value = value.get(name) if isinstance(value, Mapping) else None
    return NOTHING if value is None else shown(value)


def _columns_that_say_something(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """``rows`` without the columns that are empty in all of them (a link's limit where there is no link)."""
    kept = [place for place in range(len(rows[0])) if place == 0 or any(row[place] != NOTHING for row in rows[1:])]
    return [[row[place] for place in kept] for row in rows]


# How figures are written


def _scaled(factor: float, digits: int) -> Shown:
    return lambda value: f"{value * factor:,.{digits}f}"


def _between(factor: float, digits: int) -> Shown:
    """Of a spread, its least and its largest."""
    return lambda spread: f"{spread['min'] * factor:,.{digits}f}–{spread['max'] * factor:,.{digits}f}"


def _tiny(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _verdict(output: Mapping[str, Any]) -> str:
    """``identical``, ``first 7 of 33``, or ``not checked``."""
    if output["identical"] is None:
        return "not checked"
    return "identical" if output["identical"] else f"first {output['agreeing_tokens']} of {output['tokens']}"


def _repeats(phase: str) -> Shown:
    def shown(entry: Entry) -> str:
        if phase not in entry:
            return NOTHING
        return "warm-up" if entry["cold"] else str(entry["repeats"])

    return shown


# The tables

_RUNG: Column = ("rung", "label", str)


def _compared(phase: str) -> tuple[Column, ...]:
    return (
        ("repeats", "", _repeats(phase)),
        ("speed-up", f"{phase}.speed_up", times),
        ("over the one before", f"{phase}.speed_up_over_before", times),
        ("communication", f"{phase}.communication_share", percent),
        ("× limit", f"{phase}.ratio_to_limit", times),
    )


_PREFILL: tuple[Column, ...] = (
    _RUNG,
    ("RPC calls", "prefill.rpc_calls", count),
    ("MiB up", "prefill.bytes_up", _scaled(2**-20, 1)),
    ("MiB down", "prefill.bytes_down", _scaled(2**-20, 1)),
    ("seconds", "prefill.seconds.median", fixed(3)),
    ("min–max", "prefill.seconds", _between(1, 3)),
    ("expected", "expected_seconds", fixed(0)),
    *_compared("prefill"),
)
_DECODE: tuple[Column, ...] = (
    _RUNG,
    ("steps", "decode.steps", count),
    ("RPC calls a step", "decode.rpc_calls_per_step", count),
    ("KiB up", "decode.bytes_up_per_step", _scaled(2**-10, 1)),
    ("KiB down", "decode.bytes_down_per_step", _scaled(2**-10, 1)),
    ("ms a token", "decode.seconds_per_token.median", _scaled(1e3, 1)),
    ("min–max", "decode.seconds_per_token", _between(1e3, 1)),
    ("tokens/s", "decode.tokens_per_second.median", fixed(1)),
    *_compared("decode"),
)
_OUTPUT: tuple[Column, ...] = (
    _RUNG,
    ("server", "server.dtype", str),
    ("greedy tokens as transformers fp32", "output", _verdict),
    ("KL, nats", "accuracy.kl_nats", _tiny),
    ("top-1", "accuracy.top1_agreement", fixed(3)),
    ("positions", "accuracy.positions", count),
    ("runner's peak MiB", "peak_memory_bytes", _scaled(2**-20, 1)),
)
_ACCURACY: tuple[Column, ...] = (
    ("variant", "label", str),
    ("KL, nats", "kl_nats", _tiny),
    ("worst text", "kl_nats_worst_text", _tiny),
    ("top-1 agreement", "top1_agreement", fixed(4)),
    ("perplexity", "perplexity", fixed(4)),
    ("positions", "positions", count),
)
_ROUND_TRIP: tuple[Column, ...] = (
    ("milliseconds", "label", str),
    ("median", "rtt_seconds.median", _scaled(1e3, 3)),
    ("p95", "rtt_seconds.p95", _scaled(1e3, 3)),
    ("min", "rtt_seconds.min", _scaled(1e3, 3)),
)
_BANDWIDTH: tuple[Column, ...] = (
    ("message", "label", str),
    ("Mbit/s", "bytes_per_second.median", _scaled(8e-6, 1)),
    ("min–max", "bytes_per_second", _between(8e-6, 1)),
    ("MB/s", "bytes_per_second.median", _scaled(1e-6, 1)),
    ("ms on the link", "network_seconds.median", _scaled(1e3, 3)),
    ("ms in the server", "server_seconds.median", _scaled(1e3, 3)),
)
_SHIELD: tuple[Column, ...] = (
    ("milliseconds a token", "label", str),
    ("in a chunk", "chunk_seconds_per_token.median", _scaled(1e3, 3)),
    ("in a batch", "batch_seconds_per_token.median", _scaled(1e3, 3)),
    ("in a step", "step_seconds_per_token.median", _scaled(1e3, 3)),
    ("leverage: chunk", "chunk_leverage", fixed(2)),
    ("batch", "batch_leverage", fixed(2)),
    ("step", "step_leverage", fixed(2)),
)

_SIDE_BY_SIDE: tuple[Column, ...] = (
    ("Prefill, seconds", "prefill.seconds.median", fixed(3)),
    ("Prefill, × limit", "prefill.ratio_to_limit", times),
    ("Decode, ms a token", "decode.seconds_per_token.median", _scaled(1e3, 1)),
)

TABLES: dict[str, tuple[Table, ...]] = {
    "ladder": (
        Table("Prefill", _PREFILL, ("prefill", "beside", "case", "baseline")),
        Table("Decode", _DECODE, ("decode", "case", "baseline")),
        Table("Decode on the rungs of the prefill", _DECODE, ("prefill", "beside")),
        Table("Output", _OUTPUT),
    ),
    "accuracy": (Table("Against transformers in fp32", _ACCURACY),),
    "link": (Table("Round trip", _ROUND_TRIP), Table("Bandwidth", _BANDWIDTH)),
    "shield": (Table("What the runner does beyond a plain run", _SHIELD),),
}
