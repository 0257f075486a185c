"""``teegpu bench curve``: what keys cost. Messages of several sizes go to a server without keys and to one with them,
over the product's own transports, in turn; the servers are in a process of their own."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transports
from teegpu.bench import document as doc
from teegpu.bench.child import Child
from teegpu.bench.measure import Notify, Progress
from teegpu.bench.mirror import LENGTH
from teegpu.bench.samples import quantile
from teegpu.config import Config
from teegpu.errors import UsageError
from teegpu.units import human_bytes
from transports import security
from transports.base import Client, ClientOptions, Message
from transports.link import EmulatedLink, LinkSpec
from transports.security import CurveClient

SIZES = (1024, 64 * 1024, 2**20, 8 * 2**20)
MAX_SIZE = 256 * 2**20

BATCH_BYTES = 32 * 2**20
BATCH_REQUESTS = 32
"""The throughput is that of a batch in flight together: so many bytes, in at least two requests and at most so many."""

WARM_UP_ROUNDS = 3
_TRANSPORTS = ("zmq", "pipelined")


@dataclass
class _Way:
    """One size over one of the two connections. Samples are seconds."""

    size: int
    encrypted: bool
    lock_step: Client
    overlapping: Client
    round_trips: list[float] = field(default_factory=list)
    batches: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{human_bytes(self.size)}, {'keys' if self.encrypted else 'no keys'}"

    @property
    def batch(self) -> int:
        return max(2, min(BATCH_REQUESTS, BATCH_BYTES // self.size))

    def measure(self) -> tuple[float, float]:
        """Seconds of one round trip, and of a batch."""
        message = Message([LENGTH.pack(self.size), bytes(self.size)])
        reply = self.lock_step.request(message)
        started = time.perf_counter()
        self.overlapping.request_all([message] * self.batch)
        return (reply.received_ns - reply.sent_ns) / 1e9, time.perf_counter() - started


class CurveBenchmark:
    """``rounds`` times each of ``sizes`` bytes up and as many down, with and without keys, over ``base.run.link``.

    Raises ``UsageError`` for what can't be measured.
    """

    name = "curve"
    failures: tuple[str, ...] = ()

    def __init__(self, base: Config, *, rounds: int, sizes: Sequence[int] = SIZES) -> None:
        if rounds < 1:
            raise UsageError(f"--rounds {rounds} is below the least, 1")
        for size in sizes:
            if not 1 <= size <= MAX_SIZE:
                raise UsageError(f"--size {size} is not between 1 byte and {human_bytes(MAX_SIZE)}")
        self._base = base
        self._rounds = rounds
        self._sizes = tuple(dict.fromkeys(sizes))
        self._link = LinkSpec.parse(base.run.link) if base.run.link else None
        self._ways: list[_Way] = []
        self._started_at = doc.now()

    def run(self, notify: Notify = lambda _: None) -> None:
        with contextlib.ExitStack() as stack:
            notify(Progress(0, self._rounds, "keys", "loading"))
            self._open(stack)
            started = time.perf_counter()
            for done in range(-WARM_UP_ROUNDS, self._rounds):
                for way in self._ways:
                    round_trip, batch = way.measure()
                    if done >= 0:
                        way.round_trips.append(round_trip)
                        way.batches.append(batch)
                if done >= 0:
                    left = (time.perf_counter() - started) / (done + 1 + WARM_UP_ROUNDS) * (self._rounds - done - 1)
                    told = f"{done + 1} of {self._rounds}" if done + 1 in (1, self._rounds) else ""
                    notify(Progress(done + 1, self._rounds, "keys", "rounds", told, left))

    def _open(self, stack: contextlib.ExitStack) -> None:
        own = security.new_pair()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="teegpu-")))
        (folder / "bench.pub").write_text(own.public.text)
        child = stack.enter_context(Child("teegpu.bench.mirror", "the cost of keys"))
        servers = child.ask({"do": "listen", "clients": str(folder)})
        keys = CurveClient(own, security.parse_public(servers["public"], "the benchmark's server"))
        pairs = []
        for address, curve in ((servers["open"], None), (servers["keys"], keys)):
            if self._link is not None:
                address = stack.enter_context(EmulatedLink(self._link, address)).endpoint
            options = ClientOptions(spin_seconds=self._base.link.spin_seconds, curve=curve)
            pairs.append([stack.enter_context(transports.connect(name, address, options)) for name in _TRANSPORTS])
        self._ways = [
            _Way(size, encrypted, lock_step, overlapping)
            for size in self._sizes
            for encrypted, (lock_step, overlapping) in zip((False, True), pairs, strict=True)
        ]

    def document(self, status: str) -> dict[str, Any]:
        whole = min((len(way.batches) for way in self._ways), default=0)
        results = [self._result(way, whole) for way in self._ways] if whole else []
        return doc.document(
            self.name,
            status=status,
            started_at=self._started_at,
            spec=None,
            digest="",
            settings={
                "rounds": self._rounds,
                "link": str(self._link) if self._link is not None else "",
                "spin_seconds": self._base.link.spin_seconds,
                "transports": dict(zip(("round_trip", "throughput"), _TRANSPORTS, strict=True)),
            },
            notes=_notes() if results else [],
            results=results,
        )

    def _result(self, way: _Way, whole: int) -> dict[str, Any]:
        trips, batches = way.round_trips[:whole], way.batches[:whole]
        plain = next(other for other in self._ways if other.size == way.size and not other.encrypted)
        trip, batch = statistics.median(trips), statistics.median(batches)
        moved = way.size * way.batch
        result: dict[str, Any] = {
            "label": way.label,
            "bytes": way.size,
            "encrypted": way.encrypted,
            "round_trip": {"median": trip, "p95": quantile(trips, 0.95), "min": min(trips)},
            "requests_in_flight": way.batch,
            "bytes_per_second": {
                "median": moved / batch,
                "min": moved / max(batches),
                "max": moved / min(batches),
            },
            "samples": {"round_trip_seconds": trips, "batch_seconds": batches},
        }
        if way.encrypted:
            result["cost"] = {
                "round_trip_seconds": trip - statistics.median(plain.round_trips[:whole]),
                "round_trip_ratio": trip / statistics.median(plain.round_trips[:whole]),
                "throughput_ratio": statistics.median(plain.batches[:whole]) / batch,
            }
        return result


def _notes() -> list[str]:
    return [
        "as many bytes up as down; round trip: one request, lock-step; throughput: each way, while both are busy",
        "one connection, which one zmq I/O thread on each side encrypts and decrypts",
    ]
