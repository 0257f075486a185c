"""Messages of several sizes over several ways, in turn: what ``bench transports`` and ``bench curve`` measure with.

Each round takes every way once: a round trip of one message, then a batch of them, as many bytes up as down. The far
sides are processes of their own (``mirror`` for the product's transports, ``echo`` for bare zmq).
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from teegpu.bench.child import Child
from teegpu.bench.echo import Echo
from teegpu.bench.measure import Notify, Progress
from teegpu.bench.mirror import LENGTH, question
from teegpu.bench.samples import quantile
from teegpu.errors import UsageError
from teegpu.units import human_bytes
from transports import security
from transports.base import Client
from transports.link import EmulatedLink, LinkSpec
from transports.security import CurveClient

SIZES: Final = (1024, 64 * 1024, 2**20, 8 * 2**20)
MAX_SIZE: Final = 256 * 2**20

BATCH_BYTES: Final = 32 * 2**20
BATCH_REQUESTS: Final = 32
"""The throughput is that of a batch: so many bytes, in at least two requests and at most so many."""
BATCH_SECONDS: Final = 0.25
"""Over a link that is known to be slow, a batch has no more bytes than it carries in this time."""

WARM_UP_ROUNDS: Final = 3


class Carrier(Protocol):
    """Takes messages of a size there, and as many bytes back."""

    overlaps: bool

    def round_trip(self, size: int) -> float:
        """Seconds of one exchange, all that both sides do for it included."""

    def batch(self, size: int, count: int) -> float:
        """Seconds of ``count`` exchanges, in flight together where that is possible."""

    def link_share(self, size: int) -> float:
        """Bytes that crossed in the last exchange of ``size``, over those of the payload."""


class ProductCarrier:
    """The product's transports: ``lock_step`` for the round trip, ``overlapping`` for batches; may be one and the
    same."""

    def __init__(self, lock_step: Client, overlapping: Client) -> None:
        self.overlaps = overlapping.overlaps
        self._lock_step = lock_step
        self._overlapping = overlapping
        self._crossed: dict[int, int] = {}

    def round_trip(self, size: int) -> float:
        message = question(size)
        started = time.perf_counter()
        reply = self._lock_step.request(message)
        ended = time.perf_counter()
        self._crossed[size] = reply.bytes_up + reply.bytes_down
        return ended - started

    def batch(self, size: int, count: int) -> float:
        messages = [question(size)] * count
        started = time.perf_counter()
        self._overlapping.request_all(messages)
        return time.perf_counter() - started

    def link_share(self, size: int) -> float:
        return self._crossed[size] / (2 * size)

    def envelope_bytes(self, size: int) -> tuple[int, int]:
        """What an uncompressed exchange of ``size`` has beside its payload, up and down."""
        reply = self._lock_step.request(question(size))
        return reply.bytes_up - LENGTH.size - size, reply.bytes_down - size


class BareCarrier:
    """zmq itself, with frames of the sizes that the product's have. ``envelopes`` by payload size, as
    ``ProductCarrier.envelope_bytes`` gives them."""

    overlaps = True

    def __init__(self, echo: Echo, envelopes: Mapping[int, tuple[int, int]]) -> None:
        self._echo = echo
        self._numbers = {size: number for number, size in enumerate(envelopes)}
        self._shares = {
            size: (2 * size + up + down + LENGTH.size) / (2 * size) for size, (up, down) in envelopes.items()
        }

    @staticmethod
    def frames(envelopes: Mapping[int, tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
        """What ``Echo`` takes as its sizes."""
        return [([up, LENGTH.size, size], [down, size]) for size, (up, down) in envelopes.items()]

    def round_trip(self, size: int) -> float:
        return self._echo.round_trip_ns(self._numbers[size]) / 1e9

    def batch(self, size: int, count: int) -> float:
        return self._echo.batch_ns(self._numbers[size], count) / 1e9

    def link_share(self, size: int) -> float:
        return self._shares[size]


@dataclass
class Way:
    """One size over one carrier. ``facts`` say which, for the document. Samples are seconds."""

    label: str
    facts: dict[str, Any]
    size: int
    carrier: Carrier
    batch: int
    round_trips: list[float] = field(default_factory=list)
    batches: list[float] = field(default_factory=list)

    def measure(self) -> tuple[float, float]:
        """Seconds of one round trip, and of a batch."""
        return self.carrier.round_trip(self.size), self.carrier.batch(self.size, self.batch)

    def figures(self, whole: int) -> dict[str, Any]:
        """An entry of the results, from the first ``whole`` rounds."""
        trips, batches = self.round_trips[:whole], self.batches[:whole]
        moved = self.size * self.batch
        return {
            "label": self.label,
            **self.facts,
            "bytes": self.size,
            "round_trip": {"median": statistics.median(trips), "p95": quantile(trips, 0.95), "min": min(trips)},
            "batch_requests": self.batch,
            "requests_in_flight": self.batch if self.carrier.overlaps else 1,
            "bytes_per_second": {
                "median": moved / statistics.median(batches),
                "min": moved / max(batches),
                "max": moved / min(batches),
            },
            "link_share": self.carrier.link_share(self.size),
            "samples": {"round_trip_seconds": trips, "batch_seconds": batches},
        }


def batch_of(size: int, link: LinkSpec | None) -> int:
    """How many messages of ``size`` a batch has."""
    most = BATCH_BYTES
    if link is not None:
        slower = min(link.up_bytes_per_second, link.down_bytes_per_second)
        most = int(min(most, slower * BATCH_SECONDS))
    return max(2, min(BATCH_REQUESTS, most // size))


def checked_sizes(sizes: Sequence[int], rounds: int) -> tuple[int, ...]:
    """``sizes`` without those that are there twice. Raises ``UsageError`` for what can't be measured."""
    if rounds < 1:
        raise UsageError(f"--rounds {rounds} is below the least, 1")
    for size in sizes:
        if not 1 <= size <= MAX_SIZE:
            raise UsageError(f"--size {size} is not between 1 byte and {human_bytes(MAX_SIZE)}")
    return tuple(dict.fromkeys(sizes))


