"""``teegpu bench curve``: what keys cost. Messages of several sizes go to a server without keys and to one with them,
over the product's own transports, in turn; the servers are in a process of their own."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from typing import Any

import transports
from teegpu.bench import document as doc
from teegpu.bench.exchanges import (
    SIZES,
    Mirrors,
    ProductCarrier,
    Reach,
    Way,
    batch_of,
    checked_sizes,
    take_turns,
    whole_rounds,
)
from teegpu.bench.measure import Notify, Progress
from teegpu.config import Config
from teegpu.units import human_bytes
from transports.base import ClientOptions
from transports.link import LinkSpec

_TRANSPORTS = ("zmq", "pipelined")
_ANY_PORT = "tcp://127.0.0.1:0"


class CurveBenchmark:
    """``rounds`` times each of ``sizes`` bytes up and as many down, with and without keys, over ``base.run.link``.

    Raises ``UsageError`` for what can't be measured.
    """

    name = "curve"
    failures: tuple[str, ...] = ()

    def __init__(self, base: Config, *, rounds: int, sizes: Sequence[int] = SIZES) -> None:
        self._sizes = checked_sizes(sizes, rounds)
        self._base = base
        self._rounds = rounds
        self._link = LinkSpec.parse(base.run.link) if base.run.link else None
        self._ways: list[Way] = []
        self._started_at = doc.now()

    def run(self, notify: Notify = lambda _: None) -> None:
        with contextlib.ExitStack() as stack:
            notify(Progress(0, self._rounds, "keys", "loading"))
            self._open(stack)
            take_turns(self._ways, self._rounds, notify, "keys")

    def _open(self, stack: contextlib.ExitStack) -> None:
        mirrors, reach = Mirrors([(_ANY_PORT, _ANY_PORT)], stack), Reach(self._link, stack)
        carriers = []
        for address, curve in ((mirrors.open[0], None), (mirrors.keys[0], mirrors.curve)):
            options = ClientOptions(spin_seconds=self._base.link.spin_seconds, curve=curve)
            there = reach(address)
            clients = [stack.enter_context(transports.connect(name, there, options)) for name in _TRANSPORTS]
            carriers.append(ProductCarrier(*clients))
        self._ways = [
            Way(
                f"{human_bytes(size)}, {'keys' if encrypted else 'no keys'}",
                {"encrypted": encrypted},
                size,
                carrier,
                batch_of(size, self._link),
            )
            for size in self._sizes
            for encrypted, carrier in zip((False, True), carriers, strict=True)
        ]

    def document(self, status: str) -> dict[str, Any]:
        whole = whole_rounds(self._ways)
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

    def _result(self, way: Way, whole: int) -> dict[str, Any]:
        result = way.figures(whole)
        if way.facts["encrypted"]:
            plain = next(other for other in self._ways if other.size == way.size and not other.facts["encrypted"])
            without = statistics.median(plain.round_trips[:whole])
            result["cost"] = {
                "round_trip_seconds": result["round_trip"]["median"] - without,
                "round_trip_ratio": result["round_trip"]["median"] / without,
                "throughput_ratio": statistics.median(plain.batches[:whole]) / statistics.median(way.batches[:whole]),
            }
        return result


def _notes() -> list[str]:
    return [
        "as many bytes up as down; round trip: one request, lock-step; throughput: each way, while both are busy",
        "one connection, which one zmq I/O thread on each side encrypts and decrypts",
    ]
