"""What one repeat of a case gives, and what several of them come to. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class PhaseSample:
    """One phase of one run. Seconds are the runner's wall time and its exclusive parts.

    ``overlapped`` says whether link, server and runner could work at once. ``raw_bytes`` are the bytes of both ways
    before compression; ``limit_seconds`` is what the phase can't go below, as a run's report has it, None
    where the link is not known.
    """

    tokens: int
    passes: int
    seconds: float
    rpc_calls: int = 0
    overlapped: bool = False
    bytes_up: int = 0
    bytes_down: int = 0
    tee_seconds: float = 0.0
    serialization_seconds: float = 0.0
    network_seconds: float = 0.0
    server_seconds: float = 0.0
    gpu_seconds: float = 0.0
    other_seconds: float = 0.0
    raw_bytes: int = 0
    limit_seconds: float | None = None

    @property
    def communication_share(self) -> float:
        return (self.serialization_seconds + self.network_seconds) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of a case. ``token_ids`` are all tokens made, the one of prefill first; ``peak_memory_bytes`` is the
    most that the runner's process had resident up to then, its loading included."""

    prefill: PhaseSample
    decode: PhaseSample
    ttft_seconds: float
    tpot_median_seconds: float | None
    token_ids: list[int]
    peak_memory_bytes: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def seconds(self) -> float:
        return self.prefill.seconds + self.decode.seconds

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Sample:
        """What ``to_json`` gave. Raises ``ValueError`` for anything else."""
        try:
            given = dict(value)
            prefill, decode = PhaseSample(**given.pop("prefill")), PhaseSample(**given.pop("decode"))
            return cls(prefill=prefill, decode=decode, **given)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a sample: {error}") from None


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several values, their least and their largest."""

    median: float
    least: float
    largest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises ``ValueError`` where there are none."""
        known = sorted(values)
        if not known:
            raise ValueError("no values to take a median of")
        return cls(statistics.median(known), known[0], known[-1])

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "min": self.least, "max": self.largest}


@dataclass
class Measured:
    """What is known of a case so far. ``facts`` is what its process said of itself; ``error`` why it has no more."""

    label: str
    case: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    warm_up: Sample | None = None
    samples: list[Sample] = field(default_factory=list)
    error: str = ""

    def spent_seconds(self) -> float:
        """What its runs took, the warm-up among them."""
        runs = self.samples if self.warm_up is None else [self.warm_up, *self.samples]
        return sum(run.seconds for run in runs)

    def to_do(self, repeats: int, max_seconds: float) -> bool:
        """Whether another of ``repeats`` is to be made, now that so much of ``max_seconds`` is spent."""
        return not self.error and len(self.samples) < repeats and self.spent_seconds() < max_seconds


def quantile(values: Sequence[float], fraction: float) -> float:
    """The value below which ``fraction`` of ``values`` lie, interpolated. Raises ``ValueError`` without any."""
    known = sorted(values)
    if not known:
        raise ValueError("no values to take a quantile of")
    place = fraction * (len(known) - 1)
    below = int(place)
    above = min(below + 1, len(known) - 1)
    return known[below] + (known[above] - known[below]) * (place - below)


def agreement(made: Sequence[int], reference: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    same = 0
    for ours, theirs in zip(made, reference, strict=False):
        if ours != theirs:
            break
        same += 1
    return same
