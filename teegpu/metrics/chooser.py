"""Which plan and which chunk: candidates, ranked by the cost model's predictions. Pure.

Who asks says which plans are allowed. Privacy is never traded for time here: ``AUTO_PLANS`` are those that show the
server no token ids and no scores, and of plans that are predicted to be about equally quick the more private one is
taken.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from teegpu.metrics.cost_model import CostModel, Phase, Settings
from teegpu.metrics.demand import LOCAL
from teegpu.metrics.traffic import SCORES_ON_LINK

AUTO_PLANS: Final = ("local", "fused", "attention")
"""What ``auto`` chooses among: with the others the server sees token ids and attention scores."""

OFFLOADING_PLANS: Final = ("fused", "attention")
"""The same beside an embedded server, which is there to show the split."""

PREFERENCE: Final = ("local", "fused", "attention", "batched", "per-op")
"""Of plans that are about equally quick, the first: what shows the server least, then fewest rounds."""

NEAR: Final = 1.03
"""Predictions that differ by less than this are taken for equal."""

CHUNKS: Final = (32, 64, 128, 256, 512)

AUTO_CHUNK_TOKENS: Final = 256
"""Chunk of an overlapped prefill where none is chosen by prediction: small enough that the pipeline fills early, large
enough that a matrix product still runs at full speed. ``docs/benchmarks.md`` has the measurement."""

LOCK_STEP_CHUNK_TOKENS: Final = 2048
"""Chunk of a lock-step prefill. It only bounds memory: nothing would overlap."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Settings and what is predicted for them: a prefill, or one pass of decode."""

    settings: Settings
    phase: Phase

    @property
    def plan(self) -> str:
        return self.settings.plan

    @property
    def seconds(self) -> float:
        return self.phase.seconds


def default_chunk(*, overlaps: bool) -> int:
    """The chunk where nothing is predicted."""
    return AUTO_CHUNK_TOKENS if overlaps else LOCK_STEP_CHUNK_TOKENS


def chunk_sizes(given: int, tokens: int, *, overlaps: bool) -> tuple[int, ...]:
    """The chunks to consider: ``given`` alone where it is not 0."""
    if given:
        return (given,)
    if not overlaps:
        return (LOCK_STEP_CHUNK_TOKENS,)
    # A prompt in one piece too: where both sides share cores and the link is quick, overlapping only makes them fight.
    return tuple(sorted({AUTO_CHUNK_TOKENS, LOCK_STEP_CHUNK_TOKENS, *(size for size in CHUNKS if size < tokens)}))


def prefills(
    model: CostModel, base: Settings, *, tokens: int, plans: Collection[str], chunk_tokens: int = 0
) -> list[Candidate]:
    """A prompt of ``tokens`` with each of ``plans`` and, where ``chunk_tokens`` is 0, each chunk size; quickest first.
    Plans that the rates do not cover are left out."""
    found = []
    for plan in plans:
        if not model.knows(plan, base.wire_dtype):
            continue
        overlaps = base.overlaps and plan != LOCAL
        # Plans whose scores cross the link are only there to be compared with: the usual chunk is enough for that.
        usual = chunk_tokens or default_chunk(overlaps=overlaps)
        sizes = (usual,) if plan in SCORES_ON_LINK else chunk_sizes(chunk_tokens, tokens, overlaps=overlaps)
        for size in sizes:
            settings = replace(base, plan=plan, chunk_tokens=size)
            found.append(Candidate(settings, model.prefill(settings, tokens)))
    return sorted(found, key=lambda candidate: candidate.seconds)


def decodes(model: CostModel, base: Settings, *, position: int, plans: Collection[str]) -> list[Candidate]:
    """One pass at ``position`` with each of ``plans``, quickest first."""
    found = []
    for plan in plans:
        if model.knows(plan, base.wire_dtype):
            settings = replace(base, plan=plan)
            found.append(Candidate(settings, model.decode(settings, position)))
    return sorted(found, key=lambda candidate: candidate.seconds)


def pick(ranked: Sequence[Candidate]) -> Candidate:
    """The one to take: of those about as quick as the quickest, first by ``PREFERENCE``, then the usual chunk, then the
    quicker. Raises ``ValueError`` where there is none."""
    if not ranked:
        raise ValueError("nothing to choose from")
    least = min(candidate.seconds for candidate in ranked)
    near = [candidate for candidate in ranked if candidate.seconds <= least * NEAR]

    def rank(candidate: Candidate) -> tuple[int, bool, float]:
        usual = candidate.settings.chunk_tokens == AUTO_CHUNK_TOKENS
        return PREFERENCE.index(candidate.plan), not usual, candidate.seconds

    return min(near, key=rank)
