"""What privacy costs, held against earlier runs without it: the same model on the same machine, in the clear over the
same link, and all in the TEE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from teegpu.report import facts, look
from teegpu.report.advice_local import ALIKE, tells

NONE: Final = "none"
LOCAL: Final = "local"
KINDS: Final = (NONE, LOCAL)
"""``none``: offloaded, nothing hidden. ``local``: all in the TEE."""


def wanted(document: look.Document) -> bool:
    """Whether there is something to compare: a run that hid values from servers."""
    return look.text(document, "settings", "privacy") not in ("", NONE)


def kind_of(settings: Mapping[str, Any]) -> str:
    """What a run with ``settings`` can be compared as, one of ``KINDS``; empty where it can't."""
    if settings.get("privacy", NONE) != NONE:
        return ""
    plans = {settings.get(f"{phase}_plan") for phase in facts.PHASES}
    if plans == {LOCAL}:
        return LOCAL
    return "" if LOCAL in plans else NONE


def beside(document: look.Document, others: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """For each of ``KINDS`` the first of ``others`` (newest first) that ``document`` can be compared with: its id, how
    it was set up, and the seconds that it would have taken for as many tokens, and of them the TEE's processors, phase
    by phase."""
    found: dict[str, Any] = {}
    for other in others:
        kind = kind_of(look.mapping(other, "settings"))
        if kind and kind not in found and _fits(document, other, kind):
            found[kind] = {"id": look.text(other, "id"), "setup": " · ".join(facts.setup(other)[1:])}
            for phase in facts.PHASES:
                for figure in ("seconds", "processor_seconds"):
                    found[kind][f"{phase}_{figure}"] = _scaled(document, other, phase, figure)
        if len(found) == len(KINDS):
            break
    return found


def _fits(document: look.Document, other: look.Document, kind: str) -> bool:
    if not tells(document, other):
        return False
    if kind == NONE and look.text(document, "settings", "link") != look.text(other, "settings", "link"):
        return False
    ours, theirs = (look.amount(each, "phases", "prefill", "tokens") for each in (document, other))
    return bool(theirs) and 1 / ALIKE <= ours / theirs <= ALIKE


def _scaled(document: look.Document, other: look.Document, phase: str, figure: str) -> float | None:
    """By the token: what attention adds for a longer context is left out."""
    tokens = look.amount(document, "phases", phase, "tokens")
    known = look.amount(other, "phases", phase, "tokens")
    seconds = look.amount(other, "phases", phase, figure)
    return seconds / known * tokens if tokens and known and seconds else None


def leverage(document: look.Document, phases: Iterable[str] = facts.PHASES) -> float | None:
    """The processor seconds of a TEE that does all of ``phases`` itself over those that this run took: how much work it
    is rid of. None where either is not known of a phase that took place."""
    alone = ours = 0.0
    for phase in phases:
        if not look.amount(document, "phases", phase, "tokens"):
            continue
        theirs = look.number(document, "beside", LOCAL, f"{phase}_processor_seconds")
        own = look.number(document, "phases", phase, "processor_seconds")
        if not theirs or not own:
            return None
        alone, ours = alone + theirs, ours + own
    return alone / ours if ours else None
