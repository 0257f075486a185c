"""What to change about a run, and what that would save: pure rules over its document, ranked by saving.

    advise(document) -> [{"id", "text", "setting", "value", "settings", "predicted_saving_seconds", "evidence"}, …]

``setting`` and ``value`` are the first of ``settings``, as they stand in ``config.toml`` (empty where there is none to
change). Silent where there is nothing to say that is true: predictions below 5 % of the run or 20 ms are not made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teegpu.report import advice_compute, advice_rules
from teegpu.report.advice_local import find_reference
from teegpu.report.advice_reading import Reading
from teegpu.report.advice_rules import Advice

__all__ = ["advise", "find_reference"]


def advise(document: Mapping[str, Any], local_reference: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Advice about the run in ``document``, what saves most first; of two that change one setting, the better one.

    ``local_reference`` is the document of an earlier run with the plan ``local``, of the same model on the same machine
    (see ``find_reference``): with it more can be said about what the TEE would take alone. One that does not fit is not
    used.
    """
    run = Reading(document)
    if not run.seconds:
        return []
    outage = advice_rules.retries(run)
    if outage is not None:
        return [_entry(outage)]
    given = [advice for rule in (*advice_rules.RULES, *advice_compute.rules(local_reference)) for advice in rule(run)]
    ranked = sorted(given, key=lambda advice: -advice.saving_seconds)
    kept: list[Advice] = []
    for advice in ranked:
        if not any(advice.settings.keys() & better.settings.keys() for better in kept):
            kept.append(advice)
    if not any(advice.saving_seconds for advice in kept):
        kept.extend(advice_compute.at_the_limit(run))
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
