"""How long a phase takes, from its traffic (``metrics.traffic``), a link and the work on both sides. Pure formulas.

**Lock step** (one request in flight): everything happens one after the other, so the parts add up,

    bytes_up / up + bytes_down / down + rounds · (RTT + overhead) + runner + server.

**Overlapped** (the chunks of a prompt are under way together): up, down, runner and server each work on another chunk.
No chunk can take less than its own way through all of them, and none of the four can do its part in less than its time:

    max(up, down, runner, server, trip) + fill      trip = rounds · RTT + (up + down + runner + server) / chunks
                                                    fill = (trip without the largest part's share) / rounds

This is the asymptotic bound of a closed queueing network with ``chunks`` customers; ``fill`` is the first chunk's way
to the busiest place and the last one's way from it. Where two places are nearly equally busy, the real time is above
it: 1 % where the link was far the busiest (docs/benchmarks.md, 1 Gbit/s and fp16), 6 % where link and computation were
equal; with no more than four chunks up to 10 %.

Where both sides compute on the same cores, no schedule gets more out of those than they have: ``runner · runner_share +
server · server_share + moving`` is a further bound. A share is the side's threads over the cores; ``moving`` is the
processor time of sending and receiving itself, over the cores too.

**The limit** is what no schedule of the same bytes, rounds and computations can go below, both directions of the link
at once: ``max(bytes_up / up, bytes_down / down) + rounds · RTT + gpu + tee`` in lock step, the largest of these where
they overlap. The gap between run and limit is what overlap, serialization and the hand-over of messages cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from teegpu.stats.linkestimate import LinkFigures
from teegpu.stats.traffic import Traffic

RUNNER_SECONDS_PER_RPC: Final = 0.0001
SERVER_SECONDS_PER_RPC: Final = 0.0001
"""What a request costs each side whatever its size, the wire and the transport included: ``teegpu bench overhead`` gave
0.19 ms for both on one machine."""

INT8_SECONDS_PER_RPC: Final = 0.0004
"""What int8 adds to a small request: quantising and the reverse on both sides (docs/benchmarks.md, decode on loopback:
47 ms a token became 71 ms with 61 RPCs)."""


@dataclass(frozen=True, slots=True)
class Link:
    """Bytes per second are ``inf`` where there is no limit. ``overhead_seconds`` comes on top of each round's RTT."""

    rtt_seconds: float
    up_bytes_per_second: float
    down_bytes_per_second: float
    overhead_seconds: float = 0.0

    @classmethod
    def of(cls, figures: LinkFigures) -> Link | None:
        """The link with these figures, or None where it is not known. A direction without a figure has no limit: it
        was given without one, or no message was large enough to feel it."""
        if figures.rtt_seconds is None:
            return None
        return cls(
            figures.rtt_seconds,
            figures.bandwidth_up_bytes_per_second or math.inf,
            figures.bandwidth_down_bytes_per_second or math.inf,
        )

    def up_seconds(self, traffic: Traffic) -> float:
        return traffic.bytes_up_with_headers / self.up_bytes_per_second

    def down_seconds(self, traffic: Traffic) -> float:
        return traffic.bytes_down_with_headers / self.down_bytes_per_second

    def carrying_seconds(self, bytes_up: float, bytes_down: float) -> float:
        """The least time for these bytes, both directions at once."""
        return max(bytes_up / self.up_bytes_per_second, bytes_down / self.down_bytes_per_second)


@dataclass(frozen=True, slots=True)
class Work:
    """Busy seconds of a phase on both sides: what does not depend on the link. ``runner_other`` is the runner's time
    that is neither. Of the cores that both sides share, ``runner_share`` and ``server_share`` are what each uses while
    it computes (0: they share none, 1: all), and ``moving`` what the transport takes, over their number."""

    tee: float = 0.0
    serialization: float = 0.0
    runner_other: float = 0.0
    gpu: float = 0.0
    server_serialization: float = 0.0
    runner_share: float = 0.0
    server_share: float = 0.0
    moving: float = 0.0

    @property
    def runner(self) -> float:
        return self.tee + self.serialization + self.runner_other

    @property
    def server(self) -> float:
        return self.gpu + self.server_serialization

    def with_rpc_calls(self, more: int) -> Work:
        """The same work in ``more`` requests (fewer, where it is negative)."""
        return replace(
            self,
            serialization=max(0.0, self.serialization + more * RUNNER_SECONDS_PER_RPC),
            server_serialization=max(0.0, self.server_serialization + more * SERVER_SECONDS_PER_RPC),
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """``seconds`` of the phase, and what holds it up most: ``up``, ``down``, ``rounds``, ``runner``, ``server`` or
    ``cores``."""

    seconds: float
    bound_by: str


def lock_step(traffic: Traffic, link: Link, work: Work) -> Prediction:
    """One request after the other. See the module."""
    parts = {
        "up": link.up_seconds(traffic),
        "down": link.down_seconds(traffic),
        "rounds": traffic.rounds * (link.rtt_seconds + link.overhead_seconds),
        "runner": work.runner,
        "server": work.server,
    }
    return Prediction(sum(parts.values()), max(parts, key=lambda name: parts[name]))


def overlapped(traffic: Traffic, link: Link, work: Work, chunks: int) -> Prediction:
    """``chunks`` of one size under way together; ``traffic.rounds`` are those of one of them. See the module."""
    busy = {"up": link.up_seconds(traffic), "down": link.down_seconds(traffic)}
    busy |= {"runner": work.runner, "server": work.server}
    name = max(busy, key=lambda key: busy[key])
    longest = busy[name]
    crowded = work.runner * work.runner_share + work.server * work.server_share + work.moving
    if crowded > longest:
        name, longest = "cores", crowded
    waiting = traffic.rounds * (link.rtt_seconds + link.overhead_seconds)
    together = max(1, chunks)
    trip = waiting + sum(busy.values()) / together
    fill = max(0.0, trip - longest / together) / max(1, traffic.rounds)
    if trip > longest:
        return Prediction(trip, "rounds" if waiting > trip / 2 else name)
    return Prediction(longest + fill, name)


def limit_seconds(*, carrying: float, waiting: float, gpu: float, tee: float, overlaps: bool) -> float:
    """What a phase can't go below: ``carrying`` its bytes, ``waiting`` for its rounds, and computing, in seconds."""
    if overlaps:
        return max(carrying, waiting, gpu, tee)
    return carrying + waiting + gpu + tee
