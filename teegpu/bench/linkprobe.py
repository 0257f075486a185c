"""Measuring a link with nothing but what any GPU server answers: for ``teegpu bench link`` and ``teegpu tune``.

A server keeps no session and has no echo, so the messages are valid programs chosen for what they move. ``matmul``
needs no weight, hence no model on this side, and any server has it, whichever layers it holds:

- up: a dot product, (1, 1, n) × (1, 1, n) transposed. Two long vectors go up, one value comes down.
- down: an outer product, (1, r, 1) × (1, 1, c). r + c values go up, r · c come down.
- round trip: ``health``, some hundred bytes each way.

The server's own time for each (queue, decoding, computing, encoding) is taken off as its reply tells it. What is left
is what a run would pay for the same bytes: the network, and the handing over of a message on both sides.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import torch

from teegpu import __version__
from teegpu.bench.samples import quantile
from teegpu.errors import BadReplyError
from teegpu.remote.client import decode_reply
from teegpu.wire import codec
from teegpu.wire.limits import MAX_HEADER_BYTES, Limits
from teegpu.wire.messages import Execute, Health, HealthReport, Result, Welcome
from teegpu.wire.program import Program, Step, single
from transports.base import Client, Message
from transports.netem.spec import MAX_RTT_SECONDS, MIN_BYTES_PER_SECOND, LinkSpec

FIRST_BYTES: Final = 4096
"""The first size that is tried: even at 1 kbit/s it is across within the time that a reply may take."""
MOST_BYTES: Final = 64 * 2**20
GROWTH: Final = 16
TRANSFER_SECONDS: Final = 0.15
TRANSFER_ROUND_TRIPS: Final = 4.0
"""A message that measures bandwidth should take so long beyond the round trip, and so many round trips, whichever is
more: then an error in the RTT is a small one of the bandwidth."""
FEWEST: Final = 3
ROUND_TRIPS_SHARE: Final = 0.3
"""Round trips take this share of the time there is, and are so many at least."""
SAME_WITHIN: Final = 0.1
"""Two directions whose bandwidths differ by less than this share count as one ``bandwidth=`` in a link's spec."""
DIGITS: Final = 3

_VALUE_BYTES: Final = 4
_UP = single(("a", "b"), Step("matmul", "y", ("a", "b"), transpose=True))
_DOWN = single(("a", "b"), Step("matmul", "y", ("a", "b")))


@dataclass(frozen=True, slots=True)
class Crossing:
    """One exchange. ``network_seconds`` is its round trip less the ``server_seconds`` that the reply reports."""

    bytes_up: int
    bytes_down: int
    network_seconds: float
    server_seconds: float