def take_turns(ways: Sequence[Way], rounds: int, notify: Notify, what: str) -> None:
    """Measures ``rounds`` rounds, after some to warm up. What interrupts this leaves in ``ways`` what there was."""
    started = time.perf_counter()
    for done in range(-WARM_UP_ROUNDS, rounds):
        for way in ways:
            round_trip, batch = way.measure()
            if done >= 0:
                way.round_trips.append(round_trip)
                way.batches.append(batch)
        if done >= 0:
            left = (time.perf_counter() - started) / (done + 1 + WARM_UP_ROUNDS) * (rounds - done - 1)
            told = f"{done + 1} of {rounds}" if done + 1 in (1, rounds) else ""
            notify(Progress(done + 1, rounds, what, "rounds", told, left))


def whole_rounds(ways: Sequence[Way]) -> int:
    """How many rounds were measured to their end."""
    return min((len(way.batches) for way in ways), default=0)


class Reach:
    """Where to connect for an address: there, or at an emulated link before it. All addresses share one link."""

    def __init__(self, spec: LinkSpec | None, stack: contextlib.ExitStack) -> None:
        self._spec = spec
        self._stack = stack
        self._link: EmulatedLink | None = None

    def __call__(self, address: str) -> str:
        if self._spec is None:
            return address
        if self._link is None:
            self._link = self._stack.enter_context(EmulatedLink(self._spec, address))
            return self._link.endpoint
        return self._link.open(address)


class Mirrors:
    """Servers that answer with as many bytes as they are sent, in a process of their own; ``stack`` ends it.

    ``open`` and ``keys`` are where they listen, in the order of ``addresses`` (pairs: for an open server, and for one
    with keys); ``curve`` are a client's keys for the latter.
    """

    def __init__(self, addresses: Sequence[tuple[str, str]], stack: contextlib.ExitStack) -> None:
        own = security.new_pair()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="teegpu-")))
        (folder / "bench.pub").write_text(own.public.text)
        child = stack.enter_context(Child("teegpu.bench.mirror", "messages there and back"))
        found = child.ask(
            {
                "do": "listen",
                "open": [plain for plain, _ in addresses],
                "keys": [secret for _, secret in addresses],
                "clients": str(folder),
            }
        )
        self.open: list[str] = found["open"]
        self.keys: list[str] = found["keys"]
        self.curve = CurveClient(own, security.parse_public(found["public"], "the benchmark's server"))
