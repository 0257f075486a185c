"""What a report says first, in three lines: how it went, what took most, and what to do about it; and where the run
predicted what it would take, that beside what it took."""

from __future__ import annotations

from teegpu.report import facts, look
from teegpu.report.advice_reading import Reading
from teegpu.report.parts import breakdown, took_place
from teegpu.units import human_seconds, plural, times


def opening(document: look.Document) -> list[tuple[str, str]]:
    """(label, sentence) of each line; none for a run of which nothing was measured."""
    phases = {name: phase for name in facts.PHASES if took_place(phase := look.mapping(document, "phases", name))}
    if not phases:
        return []
    found = [("Verdict", _verdict(document)), ("Largest cost", _largest_cost(phases))]
    if told := prediction(document):
        found.append(("Predicted", told))
    if advice := facts.advice(document):
        first = advice[0]
        told = " ".join(part for part in (first["setting"], facts.saving(first)) if part)
        found.append(("To do", told or first["text"]))
    elif look.text(document, "status") == "complete":
        found.append(("To do", "nothing: no change is known that would save 5 % of it"))
    return found


def _verdict(document: look.Document) -> str:
    prefill, decode = (look.mapping(document, "phases", name) for name in facts.PHASES)
    wall = sum(breakdown(phase).wall for phase in (prefill, decode))
    if requests := facts.requests(document):
        return _served(requests)
    made = facts.generated(document) or 0
    told = f"{look.amount(prefill, 'tokens'):,.0f} + {plural(made, 'token')} in {human_seconds(wall)}"
    if (ratio := look.number(document, "limit", "ratio")) is not None:
        told += f", {times(ratio)} what its link, GPU and TEE take at least"
    elif not facts.remote(document):
        told += ", all in the TEE"
    if busy := facts.load(document):
        told += f"; the machine was busy: {busy}"
    return f"{told}; the record is not whole" if facts.remarks(document) else told


def _served(requests: look.Document) -> str:
    ended = look.mapping(requests, "ended")
    count = sum(look.amount(ended, reason) for reason in ended)
    told = f"{plural(count, 'request')} answered" if count else f"{plural(look.amount(requests, 'arrived'), 'request')}"
    for reason, what in (("abort", "given up"), ("error", "failed")):
        if look.amount(ended, reason):
            told += f", {look.amount(ended, reason):,.0f} of them {what}"
    made, seconds = look.amount(requests, "made_tokens"), look.amount(requests, "step_seconds")
    told += f"; {plural(made, 'token')} in {human_seconds(seconds)} of work"
    if seconds:
        told += f", {made / seconds:,.1f} a second"
    for name, what in (("ttft", "first token"), ("itl", "each further one")):
        if (p95 := look.number(requests, f"{name}_seconds", "p95")) is not None:
            told += f"; {what} within {human_seconds(p95)} for 95 %"
    return told


def prediction(document: look.Document) -> str:
    """What the run expected of itself before it began, and what came of it; empty where nothing was predicted."""
    run = Reading(document)
    told = []
    for phase, what in ((run.prefill, "to the first token"), (run.decode, "each after it")):
        expected = run.probed(phase, phase.plan)
        if expected is not None and phase.passes:
            each, took = (human_seconds(seconds / phase.passes) for seconds in (expected, phase.seconds))
            told.append(f"{each} {what}, took {took}")
    return "; ".join(told)


def _largest_cost(phases: dict[str, look.Document]) -> str:
    costs: list[tuple[float, str, str, str]] = []
    whole = 0.0
    for name, phase in phases.items():
        parts = breakdown(phase)
        whole += parts.wall
        calls, spent = look.amount(phase, "rpc_calls"), sum(item.exposed for item in parts.communication)
        each = f": {calls:,.0f} RPC calls of {human_seconds(spent / calls)}" if calls else ""
        costs.append((spent, "communication", name, each))
        costs.append((sum(item.exposed for item in parts.gpu), "GPU compute", name, ""))
        costs.append((sum(item.exposed for item in parts.tee), "TEE compute", name, ""))
        costs.append((parts.server.exposed, "server overhead", name, ""))
        costs.append((parts.other.exposed, "what is accounted for nowhere", name, ""))
    seconds, what, name, more = max(costs)
    share = f", {seconds / whole:.0%}" if whole else ""
    return f"{what} in {name}, {human_seconds(seconds)} of {human_seconds(whole)}{share}{more}"