@dataclass(slots=True)
class LinkSamples:
    """What was measured so far: small exchanges, and large ones each way.

    An exchange takes ``rtt + bytes up / up + bytes down / down``; medians of the three kinds give the three figures.
    Properties raise ``ValueError`` where what they are made of is missing.
    """

    small: list[Crossing] = field(default_factory=list)
    up: list[Crossing] = field(default_factory=list)
    down: list[Crossing] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether there is something of everything."""
        return bool(self.small and self.up and self.down)

    @property
    def small_seconds(self) -> float:
        """The median of the small exchanges, their bytes' own time included."""
        if not self.small:
            raise ValueError("no round trip was measured")
        return _median_seconds(self.small)

    @property
    def up_rates(self) -> list[float]:
        """Bytes per second of each large message up."""
        return self._rates("bytes_up", "bytes_down", self.up, self._seconds_per_byte()[1])

    @property
    def down_rates(self) -> list[float]:
        return self._rates("bytes_down", "bytes_up", self.down, self._seconds_per_byte()[0])

    @property
    def rtts(self) -> list[float]:
        """Seconds of each round trip, less the time of its own bytes where the bandwidth is known: on a slow link even
        some hundred bytes take their time."""
        up, down = self._seconds_per_byte() if self.complete else (0.0, 0.0)
        return [max(0.0, each.network_seconds - each.bytes_up * up - each.bytes_down * down) for each in self.small]

    def _rates(self, way: _Way, back: _Way, crossings: Sequence[Crossing], back_seconds_per_byte: float) -> list[float]:
        small, least = self.small[0], self.small_seconds
        rates = []
        for each in crossings:
            seconds = each.network_seconds - least
            seconds -= (getattr(each, back) - getattr(small, back)) * back_seconds_per_byte
            # On a quick link a large message may by chance take no longer than a small one.
            seconds = max(seconds, 0.01 * each.network_seconds, 1e-9)
            rates.append((getattr(each, way) - getattr(small, way)) / seconds)
        return rates

    def _seconds_per_byte(self) -> tuple[float, float]:
        """Up and down: two equations, for what the large exchanges take beyond the small ones."""
        if not self.complete:
            raise ValueError("no bandwidth was measured")
        small, up, down = self.small[0], self.up[0], self.down[0]
        a, b, first = up.bytes_up - small.bytes_up, up.bytes_down - small.bytes_down, _median_seconds(self.up)
        c, d, second = down.bytes_up - small.bytes_up, down.bytes_down - small.bytes_down, _median_seconds(self.down)
        first, second = first - self.small_seconds, second - self.small_seconds
        determinant = a * d - b * c
        if not determinant:  # limits that leave room for no large message
            return 0.0, 0.0
        return max(0.0, (first * d - second * b) / determinant), max(0.0, (second * a - first * c) / determinant)

    def spec(self) -> LinkSpec:
        """The link as ``run.link`` would name it: medians, rounded to what was measured."""
        up, down = statistics.median(self.up_rates), statistics.median(self.down_rates)
        if abs(up - down) < SAME_WITHIN * max(up, down):
            up = down = (up + down) / 2
        least = MIN_BYTES_PER_SECOND
        rtt = min(_rounded(statistics.median(self.rtts)), MAX_RTT_SECONDS)
        return LinkSpec(rtt, max(least, _rounded(up * 8) / 8), max(least, _rounded(down * 8) / 8))


_Way = Literal["bytes_up", "bytes_down"]


def _median_seconds(crossings: Sequence[Crossing]) -> float:
    return statistics.median(each.network_seconds for each in crossings)


def figures(values: list[float]) -> dict[str, float]:
    """Median, 95th percentile and least of ``values``. Raises ``ValueError`` without any."""
    return {"median": statistics.median(values), "p95": quantile(values, 0.95), "min": min(values)}


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


