"""The documents of ``teegpu tune``: from a profile, or from a world on paper, to predictions and a choice. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Final

from teegpu.bench import assumptions, predictions
from teegpu.bench import document as doc
from teegpu.bench.assumptions import WhatIf
from teegpu.bench.predictions import SCHEMA, Best, Wanted
from teegpu.errors import UsageError
from teegpu.metrics import chooser
from teegpu.metrics.chooser import Candidate
from teegpu.metrics.cost_model import CostModel, Settings
from teegpu.metrics.demand import LOCAL
from teegpu.metrics.predict import Link
from teegpu.metrics.profile import Profile
from teegpu.metrics.rates import Rates
from teegpu.settings import PLANS

SEARCHED_BYTES: Final = (1.25e4, 1.25e12)
"""Bandwidths, in bytes per second, between which a break-even is looked for: 100 kbit/s to 10 Tbit/s."""


def of_profile(profile: Profile, wanted: Wanted, facts: dict[str, Any]) -> dict[str, Any]:
    """What ``profile`` predicts. ``facts``: how it was measured."""
    model = CostModel(profile.shape, profile.rates)
    server = profile.server
    basis = f"profile of {profile.created_at}: server in {server.dtype} on {server.device}"
    made = _document("tune", profile.model, model, wanted, basis)
    made["settings"] |= {"link": profile.link, "endpoints": list(profile.endpoints)}
    made["measured"] = facts
    made["notes"] += list(facts.get("notes", ()))
    return made


def of_world(world: WhatIf, wanted: Wanted) -> dict[str, Any]:
    """What would be there; every figure in it is a prediction."""
    model = CostModel(world.shape, assumptions.rates(world))
    made = _document("what-if", world.model, model, wanted, "assumptions: every figure is a prediction")
    made["settings"]["link"] = str(world.link)
    made["assumptions"] = [asdict(each) for each in assumptions.listed(world)]
    made["break_even"] = break_even(world, wanted)
    made["notes"].insert(0, "all figures are predictions from the assumptions above; nothing of this was measured")
    made["notes"] += assumptions.memory_notes(world)
    return made


def of_worlds(worlds: Sequence[tuple[WhatIf, Wanted]]) -> dict[str, Any]:
    """Several worlds side by side, one entry of ``results`` for each: all in the TEE, the best that offloads, and the
    least bandwidth from which that is as quick."""
    results = []
    known: dict[tuple[str, str], assumptions.Assumption] = {}
    for world, wanted in worlds:
        made = of_world(world, wanted)
        for each in assumptions.listed(world):
            known.setdefault((each.what, each.value), each)
        results.append({
            "model": world.model, "gpu": world.gpu_name, "tee": world.tee_name, "link": str(world.link),
            "servers": world.servers,
            "local": made["local"],
            "offloaded": {phase: _offloaded(made[phase], wanted) for phase in ("prefill", "decode")},
            "choice": {phase: made["choice"][phase]["plan"] for phase in ("prefill", "decode")},
            "total_seconds": made["choice"]["total_seconds"],
            "break_even": made["break_even"],
        })  # fmt: skip
    first = worlds[0][1]
    return {
        "schema": SCHEMA,
        "kind": "worlds",
        "made_at": doc.now(),
        "versions": doc.versions(),
        "model": {"name": "what if"},
        "settings": {"prompt_tokens": first.prompt_tokens, "decode_tokens": first.decode_tokens},
        "basis": "assumptions: every figure is a prediction",
        "assumptions": [
            asdict(each) for each in known.values() if each.what not in ("link", "model") and "servers" not in each.what
        ],
        "results": results,
        "notes": [
            "all figures are predictions from the assumptions above; nothing of this was measured",
            *dict.fromkeys(note for world, _ in worlds for note in assumptions.memory_notes(world)),
        ],
    }


def _offloaded(rows: Sequence[dict[str, Any]], wanted: Wanted) -> dict[str, Any]:
    """The best row of a plan that may be chosen, has a server and loses nothing that was not asked for."""
    return next(
        row
        for row in rows
        if row["plan"] in wanted.plans and row["plan"] != LOCAL and (wanted.allow_lossy or not row["lossy"])
    )


def _document(kind: str, name: str, model: CostModel, wanted: Wanted, basis: str) -> dict[str, Any]:
    prefills, decodes = predictions.ranked(model, wanted)
    known = model.rates.wire_dtypes
    if wanted.own_wire not in known:
        raise UsageError(f"nothing is known of the wire dtype {wanted.own_wire}: known are {', '.join(known)}")
    chosen = predictions.best(prefills, decodes, wanted, known)
    own = wanted.own_wire

    def rows(ranked: Sequence[Candidate]) -> list[dict[str, Any]]:
        return [predictions.row(each, model, own) for each in ranked]

    shape = model.shape
    return {
        "schema": SCHEMA,
        "kind": kind,
        "made_at": doc.now(),
        "versions": doc.versions(),
        "model": {"name": name, "layers": shape.layers, "hidden_size": shape.hidden},
        "settings": {
            "prompt_tokens": wanted.prompt_tokens,
            "decode_tokens": wanted.decode_tokens,
            "link": "",
            "endpoints": [],
            "wire_dtype": own,
            "allow_lossy": wanted.allow_lossy,
            "plans": list(wanted.choosable),
        },
        "basis": basis,
        "assumptions": [],
        "prefill": rows(prefills),
        "decode": rows(decodes),
        "choice": {
            "settings": predictions.as_settings(chosen, wanted),
            "prefill": predictions.row(chosen.prefill, model, own),
            "decode": predictions.row(chosen.decode, model, own),
            "total_seconds": chosen.seconds,
        },
        "local": _local(prefills, decodes),
        "notes": _notes(wanted, chosen, prefills, decodes),
    }


def _local(prefills: Sequence[Candidate], decodes: Sequence[Candidate]) -> dict[str, float | None]:
    """What all in the TEE would take."""

    def seconds(ranked: Sequence[Candidate]) -> float | None:
        return next((each.seconds for each in ranked if each.plan == LOCAL), None)

    return {"prefill_seconds": seconds(prefills), "decode_step_seconds": seconds(decodes)}


def _notes(wanted: Wanted, chosen: Best, prefills: Sequence[Candidate], decodes: Sequence[Candidate]) -> list[str]:
    notes = []
    if not wanted.local_fits:
        notes.append("local is not proposed: its weights do not fit into the memory that is available here")
    if LOCAL not in wanted.plans and any(each.plan == LOCAL for each in prefills):
        best = min(each.seconds for each in prefills if each.plan == LOCAL)
        step = min((each.seconds for each in decodes if each.plan == LOCAL), default=math.nan)
        total = best + wanted.decode_tokens * step
        if total < chosen.seconds:
            notes.append(
                f"all in the TEE would take {total:.3g} s in place of {chosen.seconds:.3g} s: the server is an "
                "embedded one, on the same cores, so it can't win; local is left out because it is there to show the "
                "split"
            )
    return notes


# Where offloading begins to pay


def break_even(world: WhatIf, wanted: Wanted) -> dict[str, float | None]:
    """The least bandwidth each way, in bytes per second, from which the best offloading plan is as quick as all in the
    TEE, for a prefill and for a step of decode; None where none is enough, 0 where any is."""
    found = assumptions.rates(world)
    prefill, decode = (_least_bandwidth(world, found, wanted, phase) for phase in ("prefill", "decode"))
    return {"prefill_bytes_per_second": prefill, "decode_bytes_per_second": decode}


def _least_bandwidth(world: WhatIf, found: Rates, wanted: Wanted, phase: str) -> float | None:
    local = _seconds(CostModel(world.shape, found), wanted, phase, (LOCAL,))

    def pays(bandwidth: float) -> bool:
        link = Link(found.link.rtt_seconds, bandwidth, bandwidth, found.link.overhead_seconds)
        model = CostModel(world.shape, replace(found, link=link))
        plans = tuple(plan for plan in PLANS if plan != LOCAL and plan in wanted.plans)
        return _seconds(model, wanted, phase, plans) <= local

    low, high = SEARCHED_BYTES
    if not pays(high):
        return None
    if pays(low):
        return 0.0
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high


def _seconds(model: CostModel, wanted: Wanted, phase: str, plans: Sequence[str]) -> float:
    base: Settings = replace(wanted.base, wire_dtype=wanted.own_wire, transport=predictions.TRANSPORTS[0])
    if phase == "prefill":
        return chooser.prefills(model, base, tokens=wanted.prompt_tokens, plans=plans)[0].seconds
    position = wanted.prompt_tokens + wanted.decode_tokens // 2
    return chooser.decodes(model, base, position=position, plans=plans)[0].seconds
