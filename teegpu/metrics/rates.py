"""What a model's work costs on two machines and the link between them: the quantities that predictions are made from.

Work is counted by place (``metrics.demand`` counts it), in up to three units, and each place has a price for each unit:

| place | units |
|---|---|
| ``tee/LINEAR`` | products of the plan local: kernels, values of the matrices, multiply-adds |
| ``tee/ATTENTION`` | calls, key and value entries read, multiply-adds |
| ``tee/RMSNORM``, ``SCALE``, ``ROTARY``, ``SILU``, ``ADD``, ``KV_CACHE``, ``EMBEDDING``, ``SAMPLING``, ``SOFTMAX`` | calls, values |
| ``tee/OTHER`` | passes, requests |
| ``runner/encode.D``, ``runner/decode.D`` | the runner's codec of wire dtype D: requests, tensors, values |
| ``server/decode.D``, ``server/encode.D`` | the same on the server; its queue counts as decoding |
| ``server/LINEAR``, ``server/MATMUL`` | kernels, values of the matrices (of keys or values), multiply-adds |
| ``server/SUM`` | add and scale: calls, values |

One row of a product costs what reading its matrix costs, many rows what multiplying costs: the price of the two is
their sum, which is at most twice the larger one.
"""  # noqa: E501 (a table)

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from teegpu.metrics.predict import Link

Units = tuple[float, float, float]

FALLBACKS: Final = {
    "tee/SCALE": "tee/RMSNORM",
    "tee/ADD": "tee/RMSNORM",
    "tee/ROTARY": "tee/RMSNORM",
    "tee/SILU": "tee/RMSNORM",
    "tee/KV_CACHE": "tee/RMSNORM",
    "tee/EMBEDDING": "tee/RMSNORM",
    "tee/SOFTMAX": "tee/SILU",
    "tee/SAMPLING": "tee/RMSNORM",
    "tee/ATTENTION": "tee/LINEAR",
    "server/MATMUL": "server/LINEAR",
}
"""Whose price is taken for a place that was not measured."""

CODEC_PLACES: Final = ("runner/encode", "runner/decode", "server/decode", "server/encode")

TURNS_SLOWDOWN: Final = 1.25
"""What both sides together take longer where they compute at once and each wants all cores, as long as it was not
measured: chunks of 256 tokens took 1.05 to 1.35 times as long as one piece, on loopback and two cores."""

_FREE: Final = frozenset({"tee/OTHER", "tee/SAMPLING", "server/SUM"})
"""Places that cost nothing where neither they nor their fallback were measured."""


@dataclass(frozen=True, slots=True)
class Compression:
    """What zstd does to one wire dtype's frames: bytes after over bytes before, up and down, and the codec's seconds
    for each byte before, compressing and decompressing."""

    up: float
    down: float
    compress_seconds: float
    decompress_seconds: float


@dataclass(frozen=True)
class Rates:
    """``prices`` by place, in seconds for each unit. ``link`` as it is felt: its overhead is what a round costs beyond
    the RTT.

    ``cores``: runner and server share so many of this machine's; 0: each has its own. ``runner_share`` and
    ``server_share``: the threads of each over these. ``slowdown``: what both take longer, as a factor, while they
    compute at once; where they take turns with the cores, what their sum does (less than 1 where the pauses of lock
    step had made them slow, as over a slow link). ``moving_seconds``: processor time for a byte that crosses, on both
    sides and in the emulated link where they share a machine. ``overlap_seconds``: what an event loop adds to each
    request, on the runner. ``compression``: by wire dtype, what is known of it.
    """

    prices: Mapping[str, Units]
    link: Link
    cores: int = 0
    runner_share: float = 0.0
    server_share: float = 0.0
    slowdown: float = 1.0
    moving_seconds: float = 0.0
    overlap_seconds: float = 0.0
    compression: Mapping[str, Compression] = field(default_factory=dict)

    @property
    def takes_turns(self) -> bool:
        """Whether each side computes with so many threads that only one of them can have the cores it uses."""
        return self.cores > 0 and self.runner_share + self.server_share > 1.0

    def price(self, place: str) -> Units:
        """Raises ``KeyError`` for a place of which nothing is known."""
        found = self.prices.get(place)
        if found is not None:
            return found
        other = FALLBACKS.get(place)
        if other is not None:
            return self.price(other)
        if place in _FREE:
            return (0.0, 0.0, 0.0)
        raise KeyError(place)

    def seconds(self, place: str, amount: Units) -> float:
        """What ``amount`` of work costs at ``place``. Raises as ``price``."""
        return sum(price * units for price, units in zip(self.price(place), amount, strict=True))

    def knows(self, place: str) -> bool:
        try:
            self.price(place)
        except KeyError:
            return False
        return True

    @property
    def wire_dtypes(self) -> tuple[str, ...]:
        """Those whose codec was measured."""
        return tuple(place.rpartition(".")[2] for place in self.prices if place.startswith("runner/encode."))

    def over(self, link: Link) -> Rates:
        """The same two machines over another link. What handing a message over costs stays as it is."""
        own = self.link
        return replace(
            self,
            link=Link(
                link.rtt_seconds,
                _both(link.up_bytes_per_second, own.up_bytes_per_second),
                _both(link.down_bytes_per_second, own.down_bytes_per_second),
                own.rtt_seconds + own.overhead_seconds,
            ),
        )

    def to_json(self) -> dict[str, Any]:
        link = self.link
        return {
            "prices": {place: list(price) for place, price in sorted(self.prices.items())},
            "link": {
                "rtt_seconds": link.rtt_seconds,
                "up_bytes_per_second": _finite(link.up_bytes_per_second),
                "down_bytes_per_second": _finite(link.down_bytes_per_second),
                "overhead_seconds": link.overhead_seconds,
            },
            "cores": self.cores,
            "runner_share": self.runner_share,
            "server_share": self.server_share,
            "slowdown": self.slowdown,
            "moving_seconds": self.moving_seconds,
            "overlap_seconds": self.overlap_seconds,
            "compression": {
                dtype: [known.up, known.down, known.compress_seconds, known.decompress_seconds]
                for dtype, known in sorted(self.compression.items())
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Rates:
        """What ``to_json`` gave. Raises ``ValueError`` for anything else."""
        try:
            link = value["link"]
            rates = cls(
                {str(place): _units(price) for place, price in value["prices"].items()},
                Link(
                    _number(link["rtt_seconds"]),
                    _number(link["up_bytes_per_second"] or math.inf),
                    _number(link["down_bytes_per_second"] or math.inf),
                    _number(link["overhead_seconds"]),
                ),
                int(_number(value["cores"])),
                _number(value["runner_share"]),
                _number(value["server_share"]),
                _number(value["slowdown"]),
                _number(value["moving_seconds"]),
                _number(value["overlap_seconds"]),
                {str(dtype): Compression(*map(_number, known)) for dtype, known in value["compression"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a set of rates: {error!r}") from None
        return rates


def _both(first: float, second: float) -> float:
    """The rate of one after the other."""
    return 1.0 / (1.0 / first + 1.0 / second) if first and second else 0.0


def _finite(rate: float) -> float | None:
    return rate if math.isfinite(rate) else None


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value < 0:
        raise TypeError(f"{value!r} is no amount")
    return float(value)


def _units(value: Any) -> Units:
    first, second, third = map(_number, value)
    return first, second, third
