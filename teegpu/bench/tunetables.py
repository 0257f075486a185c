"""The documents of ``teegpu tune`` as tables for people, Markdown, CSV and JSON. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

from teegpu import formats
from teegpu.bench.against import GOOD_ENOUGH
from teegpu.config import to_toml
from teegpu.formats import NOTHING
from teegpu.units import human_seconds

FORMATS: Final = ("table", "json", "csv", "md")

SHOWN: Final = 12
"""Rows of a ranked table for people; CSV and JSON have all of them."""

BOUNDS: Final = {
    "up": "link up",
    "down": "link down",
    "rounds": "round trips",
    "runner": "TEE",
    "server": "server",
    "cores": "shared cores",
}

Document = Mapping[str, Any]
Rows = list[list[str]]


def choose(given: str, out: str) -> str:
    """The format: see ``formats.choose``."""
    return formats.choose(given, out, FORMATS)


def render(document: Document, form: str) -> str:
    """``document`` in ``form``, ending in a line break."""
    if form == "json":
        return formats.as_json(document)
    if form == "csv":
        return _csv(document)
    markdown = form == "md"
    blocks = [_heading(document)]
    for title, rows in _TABLES.get(document["kind"], _predictions)(document):
        if len(rows) > 1:
            drawn = formats.markdown(rows) if markdown else formats.aligned(rows)
            blocks.append(f"{title}\n\n{drawn}" if markdown else f"{title}\n{drawn}")
    remarks = [*_remarks(document), *document["notes"]]
    if remarks:
        blocks.append("\n".join(f"- {line}" if markdown else line for line in remarks))
    return "\n\n".join(blocks) + "\n"


def _heading(document: Document) -> str:
    settings = document["settings"]
    facts = [f"teegpu tune · {document['model']['name']}"]
    if "prompt_tokens" in settings:
        facts.append(f"{settings['prompt_tokens']:,} prompt tokens · {settings['decode_tokens']:,} after them")
    if "link" in settings:
        facts.append(f"link {settings['link']}" if settings["link"] else "no emulated link")
    facts += settings.get("endpoints", ())
    return " · ".join(facts) + f"\npredictions from {document['basis']}"


def _predictions(document: Document) -> list[tuple[str, Rows]]:
    return [
        ("Prefill: predicted time to the first token", _ranked(document, "prefill")),
        ("Decode: predicted time of each token after it", _ranked(document, "decode")),
        ("Assumptions", _assumptions(document)),
    ]


def _ranked(document: Document, phase: str) -> Rows:
    """The quickest, of each plan, wire dtype and transport with its best chunk; and whatever was chosen."""
    best: dict[tuple[Any, ...], Document] = {}
    for entry in document[phase]:
        best.setdefault((entry["plan"], entry["wire_dtype"], entry["transport"]), entry)
    entries = list(best.values())
    chosen = document["choice"][phase]
    first = entries[:SHOWN]
    for wanted in (chosen, next((entry for entry in entries if entry["plan"] == "local"), None)):
        if wanted is not None and wanted not in first:
            first.append(wanted)
    rows = [["plan", "wire", "transport", "chunk", "seconds", "bound by", "the server sees", ""]]
    for entry in first:
        mark = "chosen" if _same(entry, chosen) else "lossy" if entry["lossy"] else ""
        rows.append([
            entry["plan"], entry["wire_dtype"] or NOTHING, entry["transport"] or NOTHING,
            f"{entry['chunk_tokens']:,}" if entry["chunk_tokens"] and phase == "prefill" else NOTHING,
            human_seconds(entry["seconds"]), BOUNDS[entry["bound_by"]], entry["shows"], mark,
        ])  # fmt: skip
    return [[cell for place, cell in enumerate(row) if place != 3 or phase == "prefill"] for row in rows]


def _same(one: Document, other: Document) -> bool:
    if one["plan"] != other["plan"]:
        return False
    keys = ("wire_dtype", "transport", "chunk_tokens")
    return one["plan"] == "local" or all(one[key] == other[key] for key in keys)


def _assumptions(document: Document) -> Rows:
    rows = [["assumption", "value", "source"]]
    return rows + [[each["what"], each["value"], each["source"]] for each in document["assumptions"]]


def _remarks(document: Document) -> list[str]:
    if document["kind"] == "worlds":
        return []
    if document["kind"] == "against":
        return _judgement(document)
    choice = document["choice"]
    settings = ", ".join(f"{key} = {to_toml(value)}" for key, value in choice["settings"].items())
    tokens = document["settings"]["decode_tokens"]
    lines = [
        f"choice: {settings}",
        f"predicted: {human_seconds(choice['prefill']['seconds'])} to the first token, "
        f"{human_seconds(choice['decode']['seconds'])} each after it, {human_seconds(choice['total_seconds'])} in all "
        f"for {tokens:,} more tokens",
    ]
    local = document["local"]
    if local["prefill_seconds"] is not None and local["decode_step_seconds"] is not None:
        lines.append(
            f"all in the TEE: {human_seconds(local['prefill_seconds'])} to the first token, "
            f"{human_seconds(local['decode_step_seconds'])} each after it"
        )
    if "break_even" in document:
        for phase in ("prefill", "decode"):
            lines.append(
                f"offloaded {phase} is as quick as all in the TEE "
                f"{_bandwidth(document['break_even'][f'{phase}_bytes_per_second'])}"
            )
    return lines


def _bandwidth(rate: float | None) -> str:
    if rate is None:
        return "on no link with this round trip, however wide"
    if rate == 0.0:
        return "on any link with this round trip"
    bits = rate * 8
    return f"from {bits / 1e9:,.3g} Gbit/s on" if bits >= 1e9 else f"from {bits / 1e6:,.3g} Mbit/s on"


# Worlds side by side


def _worlds(document: Document) -> list[tuple[str, Rows]]:
    rows = [["model", "link", "GPU", "TEE", "servers", "all in the TEE: first token", "each after",
             "offloaded: first token", "bound by", "each after", "best: prefill", "decode", "prefill offloads from",
             "decode from"]]  # fmt: skip
    for each in document["results"]:
        local, offloaded, least = each["local"], each["offloaded"], each["break_even"]
        rows.append([
            each["model"], each["link"], each["gpu"], each["tee"], str(each["servers"]),
            human_seconds(local["prefill_seconds"]), human_seconds(local["decode_step_seconds"]),
            human_seconds(offloaded["prefill"]["seconds"]), BOUNDS[offloaded["prefill"]["bound_by"]],
            human_seconds(offloaded["decode"]["seconds"]), each["choice"]["prefill"], each["choice"]["decode"],
            _rate(least["prefill_bytes_per_second"]), _rate(least["decode_bytes_per_second"]),
        ])  # fmt: skip
    return [("Predictions", rows), ("Assumptions", _assumptions(document))]


def _rate(rate: float | None) -> str:
    """A break-even bandwidth in few characters."""
    if rate is None:
        return "never"
    if rate == 0.0:
        return "any"
    bits = rate * 8
    return f"{bits / 1e9:,.3g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:,.3g} Mbit/s"


# Against measurements


def _against(document: Document) -> list[tuple[str, Rows]]:
    rows = [["case", "link", "phase", "predicted", "measured", "error", "bound by"]]
    for each in document["results"]:
        rows.append([
            each["label"], each["link"], each["phase"], human_seconds(each["predicted_seconds"]),
            human_seconds(each["measured_seconds"]), f"{each['error_share']:+.0%}", BOUNDS[each["bound_by"]],
        ])  # fmt: skip
    verdicts = [["link", "phase", "auto takes", "measured", "best measured", "", "ratio"]]
    for each in document["verdicts"]:
        own = each["chosen_seconds"]
        ratio = each["ratio"]
        verdicts.append([
            each["link"], each["phase"], each["chosen"], NOTHING if own is None else human_seconds(own),
            each["best"], human_seconds(each["best_seconds"]), NOTHING if ratio is None else f"{ratio:.2f}×",
        ])  # fmt: skip
    return [("Predicted and measured", rows), ("What auto would have chosen", verdicts)]


def _judgement(document: Document) -> list[str]:
    error = document["median_error"]
    lines = []
    if error is not None:
        met = "within" if error <= document["median_goal"] else "above"
        count = len(document["results"])
        lines.append(
            f"median error {error:.0%} of {count} predictions: {met} the goal of {document['median_goal']:.0%}"
        )
    ratios = [each["ratio"] for each in document["verdicts"] if each["ratio"] is not None]
    if ratios:
        good = sum(ratio <= GOOD_ENOUGH for ratio in ratios)
        lines.append(f"auto's choice took at most {GOOD_ENOUGH:.1f} times the best in {good} of {len(ratios)}")
    return lines


def _csv(document: Document) -> str:
    rows: Sequence[Mapping[str, Any]]
    if document["kind"] == "against":
        rows = document["results"]
    elif document["kind"] == "worlds":
        rows = [_flat(each) for each in document["results"]]
    else:
        rows = [{"phase": phase, **entry} for phase in ("prefill", "decode") for entry in document[phase]]
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out.getvalue()


def _flat(world: Mapping[str, Any]) -> dict[str, Any]:
    """A world's figures under one name each."""
    offloaded = world["offloaded"]
    return {
        **{key: world[key] for key in ("model", "gpu", "tee", "link", "servers")},
        "local_prefill_seconds": world["local"]["prefill_seconds"],
        "local_decode_step_seconds": world["local"]["decode_step_seconds"],
        "offloaded_prefill_seconds": offloaded["prefill"]["seconds"],
        "offloaded_prefill_bound_by": offloaded["prefill"]["bound_by"],
        "offloaded_decode_step_seconds": offloaded["decode"]["seconds"],
        "prefill_plan": world["choice"]["prefill"],
        "decode_plan": world["choice"]["decode"],
        "total_seconds": world["total_seconds"],
        "prefill_break_even_bytes_per_second": world["break_even"]["prefill_bytes_per_second"],
        "decode_break_even_bytes_per_second": world["break_even"]["decode_bytes_per_second"],
    }


_TABLES = {"against": _against, "worlds": _worlds}
