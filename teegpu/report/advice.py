"""What to change about a run, and what that would save: pure rules over its document, ranked by saving.

    advise(document) -> [{"id", "text", "setting", "value", "settings", "predicted_saving_seconds", "evidence"}, …]

``setting`` and ``value`` are the first of ``settings``, as they stand in ``config.toml`` (empty where there is none to
change). Silent where there is nothing to say that is true: predictions below 5 % of the run or 20 ms are not made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from teegpu.report import advice_compute, advice_rules, advice_serving, facts
from teegpu.report.advice_local import find_references
from teegpu.report.advice_reading import Reading
from teegpu.report.advice_rules import Advice

__all__ = ["advise", "find_references"]


def advise(document: Mapping[str, Any], local_references: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Advice about the run in ``document``, what saves most first; of two that change one setting, the better one.

    ``local_references`` are the documents of earlier runs with the plan ``local``, of the same model on the same
    machine (see ``find_references``): with them more can be said about what the TEE would take alone. Those that do not
    fit are not used. A request that stood still is named first, and left out of the rest.
    """
    run = Reading(document)
    if not run.seconds:
        return []
    if facts.requests(document):
        return [_entry(advice) for advice in advice_serving.advise(run)]
    outage = advice_rules.retries(run)
    if outage is not None:
        return [_entry(outage)]
    stalls = advice_rules.stalls(run)
    if stalls:
        run = Reading(advice_rules.without(document, stalls))
    given = [advice for rule in (*advice_rules.RULES, *advice_compute.rules(local_references)) for advice in rule(run)]
    ranked = sorted(given, key=lambda advice: -advice.saving_seconds)
    kept: list[Advice] = []
    for advice in ranked:
        if not any(advice.settings.keys() & better.settings.keys() for better in kept):
            kept.append(advice)
    if not any(advice.saving_seconds for advice in kept):
        kept.extend(advice_compute.at_the_limit(run))
    if stalls:
        kept.insert(0, advice_rules.stalled(stalls))
    return [_entry(advice) for advice in kept]


def _entry(advice: Advice) -> dict[str, Any]:
    setting, value = next(iter(advice.settings.items()), ("", ""))
    return {
        "id": advice.id,
        "text": advice.text,
        "setting": setting,
        "value": value,
        "settings": advice.settings,
        "predicted_saving_seconds": advice.saving_seconds,
        "evidence": advice.evidence,
    }
