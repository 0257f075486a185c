"""The section of a report on privacy and verification: what they cost the TEE and the link, beside runs without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from teegpu.formats import NOTHING
from teegpu.report import facts, look
from teegpu.report.beside import KINDS, LOCAL, leverage
from teegpu.report.grid import HEADING, TOTAL, Grid, Row
from teegpu.report.parts import took_place, whole
from teegpu.stats import traffic
from teegpu.stats.traffic import Shape, Traffic
from teegpu.units import human_bytes, human_seconds, times

MASKING: Final = {
    "FIXED_POINT": "Fixed point",
    "MASK": "Masks",
    "UNMASK": "Taking masks off",
}
"""The TEE's operations that there are for privacy alone."""
VERIFY: Final = "VERIFY"
PLAIN_WIRE: Final = "fp16"


def masking_seconds(phase: Mapping[str, Any]) -> float:
    """What privacy cost the TEE in a phase."""
    return sum(look.amount(phase, "ops", name, "seconds") for name in MASKING)


def verify_seconds(phase: Mapping[str, Any]) -> float:
    return look.amount(phase, "ops", VERIFY, "seconds")


def privacy_grid(document: look.Document) -> Grid | None:
    """None for a run that hid nothing and verified nothing."""
    if not facts.privacy(document):
        return None
    phases = {name: look.mapping(document, "phases", name) for name in facts.PHASES}
    used = [name for name, phase in phases.items() if took_place(phase)]
    rows, notes = [Row(("", *used), HEADING)], list[str]()
    for name, label in MASKING.items():
        spent = [look.amount(phases[phase], "ops", name, "seconds") for phase in used]
        if any(spent):
            rows.append(Row((f"  {label}", *(human_seconds(seconds) for seconds in spent))))
    offline = look.mapping(document, "settings", "offline")
    if seconds := look.number(offline, "seconds"):
        cells = [human_seconds(seconds), *[NOTHING] * (len(used) - 1)]
        rows.append(Row(("  Pads, made before the prompt", *cells[: len(used)]), TOTAL))
        notes.append(
            f"Pads were made for {look.amount(offline, 'tokens'):,.0f} tokens and {look.amount(offline, 'logits'):,.0f}"
            f" logits, in {human_bytes(look.amount(offline, 'most_bytes'))} of memory; no phase has that time."
        )
    for label, seconds_of in (("Privacy, in the TEE", masking_seconds), ("Verification", verify_seconds)):
        shown = [_share(seconds_of(phases[name]), whole(phases[name])) for name in used]
        if any(cell != NOTHING for cell in shown):
            rows.append(Row((f"  {label}", *shown), TOTAL))
    plain = {name: _plain(document, name, phases[name]) for name in used}
    for way in ("up", "down"):
        cells = [_ratio(look.amount(phases[name], f"bytes_{way}"), plain[name], way) for name in used]
        if any(cell != NOTHING for cell in cells):
            rows.append(Row((f"  Bytes {way}, over {PLAIN_WIRE} in the clear", *cells)))
    compared, sources = _compared(document, used)
    return Grid(f"Privacy: {facts.privacy(document)}", (*rows, *compared), (*notes, *sources)) if used else None


def _share(seconds: float, wall: float) -> str:
    return f"{human_seconds(seconds)} ({seconds / wall:.1%})" if seconds and wall else NOTHING


def _plain(document: look.Document, name: str, phase: Mapping[str, Any]) -> Traffic | None:
    """What the same plan would have sent in the clear."""
    shape = Shape.of(look.mapping(document, "model"))
    settings = look.mapping(document, "settings")
    plan, passes = look.text(settings, f"{name}_plan"), int(look.amount(phase, "passes"))
    if shape is None or not traffic.together(plan, 1) or not passes:
        return None
    prompt = round(look.amount(document, "phases", "prefill", "tokens") / passes) if name == "prefill" else 0
    if name == "decode":
        return traffic.decode(shape, plan, PLAIN_WIRE, passes=passes, start=0, overlaps=False)
    chunk = int(look.amount(settings, "chunk_tokens")) or prompt
    if not prompt:
        return None
    one = traffic.prefill(shape, plan, PLAIN_WIRE, tokens=prompt, chunk_tokens=max(1, chunk), overlaps=False)
    return one.times(passes)


def _ratio(nbytes: float, plain: Traffic | None, way: str) -> str:
    if plain is None or not nbytes:
        return NOTHING
    other = plain.bytes_up_with_headers if way == "up" else plain.bytes_down_with_headers
    return times(nbytes / other) if other else NOTHING


def _compared(document: look.Document, used: list[str]) -> tuple[list[Row], list[str]]:
    """Rows of earlier runs that did the same in the clear, or in the TEE alone; and what they were."""
    labels = {"none": "In the clear took", LOCAL: "All in the TEE took"}
    rows, notes = [], []
    for kind in KINDS:
        other = look.mapping(document, "beside", kind)
        known = [look.number(other, f"{name}_seconds") for name in used]
        if any(value is not None for value in known):
            cells = (NOTHING if value is None else human_seconds(value) for value in known)
            rows.append(Row((f"  {labels[kind]}", *cells)))
            if kind == LOCAL and any(ratios := [leverage(document, [name]) for name in used]):
                rows.append(Row(("  Leverage", *(NOTHING if each is None else times(each) for each in ratios)), TOTAL))
                notes.append(
                    "Leverage: the processor time of all in the TEE over what this run took of it; a mode pays above 1."
                )
            notes.append(f"{labels[kind]}: run {look.text(other, 'id')} ({look.text(other, 'setup')}), by the token.")
    if not rows and look.text(document, "settings", "privacy") not in ("", "none"):
        notes.append("No run in the clear or in the TEE alone is recorded of this model here to compare with.")
    return rows, notes
