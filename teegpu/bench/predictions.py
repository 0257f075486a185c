"""Predictions side by side: every plan, wire dtype, transport and chunk, ranked, and which of them to take. Pure.

A document ``teegpu.tune/1`` holds them:

    {"schema", "kind": "tune|what-if|against", "made_at", "model": {…}, "settings": {"prompt_tokens", "decode_tokens",
     "link", "endpoints", "allow_lossy"}, "basis": "…", "assumptions": [{"what", "value", "source"}],
     "prefill": [P, …], "decode": [P, …], "choice": {"settings": {…}, "prefill": P, "decode": P, "total_seconds"},
     "local": {"prefill_seconds", "decode_seconds"}, "notes": [...]}
    P = {"plan", "wire_dtype", "transport", "chunk_tokens", "seconds", "bound_by", "tee_seconds",
         "serialization_seconds", "server_seconds", "up_seconds", "down_seconds", "rounds", "lossy", "shows"}
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from teegpu.metrics import chooser
from teegpu.metrics.chooser import AUTO_PLANS, NEAR, Candidate
from teegpu.metrics.cost_model import CostModel, Settings
from teegpu.metrics.demand import LOCAL
from teegpu.settings import PLANS

SCHEMA: Final = "teegpu.tune/1"

TRANSPORTS: Final = ("pipelined", "zmq", "pipelined+zstd", "zmq+zstd")
"""The first of those that are about equally quick is taken: the default, then the plainer one."""

LOSSY: Final = ("bf16", "int8")
"""Wire dtypes that are never proposed without ``--allow-lossy``, but where the servers round to bf16 anyway."""

SHOWS: Final = {
    "local": "nothing",
    "fused": "activations",
    "attention": "activations",
    "batched": "token ids, scores",
    "per-op": "token ids, scores",
}
"""What the server sees."""


@dataclass(frozen=True)
class Wanted:
    """What is to be ranked. ``own_wire`` is what the settings come to without a loss that was not asked for, ``plans``
    what may be chosen; all plans are shown."""

    prompt_tokens: int
    decode_tokens: int
    base: Settings
    own_wire: str
    allow_lossy: bool = False
    chunk_tokens: int = 0
    plans: Collection[str] = AUTO_PLANS
    local_fits: bool = True

    @property
    def choosable(self) -> tuple[str, ...]:
        return tuple(plan for plan in self.plans if plan != LOCAL or self.local_fits)

    def wires(self, known: Sequence[str]) -> tuple[str, ...]:
        """The wire dtypes that may be chosen, the settings' own first."""
        lossy = [wire for wire in LOSSY if self.allow_lossy and wire != self.own_wire and wire in known]
        return (self.own_wire, *lossy)


@dataclass(frozen=True)
class Best:
    """``seconds``: of the whole prompt and all tokens after it."""

    prefill: Candidate
    decode: Candidate
    seconds: float


def ranked(model: CostModel, wanted: Wanted) -> tuple[list[Candidate], list[Candidate]]:
    """Every prefill and every step of decode, quickest first; of the plan local, which has no link, one."""
    prefills: list[Candidate] = []
    decodes: list[Candidate] = []
    position = wanted.prompt_tokens + wanted.decode_tokens // 2
    for wire in model.rates.wire_dtypes:
        for transport in TRANSPORTS:
            if transport.endswith("+zstd") and wire not in model.rates.compression:
                continue
            base = replace(wanted.base, wire_dtype=wire, transport=transport)
            first = wire == model.rates.wire_dtypes[0] and transport == TRANSPORTS[0]
            plans = [plan for plan in PLANS if plan != LOCAL or first]
            prefills += chooser.prefills(
                model, base, tokens=wanted.prompt_tokens, plans=plans, chunk_tokens=wanted.chunk_tokens
            )
            decodes += chooser.decodes(model, base, position=position, plans=plans)
    return sorted(prefills, key=_seconds), sorted(decodes, key=_seconds)


def _seconds(candidate: Candidate) -> float:
    return candidate.seconds


def best(prefills: Sequence[Candidate], decodes: Sequence[Candidate], wanted: Wanted, known: Sequence[str]) -> Best:
    """The settings to take: one wire dtype and one transport for both phases, a plan for each. Raises ``ValueError``
    where nothing may be chosen."""
    found: list[Best] = []
    for wire in wanted.wires(known):
        for transport in TRANSPORTS:
            ways = [_fitting(each, wire, transport, wanted.choosable) for each in (prefills, decodes)]
            if all(ways):
                prefill, decode = map(chooser.pick, ways)
                total = prefill.seconds + wanted.decode_tokens * decode.seconds
                settings = replace(prefill.settings, wire_dtype=wire, transport=transport)
                found.append(Best(replace(prefill, settings=settings), decode, total))
    if not found:
        raise ValueError("nothing to choose from")
    least = min(each.seconds for each in found)
    return next(each for each in found if each.seconds <= least * NEAR)


def _fitting(ranked: Sequence[Candidate], wire: str, transport: str, plans: Collection[str]) -> list[Candidate]:
    return [
        each
        for each in ranked
        if each.plan in plans
        and (each.plan == LOCAL or (each.settings.wire_dtype == wire and each.settings.transport == transport))
    ]


def as_settings(chosen: Best, wanted: Wanted) -> dict[str, Any]:
    """What ``tune --apply`` writes, by dotted key."""
    prefill, decode = chosen.prefill, chosen.decode
    found: dict[str, Any] = {"run.prefill_plan": prefill.plan, "run.decode_plan": decode.plan}
    if {prefill.plan, decode.plan} != {LOCAL}:
        found["run.transport"] = prefill.settings.transport
    if prefill.settings.wire_dtype != wanted.own_wire:
        found["run.wire_dtype"] = prefill.settings.wire_dtype
    if prefill.plan != LOCAL and prefill.settings.overlaps:
        found["run.chunk_tokens"] = prefill.settings.chunk_tokens
    return found


def row(candidate: Candidate, model: CostModel, own_wire: str) -> dict[str, Any]:
    """A prediction as the document has it."""
    settings, phase = candidate.settings, candidate.phase
    local = settings.plan == LOCAL
    link = model.rates.link
    return {
        "plan": settings.plan,
        "wire_dtype": None if local else settings.wire_dtype,
        "transport": None if local else settings.transport,
        "chunk_tokens": settings.chunk_tokens if not local and settings.overlaps else None,
        "seconds": phase.seconds,
        "bound_by": phase.bound_by,
        "tee_seconds": phase.work.tee,
        "serialization_seconds": phase.work.serialization,
        "server_seconds": phase.work.server,
        "up_seconds": link.up_seconds(phase.traffic),
        "down_seconds": link.down_seconds(phase.traffic),
        "rounds": phase.traffic.rounds,
        "lossy": not local and settings.wire_dtype in LOSSY and settings.wire_dtype != own_wire,
        "shows": SHOWS[settings.plan],
    }
