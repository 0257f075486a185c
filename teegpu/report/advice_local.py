"""What a run would have taken in the TEE alone, as far as that is known."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from teegpu.record.events import DECODE
from teegpu.report import facts
from teegpu.report.advice_reading import LOCAL, Phase, Reading

REFERENCES: Final = 9
"""So many stored runs are looked at."""

ALIKE: Final = 4.0
"""A stored run tells of a prompt that is at most so many times longer or shorter than its own."""


@dataclass(frozen=True, slots=True)
class LocalEstimate:
    """``seconds`` of a phase in the TEE alone, and ``basis``: how that is known."""

    seconds: float
    basis: str


def estimate(reading: Reading, phase: Phase, references: Sequence[Mapping[str, Any]]) -> LocalEstimate | None:
    """``phase`` in the TEE alone: as the run measured it before it began, or the middle one of ``references``, stored
    runs of the same model on the same machine. None where neither tells: the server's own times say too little of it,
    they hold its wake-ups and another dtype."""
    probed = reading.probed(phase, LOCAL)
    if probed is not None:
        return LocalEstimate(probed, "what this run measured before it began")
    known = [seconds for each in references if (seconds := _from_reference(reading, phase, each)) is not None]
    if not known:
        return None
    runs = "an earlier run" if len(known) == 1 else f"the middle one of {len(known)} earlier runs"
    return LocalEstimate(statistics.median(known), f"{runs} on this machine")


def _from_reference(reading: Reading, phase: Phase, reference: Mapping[str, Any]) -> float | None:
    other = Reading(reference)
    if not alike(reading.document, reference):
        return None
    known = other.decode if phase.name == DECODE else other.prefill
    if known.plan != LOCAL or not known.tokens or not known.seconds or not phase.tokens:
        return None
    apart = reading.prompt_tokens / max(1, other.prompt_tokens)
    if not 1 / ALIKE <= apart <= ALIKE:
        return None
    # By the token: what attention adds for a longer context is left out, and that of a shorter one counted.
    return known.seconds / known.tokens * phase.tokens


def alike(document: Mapping[str, Any], reference: Mapping[str, Any]) -> bool:
    """Whether ``reference`` ran the same model on a machine like that of ``document``."""
    ours, theirs = _machine(document), _machine(reference)
    return ours[0] is not None and ours == theirs


def tells(document: Mapping[str, Any], reference: Mapping[str, Any]) -> bool:
    """Whether ``reference`` says what ``document`` would have taken set up as it was: it came to its end, on a machine
    like that one, and nobody else wanted the cores meanwhile."""
    return reference.get("status") == "complete" and alike(document, reference) and not facts.load(reference)


def _machine(document: Mapping[str, Any]) -> tuple[Any, ...]:
    environment, settings = document.get("environment") or {}, document.get("settings") or {}
    cores = environment.get("cores") or (settings.get("threads") or {}).get("cores")
    digest = (document.get("model") or {}).get("digest")
    return digest or None, environment.get("machine"), environment.get("cpu"), cores


def find_references(document: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first of ``others`` (newest first) that tell what ``document`` would have taken in the TEE alone: several, as
    any one of them may have been disturbed."""
    found: list[Mapping[str, Any]] = []
    for other in others:
        settings = other.get("settings") or {}
        local = settings.get("prefill_plan") == settings.get("decode_plan") == LOCAL
        if local and tells(document, other):
            found.append(other)
        if len(found) == REFERENCES:
            break
    return found