class LinkProbe:
    """Sends messages that measure over ``client``, a transport without compression.

    ``welcome`` is what the server said of itself, ``limits`` are ours: no message is longer than both sides take.
    Each method raises ``TransportError`` where the server is lost, ``ServerRefusedError`` and ``BadReplyError``.
    """

    def __init__(self, client: Client, welcome: Welcome, limits: Limits, *, timeout_seconds: float = 120.0) -> None:
        self._client = client
        self._decoder = codec.Decoder(limits)
        self._timeout_seconds = timeout_seconds
        self._next_id = 0
        theirs = welcome.limits
        longest = min(limits.message_bytes, theirs.get("message_bytes", limits.message_bytes)) - MAX_HEADER_BYTES
        # The server counts its inputs and outputs in its own dtype, beside the reply.
        working = min(limits.working_bytes, theirs.get("working_bytes", limits.working_bytes)) // 4
        dimension = min(limits.dimension, theirs.get("dimension", limits.dimension))
        self.most_bytes = max(8, min(MOST_BYTES, longest, working, 2 * _VALUE_BYTES * dimension))
        # Random, as values of a model are, so that nothing on the way compresses them.
        self._values = torch.randn(self.most_bytes // _VALUE_BYTES, generator=torch.Generator().manual_seed(0))

    def small(self) -> Crossing:
        """One round trip of a message as small as there is."""
        self._next_id += 1
        encoded = codec.encode_health(Health(self._next_id, __version__))
        return self._exchange(encoded.frames, 0, HealthReport)

    def up(self, nbytes: int) -> Crossing:
        """One exchange with ``nbytes`` of values up and one value down."""
        n = max(1, self._bounded(nbytes) // (2 * _VALUE_BYTES))
        vector = self._values[:n].view(1, 1, n)
        return self._run(_UP, vector, vector, (1, 1, 1))

    def down(self, nbytes: int) -> Crossing:
        """One exchange with about ``nbytes`` of values down and few up."""
        columns = max(1, math.isqrt(self._bounded(nbytes) // _VALUE_BYTES))
        row = self._values[:columns]
        return self._run(_DOWN, row.view(1, columns, 1), row.view(1, 1, columns), (1, columns, columns))

    def _bounded(self, nbytes: int) -> int:
        return min(nbytes, self.most_bytes)

    def _run(self, program: Program, a: torch.Tensor, b: torch.Tensor, shape: tuple[int, ...]) -> Crossing:
        self._next_id += 1
        encodings = {"a": "fp32", "b": "fp32"}
        encoded = codec.encode_execute(Execute(self._next_id, program, {"a": a, "b": b}, encodings, {"y": "fp32"}))
        return self._exchange(encoded.frames, _VALUE_BYTES * math.prod(shape), Result, shape)

    def _exchange(
        self,
        frames: list[codec.Buffer],
        reply_bytes: int,
        kind: type[HealthReport] | type[Result],
        shape: tuple[int, ...] = (),
    ) -> Crossing:
        client = self._client
        message = Message(frames, max_reply_bytes=MAX_HEADER_BYTES + reply_bytes)
        reply = client.request(message, timeout_seconds=self._timeout_seconds)
        answer = decode_reply(self._decoder, reply, client.endpoint)
        fits = isinstance(answer, kind) and answer.request_id == self._next_id
        if fits and isinstance(answer, Result):
            fits = {name: tuple(tensor.shape) for name, tensor in answer.tensors.items()} == {"y": shape}
        if not fits:
            raise BadReplyError(f"the server at {client.endpoint} answered another question than the one asked")
        whole = (reply.received_ns - reply.sent_ns) / 1e9
        server = min(whole, reply.server_ns / 1e9)
        return Crossing(reply.bytes_up, reply.bytes_down, whole - server, server)


Told = Callable[[str, int, int, str], None]
"""Takes what was measured: its name, how many are done, of how many, and the last figure in words."""


def measure(
    probe: LinkProbe,
    samples: LinkSamples,
    *,
    round_trips: int,
    transfers: int,
    seconds: float = math.inf,
    told: Told = lambda *_: None,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Fills ``samples``: ``round_trips`` small exchanges, then ``transfers`` large ones each way, in turn.

    The size of the large ones grows until a message takes ``TRANSFER_SECONDS``. When ``seconds`` are over it goes on
    only until there is something of everything, so that a slow link gives figures too. What interrupts this leaves in
    ``samples`` what there was. Raises as ``LinkProbe``.
    """
    began = clock()
    probe.small()  # the first of all pays for what both sides do only once
    for done in range(1, round_trips + 1):
        if len(samples.small) >= FEWEST and clock() >= began + ROUND_TRIPS_SHARE * seconds:
            break
        samples.small.append(probe.small())
        told("round trip", done, round_trips, f"{samples.small_seconds * 1e3:.3f} ms")
    rtt = samples.small_seconds
    ends_at = began + seconds
    up_bytes, down_bytes = (_size(way, probe.most_bytes, rtt, ends_at, clock) for way in (probe.up, probe.down))
    for done in range(1, transfers + 1):
        if samples.complete and clock() >= ends_at:
            break
        samples.up.append(probe.up(up_bytes))
        samples.down.append(probe.down(down_bytes))
        rates = f"up {samples.up_rates[-1] / 1e6:,.1f} MB/s, down {samples.down_rates[-1] / 1e6:,.1f} MB/s"
        told("bandwidth", done, transfers, rates)


def _size(
    way: Callable[[int], Crossing], most_bytes: int, rtt: float, ends_at: float, clock: Callable[[], float]
) -> int:
    """How many bytes take long enough one way for their bandwidth to be told."""
    wanted = max(TRANSFER_SECONDS, TRANSFER_ROUND_TRIPS * rtt)
    size = min(FIRST_BYTES, most_bytes)
    while True:
        taken = way(size).network_seconds - rtt
        if taken >= 0.8 * wanted or size >= most_bytes or clock() >= ends_at:
            return size
        growth = wanted / taken if taken > 0 else GROWTH
        size = min(most_bytes, int(size * min(max(growth, 2.0), GROWTH)))
