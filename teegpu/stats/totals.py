"""The sums that a summary keeps: of a phase, of an operation, of a layer, of a server. Plain figures, bounded in
size."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

_GROWTH: Final = 1.02
_LOG_GROWTH: Final = math.log(_GROWTH)
_SHORTEST_SECONDS: Final = 1e-7
_LONGEST_SECONDS: Final = 1e5


@dataclass(slots=True)
class Latencies:
    """Durations, counted on a logarithmic scale: at most 1,396 counters, whatever is added.

    A counter stands for durations that differ by 2 %, so a quantile is within 1 % of one that was added (between 0.1 µs
    and a day; what is outside counts as the nearest of the two). The largest is exact.
    """

    counts: dict[int, int] = field(default_factory=dict)
    count: int = 0
    max_seconds: float = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """``times``: so often."""
        if times < 1:
            return
        within = min(max(seconds, _SHORTEST_SECONDS), _LONGEST_SECONDS)
        place = math.floor(math.log(within) / _LOG_GROWTH)
        self.counts[place] = self.counts.get(place, 0) + times
        self.count += times
        self.max_seconds = max(self.max_seconds, seconds)

    def quantile(self, fraction: float) -> float | None:
        """The duration that ``fraction`` of those added do not exceed (0.5: the median), or None without any."""
        wanted = max(1, math.ceil(fraction * self.count))
        passed = 0
        for place in sorted(self.counts):
            passed += self.counts[place]
            if passed >= wanted:
                return min(_GROWTH ** (place + 0.5), self.max_seconds)
        return None


@dataclass(slots=True)
class OpTotal:
    """``where`` is ``tee`` or ``gpu``; ``seconds`` of a ``gpu`` operation are the server's busy time.

    A phase has operations by name; should one name run in both places, the second is kept as ``NAME@where``.
    """

    where: str
    count: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class LayerTotal:
    """A layer's exclusive parts, as exposed: over all layers, and what belongs to none, they sum to the phase's
    wall."""

    tee_seconds: float = 0.0
    serialization_seconds: float = 0.0
    network_seconds: float = 0.0
    server_seconds: float = 0.0
    gpu_seconds: float = 0.0
    other_seconds: float = 0.0


@dataclass(slots=True)
class BusyTotal:
    """Sums over requests, which may overlap: not parts of any wall time."""

    round_trip_seconds: float = 0.0
    network_seconds: float = 0.0
    queue_seconds: float = 0.0
    server_serialization_seconds: float = 0.0
    gpu_seconds: float = 0.0
    compression_seconds: float = 0.0


@dataclass(slots=True)
class EndpointTotal:
    """What one server did in the whole run, by its index among the endpoints."""

    rpc_calls: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    retries: int = 0


@dataclass(slots=True)
class PhaseTotal:
    """One phase. ``seconds`` = tee + serialization + wait + other; wait = network + server + gpu, as exposed.

    ``server_seconds`` are the server's queue and its own serialization, ``gpu_seconds`` its computation; of both, the
    share for which the runner waited. ``layers`` and ``outside`` (what belongs to no layer) sum to ``seconds`` too.
    ``chunks`` is the most that a prompt was cut into.
    """

    tokens: int = 0
    passes: int = 0
    chunks: int = 0
    seconds: float = 0.0
    tee_seconds: float = 0.0
    serialization_seconds: float = 0.0
    wait_seconds: float = 0.0
    other_seconds: float = 0.0
    network_seconds: float = 0.0
    server_seconds: float = 0.0
    gpu_seconds: float = 0.0
    rpc_calls: int = 0
    rpc_retries: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    raw_bytes_up: int = 0
    raw_bytes_down: int = 0
    tried_bytes: int = 0
    compressed_bytes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    latencies: Latencies = field(default_factory=Latencies)
    busy: BusyTotal = field(default_factory=BusyTotal)
    ops: dict[str, OpTotal] = field(default_factory=dict)
    layers: dict[int, LayerTotal] = field(default_factory=dict)
    outside: LayerTotal = field(default_factory=LayerTotal)

    @property
    def communication_share(self) -> float:
        """Serialization and network as a fraction of the wall time."""
        return (self.serialization_seconds + self.network_seconds) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def rpcs_per_token(self) -> float:
        return self.rpc_calls / self.tokens if self.tokens else 0.0
