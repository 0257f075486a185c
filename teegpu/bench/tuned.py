"""The documents of ``teegpu tune``, ``teegpu.tune/1``, and how they are shown. Pure.

    {"schema", "kind": "tune", "made_at", "model": {…}, "settings": {"prompt_tokens", "decode_tokens", "link",
     "endpoints", "wire_dtype", "allow_lossy", "plans"}, "basis": "…", "prefill": [P, …], "decode": [P, …],
     "choice": {"settings": {…}, "prefill": P, "decode": P, "total_seconds"}, "local": {"prefill_seconds",
     "decode_step_seconds"}, "checked": [{"phase", "plan", "predicted_seconds", "measured_seconds", …}], "notes": […]}
    P = {"plan", "wire_dtype", "transport", "chunk_tokens", "seconds", "lossy"}

Those of kind ``what-if`` are made by ``bench.whatif``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

from teegpu import facts, formats
from teegpu.bench import document as doc
from teegpu.bench.tuning import LOSSY, Wanted
from teegpu.config import to_toml
from teegpu.errors import UsageError
from teegpu.facts import LOCAL
from teegpu.formats import NOTHING
from teegpu.record.events import DECODE, PREFILL
from teegpu.stats.profile import Profile, Way
from teegpu.tee.choose import NEAR, pick
from teegpu.units import human_seconds

FORMATS: Final = ("table", "json", "csv", "md")

GOOD: Final = 0.2
"""A prediction that is further off than this share of what was measured is called wrong."""

BOUNDS: Final = {
    "up": "link up", "down": "link down", "rounds": "round trips", "runner": "TEE", "server": "server",
    "cores": "shared cores",
}  # fmt: skip

Document = Mapping[str, Any]
Rows = list[list[str]]


def of_profile(
    profile: Profile, wanted: Wanted, own_wire: str, *, local_fits: bool, facts_of_it: dict[str, Any]
) -> dict[str, Any]:
    """What ``profile`` predicts. ``own_wire``: the wire dtype that the settings come to; ``facts_of_it``: how it was
    measured. Raises ``UsageError`` where it says nothing of that prompt."""
    kinds = dict.fromkeys((row.transport, row.wire_dtype) for row in profile.measured)
    found = {
        (transport, wire): {
            PREFILL: profile.ways(PREFILL, transport, wire, wanted.prompt_tokens),
            DECODE: profile.ways(DECODE, transport, wire, wanted.position),
        }
        for transport, wire in kinds
    }
    allowed = {
        kind: phases
        for kind, phases in found.items()
        if all(phases.values()) and (kind[1] == own_wire or wanted.allow_lossy)
    }
    if not allowed:
        raise UsageError(
            f"the profile says nothing of {wanted.prompt_tokens:,} prompt tokens with the wire dtype {own_wire}: "
            f"'{profile.command} --prompt-tokens {wanted.prompt_tokens}' measures that"
        )
    embedded = not profile.endpoints
    plans = [
        name for name, plan in facts.PLANS.items() if plan.offered and (plan.remote or (local_fits and not embedded))
    ]
    choice = _choice(allowed, plans, own_wire, wanted)
    rows = {phase: _rows(found, phase, own_wire) for phase in (PREFILL, DECODE)}
    local = {phase: next((row["seconds"] for row in each if row["plan"] == LOCAL.name), None)
             for phase, each in rows.items()}  # fmt: skip
    server = profile.server
    return {
        "schema": doc.TUNE_SCHEMA,
        "kind": "tune",
        "made_at": doc.now(),
        "versions": doc.versions(),
        "model": {"name": profile.model, "digest": profile.digest},
        "settings": {
            "prompt_tokens": wanted.prompt_tokens,
            "decode_tokens": wanted.decode_tokens,
            "link": profile.link,
            "endpoints": list(profile.endpoints),
            "wire_dtype": own_wire,
            "allow_lossy": wanted.allow_lossy,
            "plans": plans,
        },
        "basis": f"profile of {profile.created_at}: server in {server.dtype} on {server.device}",
        **rows,
        "choice": choice,
        "local": {"prefill_seconds": local[PREFILL], "decode_step_seconds": local[DECODE]},
        "measured": facts_of_it,
        "checked": [],
        "notes": [*_notes(local, choice, wanted, local_fits, embedded), *facts_of_it.get("notes", ())],
    }


def _rows(
    found: Mapping[tuple[str, str], Mapping[str, Sequence[Way]]], phase: str, own_wire: str
) -> list[dict[str, Any]]:
    """Every prediction, quickest first; of the plan local, which has no link, one."""
    rows: list[dict[str, Any]] = []
    for (transport, wire), phases in found.items():
        for way in phases[phase]:
            remote = facts.plan(way.plan).remote
            if remote or all(row["plan"] != way.plan for row in rows):
                rows.append(_row(way, transport, wire, own_wire))
    return sorted(rows, key=lambda row: float(row["seconds"]))


def _row(way: Way, transport: str, wire: str, own_wire: str) -> dict[str, Any]:
    remote = facts.plan(way.plan).remote
    return {
        "plan": way.plan,
        "wire_dtype": wire if remote else None,
        "transport": transport if remote else None,
        "chunk_tokens": way.chunk_tokens or None if remote and facts.transport(transport).overlaps else None,
        "seconds": way.seconds,
        "lossy": remote and wire in LOSSY and wire != own_wire,
    }


def _choice(
    allowed: Mapping[tuple[str, str], Mapping[str, Sequence[Way]]], plans: Sequence[str], own_wire: str, wanted: Wanted
) -> dict[str, Any]:
    """One wire dtype and one transport for both phases, a plan for each; the first of those that are about equal."""
    best = []
    for (transport, wire), phases in sorted(allowed.items(), key=lambda item: item[0][1] != own_wire):
        prefill, decode = (pick([way for way in ways if way.plan in plans]) for ways in phases.values())
        best.append((prefill.seconds + wanted.decode_tokens * decode.seconds, transport, wire, prefill, decode))
    least = min(each[0] for each in best)
    total, transport, wire, prefill, decode = next(each for each in best if each[0] <= least * NEAR)
    settings: dict[str, Any] = {"run.prefill_plan": facts.AUTO, "run.decode_plan": facts.AUTO}
    if facts.plan(prefill.plan).remote or facts.plan(decode.plan).remote:
        settings["run.transport"] = transport
        if wire != own_wire:
            settings["run.wire_dtype"] = wire
    return {
        "settings": settings,
        "prefill": _row(prefill, transport, wire, own_wire),
        "decode": _row(decode, transport, wire, own_wire),
        "total_seconds": total,
    }


def _notes(
    local: Mapping[str, float | None], choice: Document, wanted: Wanted, local_fits: bool, embedded: bool
) -> list[str]:
    if not local_fits:
        return ["local is not proposed: its weights do not fit into the memory that is available here"]
    first, step = local[PREFILL], local[DECODE]
    if not embedded or first is None or step is None:
        return []
    total = first + wanted.decode_tokens * step
    if total >= choice["total_seconds"]:
        return []
    return [
        f"all in the TEE (--plan local) would take {human_seconds(total)} in place of "
        f"{human_seconds(choice['total_seconds'])}; it is not chosen beside an embedded server, which is there to show "
        "the split"
    ]


# Shown


def choose_format(given: str, out: str) -> str:
    return formats.choose(given, out, FORMATS)


def render(document: Document, form: str) -> str:
    """``document`` in ``form``, ending in a line break."""
    if form == "json":
        return formats.as_json(document)
    if form == "csv":
        return _csv(document)
    markdown = form == "md"
    blocks = [_heading(document)]
    for title, rows in _worlds(document) if document["kind"] == "what-if" else _tables(document):
        if len(rows) > 1:
            drawn = formats.markdown(rows) if markdown else formats.aligned(rows)
            blocks.append(f"{title}\n\n{drawn}" if markdown else f"{title}\n{drawn}")
    remarks = [*(_remarks(document) if document["kind"] == "tune" else ()), *document["notes"]]
    if remarks:
        blocks.append("\n".join(f"- {line}" if markdown else line for line in remarks))
    return "\n\n".join(blocks) + "\n"


def _heading(document: Document) -> str:
    settings = document["settings"]
    parts = [f"teegpu tune · {document['model']['name']}"]
    parts.append(f"{settings['prompt_tokens']:,} prompt tokens · {settings['decode_tokens']:,} after them")
    if "link" in settings:
        parts.append(f"link {settings['link']}" if settings["link"] else "no emulated link")
    parts += settings.get("endpoints", ())
    return " · ".join(parts) + f"\npredictions from {document['basis']}"


def _tables(document: Document) -> list[tuple[str, Rows]]:
    return [
        ("Prefill: predicted time to the first token", _ranked(document, PREFILL)),
        ("Decode: predicted time of each token after it", _ranked(document, DECODE)),
        ("Predicted, and what following it took", _checked(document)),
    ]


def _ranked(document: Document, phase: str) -> Rows:
    chosen = document["choice"][phase]
    rows = [["plan", "wire", "transport", "chunk", "seconds", ""]]
    for entry in document[phase]:
        mark = "chosen" if entry == chosen else "lossy" if entry["lossy"] else ""
        chunk = f"{entry['chunk_tokens']:,}" if entry["chunk_tokens"] else NOTHING
        rows.append([
            entry["plan"], entry["wire_dtype"] or NOTHING, entry["transport"] or NOTHING, chunk,
            human_seconds(entry["seconds"]), mark,
        ])  # fmt: skip
    return [[cell for place, cell in enumerate(row) if place != 3 or phase == PREFILL] for row in rows]


def _checked(document: Document) -> Rows:
    rows = [["phase", "plan", "predicted", "measured", "error", ""]]
    for each in document["checked"]:
        error = each["error_share"]
        rows.append([
            each["phase"], each["plan"], human_seconds(each["predicted_seconds"]),
            human_seconds(each["measured_seconds"]), f"{error:+.0%}", "" if abs(error) <= GOOD else "wrong",
        ])  # fmt: skip
    return rows


def _remarks(document: Document) -> list[str]:
    choice = document["choice"]
    tokens = document["settings"]["decode_tokens"]
    first, step = choice["prefill"], choice["decode"]
    chunk = f" in chunks of {first['chunk_tokens']:,}" if first["chunk_tokens"] else ""
    over = first["transport"] or step["transport"]
    lines = [
        f"choice: prefill {first['plan']}{chunk}, decode {step['plan']}" + (f", over {over}" if over else ""),
        f"predicted: {human_seconds(first['seconds'])} to the first token, {human_seconds(step['seconds'])} each after "
        f"it, {human_seconds(choice['total_seconds'])} in all for {tokens:,} more tokens",
    ]
    local = document["local"]
    if local["prefill_seconds"] is not None and local["decode_step_seconds"] is not None:
        lines.append(
            f"all in the TEE: {human_seconds(local['prefill_seconds'])} to the first token, "
            f"{human_seconds(local['decode_step_seconds'])} each after it"
        )
    settings = ", ".join(f"{key} = {to_toml(value)}" for key, value in choice["settings"].items())
    lines.append(f"settings that go by it (--apply): {settings}")
    return lines


def _worlds(document: Document) -> list[tuple[str, Rows]]:
    rows = [["model", "link", "GPU", "TEE", "servers", "privacy", "all in the TEE: first token", "each after",
             "offloaded: first token", "bound by", "each after", "best: prefill", "decode", "prefill offloads from",
             "decode from"]]  # fmt: skip
    for each in document["results"]:
        local, offloaded, least = each["local"], each["offloaded"], each["break_even"]
        rows.append([
            each["model"], each["link"], each["gpu"], each["tee"], str(each["servers"]), each["privacy"],
            human_seconds(local["prefill_seconds"]), human_seconds(local["decode_step_seconds"]),
            human_seconds(offloaded["prefill"]["seconds"]), BOUNDS[offloaded["prefill"]["bound_by"]],
            human_seconds(offloaded["decode"]["seconds"]), each["choice"]["prefill"], each["choice"]["decode"],
            _rate(least["prefill_bytes_per_second"]), _rate(least["decode_bytes_per_second"]),
        ])  # fmt: skip
    assumed = [["assumption", "value", "source"]]
    assumed += [[each["what"], each["value"], each["source"]] for each in document["assumptions"]]
    return [("Predictions", rows), ("Assumptions", assumed)]


def _rate(rate: float | None) -> str:
    """A break-even bandwidth in few characters."""
    if rate is None:
        return "never"
    if rate == 0.0:
        return "any"
    bits = rate * 8
    return f"{bits / 1e9:,.3g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:,.3g} Mbit/s"


def _csv(document: Document) -> str:
    rows: Sequence[Mapping[str, Any]]
    if document["kind"] == "what-if":
        rows = [_flat(each) for each in document["results"]]
    else:
        rows = [{"phase": phase, **entry} for phase in (PREFILL, DECODE) for entry in document[phase]]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _flat(world: Mapping[str, Any]) -> dict[str, Any]:
    """A world's figures under one name each."""
    offloaded, choice = world["offloaded"], world["choice"]
    return {
        **{
            key: world[key]
            for key in ("model", "gpu", "tee", "link", "servers", "privacy", "pads_bytes", "pads_seconds")
        },
        **{f"local_{key}": value for key, value in world["local"].items()},
        "offloaded_prefill_seconds": offloaded["prefill"]["seconds"],
        "offloaded_prefill_bound_by": offloaded["prefill"]["bound_by"],
        "offloaded_decode_step_seconds": offloaded["decode"]["seconds"],
        **{f"{phase}_plan": plan for phase, plan in choice.items()},
        "total_seconds": world["total_seconds"],
        **{f"break_even_{key}": value for key, value in world["break_even"].items()},
    }
